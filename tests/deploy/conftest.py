"""A candidate that the deployment tests share."""

import pytest

from raysearch.config import Action
from raysearch.kernels import device_name
from raysearch.study.provenance import provenance
from raysearch.study.records import RoundRecord, StudyRecord
from raysearch.trial.round import dense_round, report_round, run_round
from raysearch.trial.worker import Worker


@pytest.fixture(scope="module")
def candidate(worker: Worker) -> RoundRecord:
    worker.ledger.write_study(study_record(worker))
    record = run_round(worker, dense_round(worker), Action(sparsity=0.7, finetune_tokens=1024, learning_rate=1e-3))
    report_round(worker, record)
    report_round(worker, dense_round(worker))
    return record


def study_record(worker: Worker) -> StudyRecord:
    return StudyRecord(study=worker.study, space="test", space_hash="", root_key=worker.inputs.root_key,
                       provenance=provenance(device_name("cpu")))

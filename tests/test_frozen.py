import pytest
from pydantic import ValidationError

from raysearch.config import Study, TrialConfig
from raysearch.frozen import Frozen, parse


@pytest.mark.parametrize(("cls", "fields", "sentence"), [
    (TrialConfig, {"sparsty": 0.5}, r"^STUDY: sparsty: no such field; the fields are schedule, .*target_spars.* \(got 0.5\)$"),
    (Study, {"model": {"path": "m"}, "data": {"context": 3}}, r"^STUDY: data.context: no such field; the fields are corpus"),
    (Study, {"model": {"path": 3}}, r"^STUDY: model.path: Input should be a valid string \(got 3\)$"),
    (Study, {"model": {"path": "m"}, "cluster": {"num_ranks": "all"}},  # of a union, what each alternative wants
     r"^STUDY: cluster.num_ranks: Input should be a valid integer or Input should be 'auto' \(got 'all'\)$"),
    (Study, {"model": {"path": "m"}, "search": {"constraints": {"stored_bytes": "few"}}},  # the innermost field is named
     r"^STUDY: search.constraints: Input should be a valid number \(got 'few'\)$"),
    (TrialConfig, {"threshold_unit": "std"}, r"^STUDY: threshold_unit 'std' needs a threshold, got None; give threshold$"),
])
def test_the_first_error_is_one_sentence(cls: type[Frozen], fields: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        parse(cls, fields, "STUDY")


def test_what_is_frozen_stays() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        TrialConfig().rate = 0.5

import pytest

from raysearch.config import Study, TrialConfig, higher_is_better, nested, study_of
from raysearch.frozen import parse


@pytest.mark.parametrize(("fields", "sentence"), [
    ({"target_sparsity": "0.5"}, r"target_sparsity: Input should be a valid number \(got '0.5'\)"),
    ({"target_sparsity": 1.0}, r"target_sparsity: Input should be less than 1 \(got 1.0\)"),
    ({"target_sparsity": float("nan")}, r"target_sparsity: Input should be .*finite number"),
    ({"rate": 1.0}, r"rate: Input should be less than 1 \(got 1.0\)"),
    ({"threshold": 0.1, "target_sparsity": 0.5}, r"threshold and target_sparsity contradict each other .* 0.1 and 0.5"),
    ({"threshold": 0.1, "scope": "layer"}, r"scope with a threshold must stay global .* got 'layer'"),
    ({"threshold_unit": "std"}, r"threshold_unit 'std' needs a threshold, got None"),
    ({"schedule": "quadratic"}, r"schedule: Input should be 'one_shot', .* \(got 'quadratic'\)"),
])
def test_bad_settings_are_one_sentence(fields: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        parse(TrialConfig, fields, "space")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("fields", "sentence"), [
    ({}, r"model: Field required"),
    ({"model": {"path": "m"}, "search": {"objectives": ("num_nonzero", "text/loudness")}},
     r"search: metric 'text/loudness': its direction is not known"),
    ({"model": {"path": "m"}, "search": {"objectives": ("num_nonzero", "stored_bytes")}},
     r"one size .* and one quality .*, got num_nonzero, stored_bytes"),
    ({"model": {"path": "m"}, "search": {"constraints": {"text/loudness": 1.0}}}, r"'text/loudness': its direction is not"),
    ({"model": {"path": "m"}, "search": {"max_drop": {"stored_bytes": 1.0}}}, r"'stored_bytes': its direction is not known"),
    ({"model": {"path": "m"}, "search": {"sampler": "cma"}}, r"sampler: Input should be 'ours', 'tpe', 'gp', 'nsga2' or 'rand"),
    ({"model": {"path": "m"}, "search": {"objectives": ("num_nonzero",)}}, r"one size .* and one quality .*, got num_non"),
    ({"model": {"path": "m"}, "search": {"objectives": ("text/bits_per_byte",) * 2}}, r"objectives must be different names"),
    ({"model": {"path": "m"}, "evaluation": {"racing_level": 0.05},
      "search": {"objectives": ("num_nonzero", "text/bits_per_byte", "lambada/acc")}},
     r"racing_level needs one size and one quality .* got num_nonzero, text/bits_per_byte, lambada/acc"),
    ({"model": {"path": "m"}, "training": {"batch_tokens": 1000}}, r"batch_tokens must be a multiple of .* = 128, got 1000"),
    *(({"model": {"path": "m"}, "training": {"batch_tokens": 512}, "cluster": {"micro_batch_tokens": tokens, "num_ranks": 2}},
       rf"must be a multiple of context_tokens = 128 that divides the 256 tokens of a rank .*, got {tokens}")
      for tokens in (100, 512, 384)),  # no whole sequences; more than there are; leaves a remainder
    ({"model": {"path": "m"}, "cluster": {"micro_batch_tokens": 1}}, r"micro_batch_tokens: Input should be .* \(got 1\)"),
    ({"model": {"path": "m"}, "search": {"gpu_hours": 2}}, r"gpu_hours 2 limits nothing where gpus_per_rank is 0"),
    ({"model": {"path": "m"}, "search": {"min_gain_per_gpu_hour": 0.1}}, r"gpus_per_rank above 0, got ours and 0; give num"),
    ({"model": {"path": "m"}, "search": {"min_gain_per_gpu_hour": 0.1, "sampler": "tpe"}, "cluster": {"gpus_per_rank": 1}},
     r"min_gain_per_gpu_hour needs sampler ours, .* got tpe and 1"),
    ({"model": {"path": "m"}, "cluster": {"num_ranks": 2, "gpus_per_rank": 0.5}},
     r"gpus_per_rank below 1 needs num_ranks 1 .* got 0.5 and 2"),
])
def test_bad_studies_are_one_sentence(fields: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        parse(Study, fields, "STUDY")


def test_direction_of_metrics() -> None:
    up = ["hellaswag/acc", "choice/acc_norm", "triviaqa/exact_match"]
    down = ["text/bits_per_byte", "lambada/perplexity", "text/word_perplexity"]
    assert [higher_is_better(name) for name in up + down] == [True] * 3 + [False] * 3


def test_a_number_of_ranks_is_positive() -> None:
    with pytest.raises(ValueError, match="num_ranks must be at least 1, or auto, got 0"):
        study_of(path="m", num_ranks=0)


def test_settings_are_nested_by_their_names() -> None:
    assert nested({"model": "m", "corpus": None, "num_ranks": 2, "num_trials": 3}) == {
        "model": {"path": "m"}, "data": {"corpus": None}, "search": {"num_trials": 3}, "cluster": {"num_ranks": 2}}
    with pytest.raises(ValueError, match="epochs: no such setting; the settings are path, prunable"):
        nested({"model": "m", "epochs": 3})


def test_settings_are_replaced_by_their_own_names_and_checked() -> None:
    study = study_of(path="m", num_trials=3)
    assert study.replaced(num_ranks=2, zero_stage=1).cluster.zero_stage == 1
    assert study.replaced(num_ranks=2).search.num_trials == 3
    with pytest.raises(ValueError, match="batch_tokens must be a multiple of"):
        study.replaced(batch_tokens=1000)

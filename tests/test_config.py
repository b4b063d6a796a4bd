
import pytest

from raysearch.config import Study, TrialConfig, higher_is_better, parse


@pytest.mark.parametrize(("fields", "sentence"), [
    ({"sparsty": 0.5}, r"space: sparsty: no such field; the fields are schedule, .*target_sparsity.* \(got 0.5\)"),
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
    ({"model": "m", "objective": "text/loudness"}, r"metric 'text/loudness': its direction is not known"),
    ({"model": "m", "batch_tokens": 1000}, r"batch_tokens must be a multiple of .* = 128, got 1000"),
    ({"model": "m", "num_ranks": 2, "gpus_per_rank": 0.5}, r"gpus_per_rank below 1 needs num_ranks 1 .* got 0.5 and 2"),
])
def test_bad_studies_are_one_sentence(fields: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        parse(Study, fields, "STUDY")


def test_direction_of_metrics() -> None:
    up = ["hellaswag/acc", "choice/acc_norm", "triviaqa/exact_match"]
    down = ["text/bits_per_byte", "lambada/perplexity", "text/word_perplexity"]
    assert [higher_is_better(name) for name in up + down] == [True] * 3 + [False] * 3


def test_a_wrong_word_names_both_rules() -> None:
    with pytest.raises(ValueError, match=r"num_ranks: Input should be a valid integer or Input should be 'auto' \(got 'all'\)"):
        parse(Study, {"model": "m", "num_ranks": "all"}, "x")
    with pytest.raises(ValueError, match="num_ranks must be at least 1, or auto, got 0"):
        parse(Study, {"model": "m", "num_ranks": 0}, "x")

"""Which gang holds a model: known numbers, by hand."""


import pytest

from raysearch.cluster.placement import (
    MicroBatch,
    Work,
    host_bytes,
    largest_micro_batch,
    place,
    rank_bytes,
    repays_compilation,
    work_in_training,
    work_of,
)
from raysearch.config import Action, Study, study_of
from raysearch.models.model import ModelSize

GPU_BYTES = 85_520_809_984  # an H100 of "80 GB"
GPT2 = ModelSize(124_439_808, 768, 12, 50_257)
BOOKS_30M = ModelSize(29_700_000, 512, 8, 8192)
LLAMA_7B = ModelSize(6_738_415_616, 4096, 32, 32_000)
LLAMA_70B = ModelSize(68_976_648_192, 8192, 80, 32_000)


def auto(**settings: object) -> Study:
    return study_of(**{"model": "m", "num_ranks": "auto", "zero_stage": "auto", "gpus_per_rank": 1.0, "dtype": "bfloat16",
                    "context_tokens": 1024, "batch_tokens": 16_384, **settings})


def test_the_parts_are_the_known_ones() -> None:
    need = rank_bytes(ModelSize(7 * 10**9, 4096, 32, 32_000), num_ranks=1, zero_stage=0, dtype="bfloat16",
                      micro_batch=MicroBatch(1024, False))
    parts = ("weights", "gradients", "fp32 master", "Adam moments")
    assert sum(need[part] for part in parts) == 18 * 7e9  # Rajbhandari et al. 2020, 2 + 2 + K = 12 bytes; fp32 gradients
    assert need["mask"] == 7e9
    assert need["other gradients"] == 14e9  # more than 34 * 4096 * 32 * 1024 bytes of activations and the logits


@pytest.mark.parametrize(("size", "tokens", "measured"), [
    (GPT2, 16_384, 8.65e9), (GPT2, 32_768, 13.83e9), (BOOKS_30M, 16_384, 3.37e9), (BOOKS_30M, 32_768, 6.11e9),
    (BOOKS_30M, 65_536, 11.06e9)])
def test_what_was_measured_was_predicted(size: ModelSize, tokens: int, measured: float) -> None:
    """Peaks of ZeRO-0 on an H200, 2026-11-27."""
    need = rank_bytes(size, num_ranks=1, zero_stage=0, dtype="bfloat16", micro_batch=MicroBatch(tokens, False))
    assert sum(need.values()) == pytest.approx(measured, rel=0.07)


def test_a_micro_batch_is_the_largest_that_fits() -> None:
    study = auto(batch_tokens=524_288, num_ranks=1, zero_stage=0)
    assert largest_micro_batch(GPT2, study, 1, 0, GPU_BYTES) == (65_536, False)
    assert largest_micro_batch(GPT2, study, 1, 0, 9e9) == (16_384, False)
    assert largest_micro_batch(GPT2, study.replaced(micro_batch_tokens=2048), 1, 0, 9e9) == (2048, False)
    assert largest_micro_batch(GPT2, auto(batch_tokens=3 * 5 * 1024), 1, 0, 5.4e9) == (5 * 1024, False)  # it divides the step
    long = auto(context_tokens=16_384, batch_tokens=65_536)
    assert largest_micro_batch(GPT2, long, 1, 0, 9e9) == (16_384, False)
    assert largest_micro_batch(GPT2, long, 1, 0, 5e9) == (16_384, True)
    assert largest_micro_batch(GPT2, long, 1, 0, 1e9) == (16_384, True)  # what does not fit shows when it runs


def test_a_teacher_and_calibration_are_counted() -> None:
    def need(tokens: int, stage: int, **work: object) -> dict[str, float]:
        return rank_bytes(LLAMA_7B, num_ranks=2, zero_stage=stage, dtype="bfloat16", micro_batch=MicroBatch(tokens, False),
                          work=Work(**work))

    assert need(4096, 2, distils=True)["teacher"] == 2 * LLAMA_7B.num_parameters
    assert need(4096, 3, distils=True)["teacher"] == LLAMA_7B.num_parameters
    assert need(4096, 2, distils=True)["logits"] - need(4096, 2)["logits"] == 2 * 32_000 * 4096
    assert need(4096, 2, follows_states=True)["logits"] - need(4096, 2)["logits"] == 2 * 32 * 4096 * 4096
    assert need(4096, 2, bytes_beside=24)["beside the masters"] == 24 * LLAMA_7B.num_parameters / 2
    assert need(64, 2, calibration_tokens=4096 * 4096)["calibration"] == 2 * 2 * 4096 * 4096 * 4096 / 2 + 12 * 16_384**2
    assert "calibration" not in need(4096, 2, calibration_tokens=64)  # less than training takes afterwards
    study = auto(batch_tokens=65_536, num_ranks=1, zero_stage=0)
    assert largest_micro_batch(GPT2, study, 1, 0, 15e9) == (32_768, False)
    assert largest_micro_batch(GPT2, study, 1, 0, 15e9, Work(distils=True)) == (16_384, False)
    assert place(auto(batch_tokens=4096), LLAMA_7B, GPU_BYTES, 8).zero_stage == 2
    assert place(auto(batch_tokens=4096), LLAMA_7B, GPU_BYTES, 8, work=Work(distils=True)).zero_stage == 3


def test_the_work_of_a_study_is_that_of_its_trials() -> None:
    trials = [(Action(finetune_tokens=100), Action(finetune_tokens=200, distill_alpha=0.5)),
              (Action(finetune_tokens=300, calibration_sequences=8),)]
    assert work_of(auto(num_trials=10, max_concurrent=4), trials) == Work(
        tokens=300 * 10 / 4, distils=True, calibration_tokens=8 * 1024)
    assert work_of(auto(), []) == Work()
    assert work_in_training([Action(distill_hidden=1.0), Action(criterion="movement")]) == Work(
        distils=True, follows_states=True, bytes_beside=8)
    assert work_in_training([Action(layer_drop=0.1)]).bytes_beside == 4
    beside = {"magnitude": 0, "gradual_magnitude": 0, "taylor": 0, "set": 0, "rigl": 4, "sr_ste": 4, "l0": 4,
              "soft_movement": 24}
    assert {criterion: work_in_training([Action(criterion=criterion)]).bytes_beside for criterion in beside} == beside


@pytest.mark.parametrize(("size", "seconds", "saved_us"), [
    (BOOKS_30M, 10, 0.61), (GPT2, 14, 3.1), (ModelSize(949_800_000, 1664, 26, 50_257), 14, 9.6)])
def test_compilation_is_repaid_about_where_it_was_measured(size: ModelSize, seconds: float, saved_us: float) -> None:
    break_even = seconds / saved_us * 1e6
    assert not repays_compilation(size, break_even / 2.5)
    assert repays_compilation(size, break_even * 2.5)


def test_the_presets_fit_one_gpu() -> None:
    for size in (GPT2, ModelSize(949_800_000, 1664, 26, 50_257)):
        assert place(auto(batch_tokens=524_288), size, GPU_BYTES, 1).zero_stage == 0


def test_activations_are_counted_per_token() -> None:
    need = rank_bytes(GPT2, num_ranks=1, zero_stage=0, dtype="bfloat16", micro_batch=MicroBatch(16_384, False))
    assert need["activations"] == 34 * 768 * 12 * 16_384
    assert need["logits"] == 4 * 2**28 + 6 * 50_257 * 768
    fp32 = rank_bytes(GPT2, num_ranks=1, zero_stage=0, dtype="float32", micro_batch=MicroBatch(16_384, False))
    assert fp32["activations"] == 2 * need["activations"]
    assert "fp32 master" not in fp32  # the weights themselves


@pytest.mark.parametrize(("stage", "per_parameter"), [(1, 2 + 2 + 13 / 4), (2, 2 + 4 / 4 + 13 / 4), (3, 6 / 4 + 13 / 4)])
def test_stages_shard_what_they_say(stage: int, per_parameter: float) -> None:
    size = ModelSize(4 * 10**9, 1, 1, 1)
    need = rank_bytes(size, num_ranks=4, zero_stage=stage, dtype="bfloat16", micro_batch=MicroBatch(1, False))
    held = sum(value for name, value in need.items() if name not in ("gathered weights", "other gradients", "logits"))
    assert held == pytest.approx(per_parameter * 4e9)


@pytest.mark.parametrize(("size", "batch_tokens", "num_gpus", "ranks", "stages"), [
    (GPT2, 16_384, 1, 1, {0}), (GPT2, 65_536, 8, 1, {0}), (LLAMA_7B, 4096, 8, 2, {2, 3}), (LLAMA_7B, 4096, 2, 2, {2, 3}),
    (LLAMA_7B, 32_768, 8, 2, {2}), (LLAMA_70B, 32_768, 64, 32, {3})])
def test_the_smallest_gang_that_fits(size: ModelSize, batch_tokens: int, num_gpus: int, ranks: int,
                                     stages: set[int]) -> None:
    found = place(auto(batch_tokens=batch_tokens), size, GPU_BYTES, num_gpus)
    assert found.num_ranks == ranks
    assert found.zero_stage in stages
    assert "Adam moments" in found.arithmetic
    assert ("too large: 1 rank at ZeRO-0" in found.arithmetic) == (ranks > 1)


def test_the_hosts_memory_is_counted() -> None:
    assert host_bytes(LLAMA_7B, 0, "bfloat16") == host_bytes(LLAMA_7B, 2, "bfloat16") == 2 * LLAMA_7B.num_parameters
    assert host_bytes(LLAMA_7B, 3, "bfloat16") == 2 * 4 * 32_000 * 4096
    found = place(auto(batch_tokens=4096), LLAMA_7B, GPU_BYTES, 8, 12e9)
    assert (found.num_ranks, found.zero_stage) == (2, 3)
    assert "2 ranks at ZeRO-2 13.5 GB of the 12.0 GB of its host's memory" in found.arithmetic
    assert "and 1.0 GB of its host's memory while it loads or stores the model" in found.arithmetic
    with pytest.raises(ValueError, match=r"nothing fits 8 GPUs .*; 8 ranks at ZeRO-3 1\.0 GB of the 0\.5 GB of its host's"):
        place(auto(batch_tokens=16_384), LLAMA_7B, GPU_BYTES, 8, 0.5e9)


def test_what_is_given_is_kept() -> None:
    assert place(auto(num_ranks=4), LLAMA_7B, GPU_BYTES, 8).num_ranks == 4
    assert place(auto(zero_stage=3), LLAMA_7B, GPU_BYTES, 8).zero_stage == 3
    assert place(auto(gpus_per_rank=0.25, batch_tokens=4096), GPT2, GPU_BYTES, 8).num_ranks == 1


def test_ranks_divide_the_batch() -> None:
    with pytest.raises(ValueError, match=r"nothing fits 8 GPUs .* 1 rank at ZeRO-0 \d+\.\d GB of 78\.7 GB usable; use more"):
        place(auto(context_tokens=1024, batch_tokens=3 * 1024), LLAMA_7B, GPU_BYTES, 8)


def test_a_given_micro_batch_divides_the_tokens_of_a_rank() -> None:
    with pytest.raises(ValueError, match=r"nothing fits 8 GPUs .* 1 rank at ZeRO-0"):
        place(auto(batch_tokens=4096, micro_batch_tokens=4096), LLAMA_7B, GPU_BYTES, 8)


def test_nothing_fits_is_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"num_ranks and zero_stage: nothing fits 2 GPUs of 85\.5 GB for 68,977 M parameters "
                                         r"in bfloat16; 2 ranks at ZeRO-3 \d+\.\d GB of") as error:
        place(auto(), LLAMA_70B, GPU_BYTES, 2)
    assert "\n" not in str(error.value)

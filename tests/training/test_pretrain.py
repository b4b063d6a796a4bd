"""Pretraining: presets, refusals, and real runs of Ray Train + DeepSpeed on a small text."""

import dataclasses
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import raysearch.training.pretrain as module
from raysearch.study.records import hash_json
from raysearch.training.data import Blocks
from raysearch.training.presets import PRESETS, Preset
from raysearch.training.pretrain import _fingerprint, memory_needed, pretrain
from raysearch.training.texts import Texts

TOY = Preset(num_layers=1, width=32, num_heads=2, context_tokens=16, vocab_size=300, batch_tokens=128, num_steps=60,
             learning_rate=1e-2, weight_decay=0.1, note="for tests")


@dataclasses.dataclass(frozen=True)
class BlocksThatKillOnce(Blocks):
    """Ends its process at its 41st batch, once."""

    marker: Path

    def stream(self, start: int, num_sequences: int, seed: int) -> torch.Tensor:
        if start >= 40 * 8 and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().stream(start, num_sequences, seed)

    def __reduce__(self) -> tuple[type, tuple[Path, str, Path]]:  # type: ignore[override]
        return BlocksThatKillOnce, (self.path, self.fingerprint, self.marker)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Preset:
    monkeypatch.setitem(PRESETS, "toy", TOY)
    return TOY


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A language of two rules: an animal is followed by its own verb, a verb by any animal."""
    rng = np.random.RandomState(0)
    verbs = {"dog": "barks", "cat": "purrs", "owl": "hoots", "bee": "hums", "cow": "moos", "pig": "grunts"}
    animals = list(verbs)
    text = "\n\n".join(" ".join(f"{a} {verbs[a]}" for a in rng.choice(animals, 40)) for _ in range(200))
    path = tmp_path_factory.mktemp("corpus") / "animals.txt"
    path.write_text(text)
    return str(path)


def test_bad_input_is_refused_in_one_sentence(tmp_path: Path, corpus: str, toy: Preset) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.doc").write_text("x")
    for arguments, sentence in [
        (("tyni", corpus, tmp_path / "m"), "preset must be one of tiny, books-30m, gpt2-small, gpt-efficio-950m, toy"),
        (("toy", str(tmp_path / "none.txt"), tmp_path / "m"), "no such file or folder"),
        (("toy", corpus, tmp_path / "file"), "is a file; give a directory with --out"),
        (("toy", corpus, tmp_path / "other"), r"holds something else \(thesis.doc\); give a new or empty directory"),
    ]:
        with pytest.raises(ValueError, match=sentence) as error:
            pretrain(*arguments)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="num_workers must divide the 8 sequences of a batch, got 3"):
        pretrain("toy", corpus, tmp_path / "m", num_workers=3)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        pretrain("toy", corpus, tmp_path / "m", steps=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "other"]


def test_pretrain_learns_writes_a_hugging_face_folder_and_is_done_once(
    tmp_path: Path, corpus: str, toy: Preset, cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setenv("RAYSEARCH_CACHE", str(tmp_path / "cache"))
    plain = pretrain("toy", corpus, tmp_path / "plain", echo=lines.append)
    assert plain.validation_loss < plain.unigram_loss - 0.5
    assert any(line.startswith("step 60/60  loss ") and "tokens/s" in line and "s left" in line for line in lines)
    assert not list(tmp_path.glob(".plain*"))

    model = AutoModelForCausalLM.from_pretrained(plain.path)
    tokenizer = AutoTokenizer.from_pretrained(plain.path)
    assert sum(p.numel() for p in model.parameters()) == plain.num_parameters
    dog = model(**tokenizer("cat purrs dog", return_tensors="pt")).logits[0, -1].argmax()
    assert " barks".startswith(tokenizer.decode(dog))

    monkeypatch.setattr(module, "fit", None)  # a second call trains nothing
    assert pretrain("toy", corpus, tmp_path / "plain", echo=lines.append) == plain
    with pytest.raises(ValueError, match=r"holds a model made with other settings \(num_steps\)"):
        pretrain("toy", corpus, tmp_path / "plain", steps=61)
    (plain.path / "model.safetensors").write_bytes(b"flipped")
    with pytest.raises(ValueError, match=r"model\.safetensors is not the file that was written"):
        pretrain("toy", corpus, tmp_path / "plain")


@pytest.mark.slow
def test_a_killed_worker_resumes_and_two_ranks_train_the_same_model(
    tmp_path: Path, corpus: str, toy: Preset, cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYSEARCH_CACHE", str(tmp_path / "cache"))
    plain = pretrain("toy", corpus, tmp_path / "plain")
    pack, marker = module.pack, tmp_path / "killed"

    def killing_pack(documents: list[str], tokenizer: PreTrainedTokenizerBase, context: int, split: str, **say: Any) -> Blocks:
        blocks = pack(documents, tokenizer, context, split, **say)
        return BlocksThatKillOnce(blocks.path, blocks.fingerprint, marker) if split == "train" else blocks

    monkeypatch.setattr(module, "pack", killing_pack)
    sharded = pretrain("toy", corpus, tmp_path / "sharded", num_workers=2, zero_stage=2, checkpoint_every_s=0.0)
    assert marker.exists()
    assert sharded.validation_loss == pytest.approx(plain.validation_loss, abs=1e-4)


@pytest.mark.slow
def test_divergence_is_one_sentence_and_leaves_no_model(
    tmp_path: Path, corpus: str, monkeypatch: pytest.MonkeyPatch, cluster: None
) -> None:
    monkeypatch.setitem(PRESETS, "hot", dataclasses.replace(TOY, learning_rate=1e30))
    with pytest.raises(ValueError, match=r"^pretraining failed: the loss became (nan|inf) by step \d+; lower the "):
        pretrain("hot", corpus, tmp_path / "hot", steps=20, echo=lambda line: None)
    assert not (tmp_path / "hot").exists()


def test_what_a_machine_needs_is_said_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raysearch.training.pretrain_worker.memory_bytes", lambda: 12e9)  # half of 24 GB

    def line(name: str, dtype: str = "float32") -> str:
        return memory_needed(PRESETS[name], {"dtype": dtype, "zero_stage": 0, "batch_tokens": PRESETS[name].batch_tokens}, 1)

    assert re.match(r"each of 1 ranks needs about 7\.\d+ GB of memory, 16384 tokens at a time, and [\d.]+ .B are free here",
                    line("books-30m"))
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=12e9))
    assert "MORE than there is" in line("gpt-efficio-950m")
    assert "MORE" not in line("tiny")
    monkeypatch.setattr("raysearch.training.pretrain_worker.memory_bytes", lambda: 80e9)
    assert line("gpt2-small", "bfloat16").endswith(" GB of memory, 65536 tokens at a time, on its GPU")


def test_a_corpus_is_known_by_the_json_of_its_splits() -> None:
    """As it stands in the records of models that were trained before."""
    splits = {name: Texts.of((text, True) for text in texts)
              for name, texts in (("train", ["a \u2019\n", "b"]), ("selection", ["\U0001f600"]), ("report", ["c"]))}
    assert _fingerprint(splits) == hash_json({name: list(texts) for name, texts in splits.items()})

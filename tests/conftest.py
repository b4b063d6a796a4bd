"""Small real things that several tests share."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest
import torch
import transformers
from commands import run  # noqa: F401  a fixture for all folders
from hypothesis import settings
from s3 import anywhere, refused_writes, refusing_store, s3, store  # noqa: F401
from tiny_models import story
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import raysearch.study.files
from raysearch.config import Study, study_of
from raysearch.study.ledger import Ledger
from raysearch.trial.inputs import read_inputs, resolve
from raysearch.trial.worker import Worker

torch.set_num_threads(1)
transformers.logging.disable_progress_bar()
settings.register_profile("raysearch", deadline=None)  # a loaded machine takes seconds for what takes milliseconds
settings.load_profile("raysearch")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


def save_tiny_gpt2(folder: Path, *, width: int = 32, num_layers: int = 2, seed: int = 0) -> Path:
    """A random GPT-2 of 256 byte tokens and <|endoftext|>, with its tokenizer, as a Hugging Face folder."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(["<|endoftext|>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=len(vocab), n_positions=64, n_embd=width, n_layer=num_layers, n_head=2,
                        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def train(folder: Path, text: str, num_steps: int = 150) -> None:
    """A few seconds of plain training, so that the model is better than chance."""
    model = GPT2LMHeadModel.from_pretrained(folder)
    tokens = torch.tensor(PreTrainedTokenizerFast.from_pretrained(folder)(text)["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(num_steps):
        starts = torch.randint(len(tokens) - 64, (8,), generator=generator)
        batch = torch.stack([tokens[start:start + 64] for start in starts])
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


@pytest.fixture(scope="session")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 documents in a .txt corpus."""
    corpus = tmp_path_factory.mktemp("corpus") / "stories.txt"
    corpus.write_text("\n<|endoftext|>\n".join(map(story, range(90))))
    return corpus


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, stories: Path) -> Path:
    """A GPT-2 of 2 layers and width 32 that has read the stories for a few seconds."""
    folder = save_tiny_gpt2(tmp_path_factory.mktemp("model") / "tiny")
    train(folder, stories.read_text())
    return folder


@pytest.fixture(scope="session")
def study(tiny_model: Path, stories: Path) -> Study:
    return resolve(study_of(path=str(tiny_model), corpus=str(stories), context_tokens=64, batch_tokens=256,
                            epoch_tokens=64 * 16, num_items=6, tasks=("text", "last_word")))


@pytest.fixture(scope="session")
def worker(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Worker:
    """A workbench on one rank in this process."""
    return Worker(study, Ledger(tmp_path_factory.mktemp("study")), read_inputs(study))


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused write is tried again after half a second."""
    monkeypatch.setattr(raysearch.study.files, "WRITE_RETRY_S", 0.5)


@pytest.fixture
def apart(worker: Worker, tmp_path: Path) -> Worker:
    """The shared workbench on a study directory of its own."""
    ledger = worker.ledger
    worker.ledger, worker.loaded_key = Ledger(tmp_path / "study"), None
    yield worker
    worker.ledger, worker.loaded_key = ledger, None

"""Documents, splits, tokenizer and packed blocks, on small real files."""

import io
import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import raysearch.training.data
import raysearch.training.texts
from raysearch.study.files import default_cache_dir
from raysearch.training.corpus import load_documents
from raysearch.training.data import Blocks, check_tokenizer, pack, split_documents, train_tokenizer
from raysearch.training.texts import Texts

WORDS = ("the cat sat on a mat and the dog ran to a red house by the sea while rain fell").split()  # noqa: SIM905


def story(seed: int, num_words: int = 60) -> str:
    return " ".join(np.random.RandomState(seed).choice(WORDS, num_words)) + f" {seed}."


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([story(i) for i in range(50)], 300)


def texts(documents: list[str]) -> Texts:
    return Texts.of((document, True) for document in documents)


def split(corpus: str | Path, name: str = "train") -> Texts:
    return split_documents(load_documents(str(corpus)))[name]


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    path = tmp_path / "stories.txt"
    path.write_text("\n<|endoftext|>\n".join(story(i) for i in range(200)))
    return str(path)


def test_splits_are_disjoint_stable_and_of_the_promised_sizes() -> None:
    documents = [story(i) for i in range(2000)] + [story(7)] * 3
    splits = split_documents(texts(documents))
    sets = {split: set(texts) for split, texts in splits.items()}
    assert sum(map(len, splits.values())) == 2003
    assert sum(map(len, sets.values())) == 2000 == len(set.union(*sets.values()))
    assert 60 < len(splits["selection"]) < 140
    assert 60 < len(splits["report"]) < 140
    fewer = split_documents(texts(documents[:1000]))
    assert all(set(fewer[split]) <= sets[split] for split in splits)  # a document never changes its split


@pytest.mark.parametrize("num_documents", [1, 3, 59])
def test_a_few_long_documents_are_cut_at_paragraphs(num_documents: int) -> None:
    paragraphs = [story(i, 100) for i in range(600)]
    documents = ["\n\n".join(part) for part in np.array_split(paragraphs, num_documents)]
    splits = split_documents(texts(documents))
    assert all(splits.values())
    pieces = [piece for texts in splits.values() for piece in texts]
    assert max(map(len, pieces)) <= 4000
    assert sum(map(len, pieces)) == sum(map(len, documents))
    assert all(piece.rstrip()[-1] == "." for piece in pieces)


def test_tiny_corpora_fill_all_splits_or_are_refused() -> None:
    for num in range(3, 12):
        assert all(split_documents(texts([f"passage {i}" for i in range(num)])).values())
    with pytest.raises(ValueError, match="each of train, selection and report, got 1"):
        split_documents(texts(["one short text"] * 5))


def test_tokenizer_is_lossless_deterministic_and_checked(tokenizer: PreTrainedTokenizerFast) -> None:
    again = train_tokenizer([story(i) for i in range(50)], 300)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert (len(tokenizer), tokenizer.eos_token_id) == (300, 0)
    text = "Ünïcode \n\ttabs 😀 the cat"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    check_tokenizer(tokenizer, 300)
    with pytest.raises(ValueError, match="vocabulary of 299, but its largest id is 299"):
        check_tokenizer(tokenizer, 299)
    with pytest.raises(ValueError, match="must have an end-of-text token"):
        check_tokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer), 300)
    with pytest.raises(ValueError, match="vocab_size must be above 256"):
        train_tokenizer(["a"], 256)


def test_blocks_hold_the_split_in_order(corpus: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    blocks = pack(split(corpus), tokenizer, 16, "train", tmp_path / "cache")
    documents = split(corpus)
    stream = [token for text in documents for token in [*tokenizer(text)["input_ids"], 0]]
    assert blocks.tokens.dtype == np.uint16
    assert isinstance(blocks.tokens, np.memmap)
    assert blocks.tokens.flatten().tolist() == stream[: len(stream) // 16 * 16]
    assert blocks.num_tokens == blocks.tokens.size
    batch = blocks.batch([3, 0])
    assert (batch.dtype, batch.shape) == (torch.int64, (2, 16))
    assert batch[1].tolist() == stream[:16]
    copy = pickle.loads(pickle.dumps(blocks))
    assert copy == blocks
    assert copy.tokens.tolist() == blocks.tokens.tolist()


def unigram() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.train_from_iterator([story(i) for i in range(50)], trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<unk>", "<|endoftext|>"], unk_token="<unk>", show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def with_a_space_before() -> PreTrainedTokenizerFast:
    """As Llama 2: a text is never the sum of its parts."""
    tokenizer = train_tokenizer([story(i) for i in range(50)], 300)
    tokenizer.backend_tokenizer.normalizer = normalizers.Prepend("_")
    return tokenizer


def over_spaces() -> PreTrainedTokenizerFast:
    """Whose tokens hold spaces: no cut before a word is one between tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.train_from_iterator([story(i) for i in range(50)], trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


@pytest.mark.parametrize(("make", "is_cut"), [
    (lambda: train_tokenizer([story(i) for i in range(50)], 300), True), (unigram, True), (with_a_space_before, False),
    (over_spaces, None)])
def test_a_long_document_has_the_tokens_of_the_whole(make: Callable[[], PreTrainedTokenizerFast], is_cut: bool | None,
                                                     tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raysearch.training.texts, "PART_BYTES", 1500)
    monkeypatch.setattr(raysearch.training.data, "CUT_CHARS", 200)
    random = np.random.RandomState(0)
    gaps = (" ", " ", "\n", "  ", "\n\n", "<|endoftext|>", "\u2019 ", "\U0001f600", "\u4e2d" * 300, "\t \n")
    document = "".join(str(random.choice(WORDS)) + str(random.choice(gaps)) for _ in range(5000))
    tokenizer, documents = make(), texts([document, "short", document[::-1]])
    parts = list(raysearch.training.data._parts(documents, tokenizer))
    assert "".join(part for part, _ in parts) == "".join(documents)
    assert is_cut is None or (len(parts) > 50) == is_cut
    whole = [token for text in documents for token in [*tokenizer(text, add_special_tokens=False)["input_ids"],
                                                       tokenizer.eos_token_id]]
    blocks = pack(documents, tokenizer, 1, "train", tmp_path)
    assert blocks.tokens.flatten().tolist() == whole
    assert blocks.path.read_bytes() == saved(blocks.tokens)


def saved(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def test_blocks_are_cached_by_content(corpus: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = pack(split(corpus), tokenizer, 16, "train", cache)
    written = first.path.stat().st_mtime_ns
    moved = tmp_path / "elsewhere.txt"
    Path(corpus).rename(moved)
    assert pack(split(moved), tokenizer, 16, "train", cache) == first
    assert first.path.stat().st_mtime_ns == written
    moved.write_text(moved.read_text() + "\n<|endoftext|>\nOne more.")
    prints = {first.fingerprint, pack(split(moved), tokenizer, 16, "train", cache).fingerprint,
              pack(split(moved), tokenizer, 32, "train", cache).fingerprint,
              pack(split(moved, "report"), tokenizer, 32, "report", cache).fingerprint,
              pack(split(moved), train_tokenizer([story(1)], 290), 32, "train", cache).fingerprint}
    assert len(prints) == 5
    assert not list(cache.rglob(".*"))
    with pytest.raises(ValueError, match="report split must fill one block of 100000 tokens, got"):
        pack(split(moved, "report"), tokenizer, 100_000, "report", cache)


def _pack(arguments: tuple[str, PreTrainedTokenizerFast, Path]) -> str:
    corpus, tokenizer, cache = arguments
    return str(pack(split(corpus), tokenizer, 16, "train", cache).path)


def test_two_processes_may_pack_at_once(corpus: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(2) as pool:
        paths = pool.map(_pack, [(corpus, tokenizer, tmp_path / "cache")] * 2, chunksize=1)
    assert len(set(paths)) == 1
    assert len(list((tmp_path / "cache" / "blocks").iterdir())) == 1


def test_order_is_a_permutation_that_never_changes(tmp_path: Path) -> None:
    np.save(tmp_path / "blocks.npy", np.arange(20, dtype=np.uint16).reshape(10, 2))
    blocks = Blocks(tmp_path / "blocks.npy", "f")
    assert sorted(blocks.order(0, 0).tolist()) == list(range(10))
    assert blocks.order(0, 0).tolist() == [6, 1, 0, 5, 3, 8, 7, 9, 2, 4]  # stays so on every machine and numpy
    assert len({tuple(blocks.order(seed, epoch).tolist()) for seed in range(3) for epoch in range(3)}) == 9
    epochs = [*blocks.order(5, 0), *blocks.order(5, 1)]
    assert blocks.stream(8, 4, seed=5).tolist() == blocks.batch(epochs[8:12]).tolist()


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAYSEARCH_CACHE", raising=False)
    assert default_cache_dir() == Path.home() / ".cache" / "raysearch"
    monkeypatch.setenv("RAYSEARCH_CACHE", "/somewhere")
    assert default_cache_dir() == Path("/somewhere")

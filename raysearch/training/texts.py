"""Documents in one piece of memory, and cut into pieces."""

import codecs
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raysearch.training.chats import MARK

PART_BYTES = 2**16
"""About what is decoded at a time of a document that may be long."""

Part = tuple[str, bool]
"""Part of a document, and whether the document ends with it."""


@dataclass(frozen=True)
class Texts(Sequence[str]):
    """Documents as UTF-8, end to end: Python's str takes four bytes for each character of a text that holds one emoji."""

    utf8: bytearray
    spans: NDArray[np.int64]
    """[num_documents, 2], first byte and end"""

    @classmethod
    def of(cls, parts: Iterable[Part]) -> "Texts":
        """Without those that are blank. What JSON can spell, but is no character, becomes a question mark."""
        utf8, ends, is_blank = bytearray(), [0], True
        for part, is_last in parts:
            utf8 += part.encode("utf-8", "replace")
            is_blank = is_blank and not part.strip()
            if is_last:
                if is_blank:
                    del utf8[ends[-1]:]
                else:
                    ends.append(len(utf8))
                is_blank = True
        return cls(utf8, np.array([ends[:-1], ends[1:]], dtype=np.int64).T)

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]  # Sequence's overloads; documents have no slices
        start, end = self.spans[index]
        return self.utf8[start:end].decode()

    @property
    def num_bytes(self) -> int:
        return int((self.spans[:, 1] - self.spans[:, 0]).sum())

    def all_bytes(self) -> Iterator[bytearray]:
        return (self.utf8[start:end] for start, end in zip(*self.spans.T.tolist()))

    def parts(self, index: int) -> Iterator[str]:
        """The document in parts of PART_BYTES, which a short one is itself."""
        start, end = self.spans[index].tolist()
        if end - start <= PART_BYTES:
            return iter((self[index],))
        return codecs.iterdecode((self.utf8[at:min(at + PART_BYTES, end)] for at in range(start, end, PART_BYTES)), "utf-8")

    def is_chat(self, index: int) -> bool:
        return self.utf8.startswith(MARK.encode(), self.spans[index, 0])

    @property
    def holds_chats(self) -> bool:
        return any(map(self.is_chat, range(len(self))))

    def where(self, is_chosen: NDArray[np.bool_]) -> "Texts":
        return Texts(self.utf8, self.spans[is_chosen])

    def pieces(self, num_chars: int) -> "Texts":
        """The documents in pieces of at most `num_chars`, that end with a paragraph, else a line, else a word; none blank.
        Chats stay whole."""
        spans = []
        for index in range(len(self)):
            start = self.spans[index, 0]
            for piece in (self[index],) if self.is_chat(index) else _pieces(self.parts(index), num_chars):
                end = start + len(piece.encode())
                if piece.strip():
                    spans.append((start, end))
                start = end
        return Texts(self.utf8, np.array(spans, dtype=np.int64).reshape(-1, 2))


def _pieces(parts: Iterable[str], num_chars: int) -> Iterator[str]:
    rest, middle = "", num_chars // 2
    for part in parts:
        text, start = rest + part, 0
        while len(text) - start > num_chars:
            low, high = start + middle, start + num_chars
            ends = (text.rfind(mark, low, high - len(mark)) + len(mark) for mark in ("\n\n", "\n", " "))
            end = next((end for end in ends if end > low), high)
            yield text[start:end]
            start = end
        rest = text[start:]
    yield rest

"""Long pieces of known texts: eight words in a row, or forty letters and digits however they are spaced.

An index holds 64-bit hashes and no text: 100,000 problems take some ten million of them (80 MB). A piece that many
texts share ("find the smallest positive integer n such that") is the wording of a kind, and tells nothing of one.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from espl_train.evolution.guards.writing import words

WORDS = 8
LETTERS, STRIDE = 40, 8      # blocks of letters begin at every eighth one: 47 in a row surely hold a block
SHARED, SHARED_PART = 3, 1 / 500     # a piece of more texts than that (the larger bound) is the wording of a kind
LONGEST = 20_000             # characters of one text that are looked at
SHIFT = np.uint64(0x110000)          # codes of letters are none of words
ODD = np.uint64(0x9E3779B97F4A7C15)
WEIGHTS = np.cumprod(np.full(LETTERS, ODD))      # a window in another order is another one


class Passages:
    """An index of texts. Texts that are added later are merged in when somebody asks."""

    def __init__(self) -> None:
        self._count = 0
        self._fresh: list[np.ndarray] = []
        self._known = np.empty(0, np.uint64)
        self._shares = np.empty(0, np.int64)

    def add(self, text: str) -> None:
        """Remember the pieces of a text."""
        spoken = words(text[:LONGEST])
        pieces = np.concatenate([_by_words(spoken), _by_letters(spoken, STRIDE)])
        self._count += 1
        if len(pieces):
            self._fresh.append(np.unique(pieces))

    def find(self, text: str) -> str | None:
        """The first piece of `text` that stands in few of the known texts; None where there is none."""
        spoken = words(text[:LONGEST])
        if len(spoken) >= WORDS and len(found := self._rare(_by_words(spoken))):
            return " ".join(spoken[found[0] : found[0] + WORDS])
        if len(found := self._rare(_by_letters(spoken, 1))):
            return "".join(spoken)[found[0] : found[0] + LETTERS]
        return None

    def _rare(self, pieces: np.ndarray) -> np.ndarray:
        """The places of the pieces that are known from few texts."""
        self._merge()
        if not len(self._known) or not len(pieces):
            return np.empty(0, np.int64)
        at = np.minimum(np.searchsorted(self._known, pieces), len(self._known) - 1)
        bound = max(SHARED, SHARED_PART * self._count)
        return np.flatnonzero((self._known[at] == pieces) & (self._shares[at] <= bound))

    def _merge(self) -> None:
        if not self._fresh:
            return
        every = np.concatenate([self._known, *self._fresh])
        weight = np.concatenate([self._shares, np.ones(len(every) - len(self._known), np.int64)])
        self._known, inverse = np.unique(every, return_inverse=True)
        self._shares = np.bincount(inverse, weight).astype(np.int64)
        self._fresh = []


def _by_words(spoken: Sequence[str]) -> np.ndarray:
    return _hashed(np.array([zlib.crc32(word.encode()) for word in spoken], np.uint64), WORDS, 1)


def _by_letters(spoken: Sequence[str], stride: int) -> np.ndarray:
    codes = np.frombuffer("".join(spoken).encode("utf-32-le", "surrogatepass"), np.uint32)
    return _hashed(codes.astype(np.uint64) + SHIFT, LETTERS, stride)


def _hashed(codes: np.ndarray, size: int, stride: int) -> np.ndarray:
    """A hash of every `stride`-th window of `size` codes: (windows,) uint64, wrapping arithmetic."""
    if len(codes) < size:
        return np.empty(0, np.uint64)
    mixed = codes * ODD
    mixed ^= mixed >> np.uint64(29)
    total: np.ndarray = (sliding_window_view(mixed, size)[::stride] * WEIGHTS[:size]).sum(axis=1, dtype=np.uint64)
    return total ^ (total >> np.uint64(31))

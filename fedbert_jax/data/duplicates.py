"""Finds repeated text: whole paragraphs, and windows of tokens, that came before anywhere in the run."""

from __future__ import annotations

import hashlib
import itertools
import re
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from fedbert_jax.data.repeats import repeated
from fedbert_jax.data.words import count_words

WINDOW = 32  # tokens, a power of two; text that shares this many in a row with earlier text repeats it
_LONG = 1_000_000  # characters of a long paragraph
_CHUNK = 1 << 20  # tokens that are hashed together
_BETWEEN = re.compile(r"\n\s*\n")  # paragraphs


class Paragraphs:
    """What is known of the paragraphs (separated by blank lines) of D documents: a hash and the words of each.

    Paragraphs are compared without case and with each run of whitespace as one space.
    """

    def __init__(self) -> None:
        self._hashes = array("Q")  # of 64 bits: of 10 million paragraphs, none collide in practice
        self._words = array("Q")
        self._ends = array("Q")  # where each document's paragraphs end

    def add(self, text: str) -> None:
        """Adds the paragraphs of the next document."""
        for paragraph in _BETWEEN.split(text):
            key = _spaced_alike(paragraph.lower()).encode()
            digest = hashlib.blake2b(key, digest_size=8).digest() if key else bytes(8)  # 0: nothing to repeat
            self._hashes.append(int.from_bytes(digest, "little"))
            self._words.append(count_words(paragraph))
        self._ends.append(len(self._hashes))

    @property
    def words(self) -> np.ndarray:
        """The words of each document, int64 [D]."""
        return np.diff(_sums(np.frombuffer(self._words, np.uint64), np.frombuffer(self._ends, np.uint64)))

    def repeats(self, chosen: np.ndarray, groups: np.ndarray | None, directory: Path) -> Repeats:
        """Finds the paragraphs that came before in any of the chosen documents, or in one of the same group.

        Args:
          chosen: bool [D], the documents that take part.
          groups: integers [D]; None: all are of one.
          directory: see `repeated`.
        """
        hashes, ends = np.frombuffer(self._hashes, np.uint64), np.frombuffer(self._ends, np.uint64).astype(np.int64)
        counts = np.diff(ends, prepend=0)
        where = np.flatnonzero(np.repeat(chosen, counts) & (hashes != 0))
        if groups is not None:
            owner = np.repeat(groups.astype(np.uint64), counts)

        def chunks() -> Iterator[np.ndarray]:
            for start in range(0, len(where), _CHUNK):
                part = where[start : start + _CHUNK]
                yield hashes[part] if groups is None else of_groups(hashes[part], owner[part])

        gone, done = np.zeros(len(hashes), bool), 0
        for found in repeated(chunks, len(where), directory):
            gone[where[done : done + len(found)]] = found
            done += len(found)
        words = np.frombuffer(self._words, np.uint64)
        dropped, number = np.diff(_sums(words * gone, ends)), np.diff(_sums(gone, ends))
        return Repeats(gone, ends, self.words - dropped, dropped, number > 0)


def _sums(values: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Returns the sum of all values before each end, and 0 before, int64 [D + 1]."""
    return np.concatenate([[0], np.cumsum(values, dtype=np.int64)])[np.concatenate([[0], ends.astype(np.int64)])]


class Repeats:
    """Which paragraphs are left out of D documents, and what that leaves of each."""

    def __init__(
        self, gone: np.ndarray, ends: np.ndarray, words: np.ndarray, dropped: np.ndarray, changed: np.ndarray
    ) -> None:
        self.words = words  # int64 [D], what is left
        self.dropped = dropped  # int64 [D], what is left out
        self._gone, self._ends, self._changed = gone, ends, changed

    def left(self, document: int, text: str) -> str:
        """Returns what is left of a document's text."""
        if not self._changed[document]:
            return text
        start = self._ends[document - 1] if document else 0
        gone = self._gone[start : self._ends[document]].tolist()
        return "\n\n".join(paragraph for paragraph, out in zip(_BETWEEN.split(text), gone, strict=True) if not out)


def _spaced_alike(text: str) -> str:
    if len(text) > _LONG:  # slower, but without a list of all its words
        return re.sub(r"\s+", " ", text).strip()
    return " ".join(text.split())


class Tokens(Protocol):
    """Token ids of which a slice can be taken: an array, or a file's."""

    def __getitem__(self, part: slice, /) -> np.ndarray:
        """Returns some of them, [n]."""


def kept_spans(
    tokens: Tokens, ends: np.ndarray, directory: Path | None = None, groups: np.ndarray | None = None
) -> np.ndarray:
    """Finds what is left of documents without the windows of `WINDOW` tokens that came before in any of the same group.

    Every token in such a window is dropped, so no window is left twice. The document is cut there, and what lies between
    two cuts, or between a cut and an end of the document, is dropped, too, if it is shorter than a window: so short a piece
    of a near-duplicate is not a text of its own. Text that repeats itself, like a long line of dashes, is mostly dropped.

    In memory are, at a time, the documents that begin within `_CHUNK` tokens, what `repeated` sorts, and the result.

    Args:
      tokens: integers [n], all documents one after another.
      ends: int64 [D], where each document ends.
      directory: see `repeated`; its files take up to 9 bytes a token.
      groups: integers [D], each document's group; None: all are of one.

    Returns:
      int64 [S, 3], in order: a span's document, its first token, and the token after its last.
    """
    starts = ends - np.diff(ends, prepend=0)
    edges = np.flatnonzero(np.diff(starts // _CHUNK, prepend=-1))
    chunks = list(itertools.pairwise([*edges.tolist(), len(ends)]))  # of documents

    def hashes() -> Iterator[np.ndarray]:
        for low, high in chunks:
            part = tokens[int(starts[low]) : int(ends[high - 1])]
            lengths = ends[low:high] - starts[low:high]
            found = _hash_windows(part)[_whole_windows(lengths)]
            if groups is not None:
                found = of_groups(found, np.repeat(groups[low:high], np.maximum(lengths - WINDOW + 1, 0)))
            yield found

    windows = int(np.maximum(ends - starts - WINDOW + 1, 0).sum())
    spans = [np.zeros((0, 3), np.int64)]
    for (low, high), again in zip(chunks, repeated(hashes, windows, directory), strict=True):
        first = starts[low]
        kept = _kept(again, starts[low:high] - first, ends[low:high] - first)
        spans.append(kept + np.array([low, first, first]))
    return np.concatenate(spans)


def _kept(again: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Returns the spans of some documents, int64 [S, 3], given which of their windows came before."""
    dropped = np.zeros(int(ends[-1]), bool)
    dropped[_whole_windows(ends - starts)] = again
    size = 1
    while size < WINDOW:  # marks all tokens of each window, not only its first
        dropped[size:] |= dropped[:-size]
        size *= 2
    # Spans end where documents do, and where dropped text begins or ends.
    edges = np.unique(np.concatenate([starts, np.flatnonzero(dropped[1:] != dropped[:-1]) + 1, ends]))
    first, last = edges[:-1], edges[1:]
    document = np.searchsorted(ends, first, side="right")
    whole = (first == starts[document]) & (last == ends[document])
    kept = ~dropped[first] & (whole | (last - first >= WINDOW))
    return np.stack([document, first, last], axis=1)[kept]


def _whole_windows(lengths: np.ndarray) -> np.ndarray:
    """Returns bool [n], true where a window begins that ends within its document."""
    windows = np.maximum(lengths - WINDOW + 1, 0)
    return np.repeat(np.tile([True, False], len(lengths)), np.stack([windows, lengths - windows], axis=1).ravel())


def of_groups(hashes: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Returns other hashes, uint64 [n], of which equal ones of different groups are no longer equal."""
    return _mix(hashes + groups.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def _hash_windows(tokens: np.ndarray) -> np.ndarray:
    """Returns a hash of the window that begins at each token, uint64 [n]; 0 at the last `WINDOW` - 1 tokens."""
    hashes = np.zeros(len(tokens), np.uint64)
    for start in range(0, len(tokens) - WINDOW + 1, _CHUNK):
        # A sum of the window's scrambled tokens, each times an odd number of its place's own; of one token, two, four, ...
        part = _mix(tokens[start : start + _CHUNK + WINDOW - 1].astype(np.uint64))
        size = 1
        while size < WINDOW:
            factor = np.uint64((0x9E3779B97F4A7C15 * (2 * size + 1)) % 2**64)
            part = part[:-size] * factor + part[size:]
            size *= 2
        part = _mix(part)
        hashes[start : start + len(part)] = part
    return hashes


def _mix(x: np.ndarray) -> np.ndarray:
    """Scrambles 64-bit numbers one to one (SplitMix64, Steele et al. 2014), so that sums of them are no longer alike."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

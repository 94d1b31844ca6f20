"""Finds repeated text: whole paragraphs, and windows of tokens, that came before anywhere in the run."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator

import numpy as np

WINDOW = 32  # tokens, a power of two; text that shares this many in a row with earlier text repeats it
_LONG = 1_000_000  # characters of a long paragraph
_CHUNK = 1 << 20  # tokens that are hashed together
_SORTED = 1 << 23  # windows that are sorted together


def drop_repeated_paragraphs(texts: Iterable[str], groups: Iterable[str] | None = None) -> Iterator[str]:
    """Yields the texts without the paragraphs (separated by blank lines) that came before, in any text of the same group.

    Paragraphs are compared without case and with each run of whitespace as one space. A text that repeats nothing is yielded
    as it is; one that repeats everything is left empty.

    Args:
      texts: the documents' texts.
      groups: each text's group; None: all are of one.
    """
    seen_of: dict[str, set[int]] = {}  # 8-byte hashes: 10M paragraphs fit in memory, and none collide in practice
    for text, group in zip(texts, itertools.repeat("") if groups is None else groups, strict=False):
        seen = seen_of.setdefault(group, set())
        kept = []
        paragraphs = re.split(r"\n\s*\n", text)
        for paragraph in paragraphs:
            key = _spaced_alike(paragraph.lower()).encode()
            digest = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
            if digest not in seen or not key:
                seen.add(digest)
                kept.append(paragraph)
        yield text if len(kept) == len(paragraphs) else "\n\n".join(kept)


def _spaced_alike(text: str) -> str:
    if len(text) > _LONG:  # slower, but without a list of all its words
        return re.sub(r"\s+", " ", text).strip()
    return " ".join(text.split())


def kept_spans(tokens: np.ndarray, ends: np.ndarray, groups: np.ndarray | None = None) -> np.ndarray:
    """Finds what is left of documents without the windows of `WINDOW` tokens that came before in any of the same group.

    Every token in such a window is dropped, so no window is left twice. The document is cut there, and what lies between
    two cuts, or between a cut and an end of the document, is dropped, too, if it is shorter than a window: so short a piece
    of a near-duplicate is not a text of its own. Text that repeats itself, like a long line of dashes, is mostly dropped.

    This takes 11 bytes of memory per token (a hash of the window that begins there, and masks), and a quarter of a gigabyte
    for sorting.

    Args:
      tokens: integers [n], all documents one after another; may be a memmap.
      ends: int64 [D], where each document ends.
      groups: integers [D], each document's group; None: all are of one.

    Returns:
      int64 [S, 3], in order: a span's document, its first token, and the token after its last.
    """
    starts = ends - np.diff(ends, prepend=0)
    hashes = _hash_windows(tokens)
    if groups is not None:  # equal windows of different groups are no longer equal
        hashes = _mix(hashes + np.repeat(groups.astype(np.uint64), ends - starts) * np.uint64(0x9E3779B97F4A7C15))
    dropped = _first_tokens_of_repeats(hashes, starts, ends)
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


def _hash_windows(tokens: np.ndarray) -> np.ndarray:
    """Returns a hash of the window that begins at each token, uint64 [n]; 0 at the last `WINDOW` - 1 tokens."""
    hashes = np.zeros(len(tokens), np.uint64)
    for start in range(0, len(tokens) - WINDOW + 1, _CHUNK):
        # Hashes of one token, two, four, ...: each combines two halves, the first times an odd number of that size's own.
        part = _mix(tokens[start : start + _CHUNK + WINDOW - 1].astype(np.uint64))
        size = 1
        while size < WINDOW:
            factor = np.uint64((0x9E3779B97F4A7C15 * (2 * size + 1)) % 2**64)
            part = _mix(part[:-size] * factor + part[size:])
            size *= 2
        hashes[start : start + len(part)] = part
    return hashes


def _first_tokens_of_repeats(hashes: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Returns bool [n], true where a window begins that lies within one document and came before, in it or in another."""
    lengths = ends - starts
    windows = np.maximum(lengths - WINDOW + 1, 0)
    inside = np.repeat(np.tile([True, False], len(ends)), np.stack([windows, lengths - windows], axis=1).ravel())
    repeated = np.zeros(len(hashes), bool)
    parts = max(len(hashes) // _SORTED, 1)
    for part in range(parts):  # equal hashes fall into the same part
        low, high = (2**64 * k // parts for k in (part, part + 1))
        where = np.flatnonzero(inside & (hashes >= np.uint64(low)) & (hashes <= np.uint64(high - 1)))
        order = np.argsort(hashes[where], kind="stable")  # stable, so that the first of equal windows stays first
        found = hashes[where[order]]
        repeated[where[order[1:][found[1:] == found[:-1]]]] = True
    return repeated


def _mix(x: np.ndarray) -> np.ndarray:
    """Scrambles 64-bit numbers one to one (SplitMix64, Steele et al. 2014), so that sums of them are no longer alike."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

"""Finds the hashes that came before among more of them than memory holds."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np

_TOGETHER = 1 << 21  # hashes that are sorted together
_FILE = 1 << 29  # hashes that are in the file at a time, or a quarter of all if that is more
_SIEVE = 1 << 22  # a power of two


def repeated(chunks: Callable[[], Iterable[np.ndarray]], size: int, directory: Path | None) -> Iterator[np.ndarray]:
    """Yields, for each chunk of hashes, bool [n]: true where the same hash came before, in this chunk or an earlier one.

    Hashes are divided by their leading bits into buckets that fit in memory, in a file of at most `_FILE` hashes (or a
    quarter of all): with more of them, only some buckets at a time, so that chunks are asked for again.

    Args:
      chunks: called several times; gives the same chunks each time, uint64 [n] each. Equal leading bits should be as rare as
        chance makes them.
      size: how many hashes there are in all.
      directory: on the disk that the files go to; None: where temporary files go.
    """
    bits = (max(size - 1, 0) // _TOGETHER).bit_length()
    if not bits:
        yield from _at_once(list(chunks()))
        return
    buckets, rounds = 1 << bits, -(-size // max(_FILE, size // 4))
    each = -(-buckets // rounds)
    with tempfile.TemporaryFile(dir=directory) as hashes, tempfile.TemporaryFile(dir=directory) as flags:
        for low in range(0, buckets, each):
            _find(chunks, bits, range(low, min(low + each, buckets)), hashes, flags)
        flags.seek(0)
        for chunk in chunks():
            found = np.empty(len(chunk), bool)
            found[_by_bucket(chunk, bits)[0]] = np.frombuffer(flags.read(len(chunk)), bool)
            yield found


def _at_once(chunks: list[np.ndarray]) -> Iterator[np.ndarray]:
    if chunks:
        yield from np.split(_again(np.concatenate(chunks)), np.cumsum([len(chunk) for chunk in chunks])[:-1])


def _by_bucket(chunk: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the order that sorts a chunk by bucket, and keeps it within one; and where each bucket ends in it."""
    bucket = (chunk >> np.uint64(64 - bits)).astype(np.uint16)  # 16 bits are sorted by counting
    return np.argsort(bucket, kind="stable"), np.cumsum(np.bincount(bucket, minlength=1 << bits))


def _find(
    chunks: Callable[[], Iterable[np.ndarray]], bits: int, buckets: range, hashes: IO[bytes], flags: IO[bytes]
) -> None:
    """Writes the flags of some buckets; those of a chunk lie together, in the order of `_by_bucket`."""
    hashes.seek(0)
    places: list[np.ndarray] = []  # of each chunk: where each bucket's flags begin, and the last one's end
    written: list[int] = []  # where each chunk's hashes begin in the file
    start = position = 0
    for chunk in chunks():
        order, ends = _by_bucket(chunk, bits)
        begins = np.concatenate([[0], ends])[buckets.start : buckets.stop + 1]
        hashes.write(chunk[order[begins[0] : begins[-1]]].tobytes())
        places.append(start + begins)
        written.append(position)
        position += int(begins[-1] - begins[0])
        start += len(chunk)
    for bucket in range(len(buckets)):
        parts = []
        for begins, position in zip(places, written, strict=True):
            hashes.seek(8 * (position + int(begins[bucket] - begins[0])))
            parts.append(np.frombuffer(hashes.read(8 * int(begins[bucket + 1] - begins[bucket])), np.uint64))
        found = _again(np.concatenate(parts))
        done = 0
        for begins, part in zip(places, parts, strict=True):
            flags.seek(int(begins[bucket]))
            flags.write(found[done : done + len(part)].tobytes())
            done += len(part)


def _again(hashes: np.ndarray) -> np.ndarray:
    """Returns bool [n], true where an equal hash came before; most are expected to occur once."""
    found = np.zeros(len(hashes), bool)
    ordered = np.sort(hashes)  # much faster than the order that sorts them
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(twice):
        sieve = np.zeros(_SIEVE, bool)
        sieve[twice & np.uint64(_SIEVE - 1)] = True
        where = np.flatnonzero(sieve[hashes & np.uint64(_SIEVE - 1)])  # all that occur twice, and a few others
        order = np.argsort(hashes[where], kind="stable")  # stable, so that the first of equal hashes stays first
        ordered = hashes[where[order]]
        found[where[order[1:][ordered[1:] == ordered[:-1]]]] = True
    return found

"""Hashes that came before are found, whatever fits in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fedbert_jax.data import repeats
from fedbert_jax.data.repeats import repeated


def chunks_of(seed: int, distinct: int) -> list[np.ndarray]:
    """Makes chunks of hashes, of which some are empty; many come again, also in the same chunk."""
    rng = np.random.default_rng(seed)
    known = rng.integers(0, 2**64, distinct, dtype=np.uint64)
    known[:3] = 0, 2**64 - 1, 2**63
    return [rng.choice(known, size) for size in (0, 500, 1, 900, 0, 700, 3)]


def by_hand(chunks: list[np.ndarray]) -> list[list[bool]]:
    seen: set[int] = set()
    result = []
    for chunk in chunks:
        result.append([])
        for value in chunk.tolist():
            result[-1].append(value in seen)
            seen.add(value)
    return result


@pytest.mark.parametrize("distinct", [4, 1500, 100_000])
@pytest.mark.parametrize(
    ("together", "file", "passes"),
    [(1 << 21, 1 << 29, 1), (64, 1 << 29, 2), (64, 700, 5), (1, 1000, 4)],  # at once; in buckets; a few buckets at a time
)
def test_against_a_set(
    distinct: int, together: int, file: int, passes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repeats, "_TOGETHER", together)
    monkeypatch.setattr(repeats, "_FILE", file)
    monkeypatch.setattr(repeats, "_SIEVE", 16)  # most hashes look like one that occurs twice
    given, asked = chunks_of(distinct, distinct), 0

    def chunks() -> Iterator[np.ndarray]:
        nonlocal asked
        asked += 1
        yield from given

    found = list(repeated(chunks, sum(map(len, given)), tmp_path))
    assert [flags.tolist() for flags in found] == by_hand(given)
    assert asked == passes
    assert list(tmp_path.iterdir()) == []


def test_nothing(tmp_path: Path) -> None:
    assert list(repeated(lambda: [], 0, tmp_path)) == []
    (none,) = repeated(lambda: [np.zeros(0, np.uint64)], 0, None)
    assert none.shape == (0,) and none.dtype == bool

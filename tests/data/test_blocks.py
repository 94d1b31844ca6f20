"""Blocks are the stream of documents cut every seq_len - 1 tokens, and the file holds exactly those."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedbert_jax.data.blocks import BlockWriter, TokenBlocks, pack

CLS, SEP = 1, 2


def documents(*lengths: int, dtype: type = np.uint16) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(5, 1000, n).astype(dtype) for n in lengths]


def packed(given: list[np.ndarray], seq_len: int) -> np.ndarray:
    parts = list(pack(iter(given), seq_len, CLS, SEP))
    assert all(part.ndim == 2 and len(part) for part in parts)
    return np.concatenate([np.zeros((0, seq_len), np.uint16), *parts])


@pytest.mark.parametrize("lengths", [(3,), (7, 0, 1, 30, 2), (100,), (6, 6, 6), (1,) * 50, ()])
def test_blocks_are_the_stream(lengths: tuple[int, ...]) -> None:
    given, seq_len = documents(*lengths), 8
    stream = [int(t) for d in given for t in (*d, SEP)]
    blocks = packed(given, seq_len)
    assert blocks.shape == (len(stream) // 7, 8)
    assert (blocks[:, 0] == CLS).all()
    assert blocks[:, 1:].ravel().tolist() == stream[: len(blocks) * 7]


def test_the_documents_are_not_changed() -> None:
    given = documents(20, 20)
    before = [d.copy() for d in given]
    for blocks in pack(given, 8, CLS, SEP):
        blocks[:] = 0
    assert all(np.array_equal(a, b) for a, b in zip(given, before, strict=True))


def test_blocks_come_as_soon_as_they_are_full() -> None:
    taken = []

    def watched():  # type: ignore[no-untyped-def]
        for document in documents(10, 10, 10):
            taken.append(len(document))
            yield document

    next(pack(watched(), 8, CLS, SEP))
    assert len(taken) == 1


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("parts", [(), (1,), (3, 1, 1000)])
def test_a_written_file_is_an_npy_of_the_blocks(tmp_path: Path, dtype: type, parts: tuple[int, ...]) -> None:
    high = 65_535 if dtype is np.uint16 else 200_000
    rng = np.random.default_rng(0)
    blocks = [rng.integers(0, high + 1, (n, 8)).astype(dtype) for n in parts]
    with BlockWriter(tmp_path / "x.npy", 8, np.dtype(dtype)) as writer:
        for part in blocks:
            writer.append(part)
        assert writer.num_blocks == sum(parts)
    expected = np.concatenate([np.zeros((0, 8), dtype), *blocks])
    for mode in (None, "r"):
        found = np.load(tmp_path / "x.npy", mmap_mode=mode)  # type: ignore[call-overload]
        assert found.dtype == dtype and np.array_equal(found, expected)


def test_a_clients_blocks() -> None:
    blocks = TokenBlocks(np.arange(12).reshape(6, 2), np.array([0, 1, 1, 6]))
    assert blocks.num_clients == 3 and blocks.sizes.tolist() == [1, 0, 5]
    assert blocks.client(0).tolist() == [[0, 1]] and blocks.client(1).shape == (0, 2)
    assert np.array_equal(np.concatenate([blocks.client(c) for c in range(3)]), blocks.tokens)

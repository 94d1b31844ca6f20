"""Token blocks: documents packed into rows of fixed length, streamed to a `.npy` file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np


@dataclass(frozen=True, eq=False)
class TokenBlocks:
    """All clients' blocks in one array, one client after another."""

    tokens: np.ndarray  # [num_blocks, T] uint16 or int32; may be a memmap
    offsets: np.ndarray  # [N + 1] int64: client c's blocks are tokens[offsets[c] : offsets[c + 1]]

    @property
    def num_clients(self) -> int:
        """N."""
        return len(self.offsets) - 1

    @property
    def sizes(self) -> np.ndarray:
        """Number of blocks of each client, int64 [N]."""
        return np.diff(self.offsets)

    def client(self, index: int) -> np.ndarray:
        """Returns one client's blocks, [blocks, T]; a view."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


def pack(documents: Iterable[np.ndarray], seq_len: int, cls_id: int, sep_id: int) -> Iterator[np.ndarray]:
    """Packs documents into blocks without padding.

    The documents, each followed by [SEP], form one stream; a block is [CLS] and the next `seq_len - 1` tokens of it.
    Tokens that do not fill a last block are dropped.

    Args:
      documents: token ids without special tokens, each [n], of the dtype that the blocks will have.
      seq_len: T.
      cls_id: id of [CLS].
      sep_id: id of [SEP].

    Yields:
      Arrays [blocks, T] of at least one block, in order, as soon as the documents taken so far fill them.
    """
    width = seq_len - 1
    waiting: list[np.ndarray] = []
    length = 0
    for document in documents:
        waiting += [document, np.array([sep_id], dtype=document.dtype)]
        length += len(document) + 1
        if length >= width:
            stream = np.concatenate(waiting)
            full = length // width
            blocks = np.empty((full, seq_len), dtype=stream.dtype)
            blocks[:, 0] = cls_id
            blocks[:, 1:] = stream[: full * width].reshape(full, width)
            yield blocks
            waiting = [stream[full * width :]]
            length -= full * width


class BlockWriter:
    """A `.npy` file [num_blocks, T] that grows as blocks are appended; a context manager.

    Its header is written again on closing, since only then is the number of blocks known. This way no array of the whole
    corpus is ever in memory, and nothing is encoded twice to learn its size.
    """

    def __init__(self, path: Path, seq_len: int, dtype: np.dtype[np.uint16] | np.dtype[np.int32]) -> None:
        self.num_blocks = 0
        self._seq_len = seq_len
        self._dtype = dtype
        self._file: BinaryIO = path.open("wb")
        self._write_header()

    def append(self, blocks: np.ndarray) -> None:
        """Appends blocks [k, T] to the file, as its dtype."""
        self._file.write(np.ascontiguousarray(blocks, dtype=self._dtype).tobytes())
        self.num_blocks += len(blocks)

    def _write_header(self) -> None:
        shape = (self.num_blocks, self._seq_len)
        header = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": shape}
        # NumPy leaves room for the first dimension to grow to 21 digits, so a second header is as long as the first.
        np.lib.format.write_array_header_1_0(self._file, header)

    def __enter__(self) -> BlockWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.seek(0)
        self._write_header()
        self._file.close()

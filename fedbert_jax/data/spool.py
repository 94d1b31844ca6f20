"""Documents on disk, so that preparing text of any size takes little memory."""

from __future__ import annotations

import tempfile
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import numpy as np

_FRAME = 1 << 20  # bytes that are compressed together


class Spool:
    """A file that documents are added to, one after another, and then read from in the same order, as often as needed.

    What stays in memory is twenty bytes a document, and a frame of the file, which is compressed. It has no name, so nothing
    is left of it when the process ends, however that happens. A context manager.

    Args:
      directory: on the disk that the file goes to.
    """

    def __init__(self, directory: Path) -> None:
        self.names: list[str] = []  # of groups, in the order in which they were met
        self.directory = directory
        self._file = tempfile.TemporaryFile(dir=directory)  # noqa: SIM115 - closed by __exit__
        self._codes: dict[str, int] = {}
        self._groups = array("i")
        self._lengths = array("q")  # bytes of each document
        self._characters = array("q")
        self._frames: list[tuple[int, int]] = []  # compressed bytes and documents of each
        self._waiting: list[bytes] = []
        self._size = 0

    def add(self, text: str, group: str) -> None:
        """Adds a document of a group."""
        code = self._codes.get(group)
        if code is None:
            code = self._codes[group] = len(self.names)
            self.names.append(group)
        raw = text.encode()
        self._groups.append(code)
        self._lengths.append(len(raw))
        self._characters.append(len(text))
        self._waiting.append(raw)
        self._size += len(raw)
        if self._size >= _FRAME:
            self._flush()

    def _flush(self) -> None:
        packed = zlib.compress(b"".join(self._waiting), 1)
        self._file.write(packed)
        self._frames.append((len(packed), len(self._waiting)))
        self._waiting, self._size = [], 0

    def __len__(self) -> int:
        return len(self._lengths)

    @property
    def groups(self) -> np.ndarray:
        """The group of each document, int32 [D], as a place in `names`."""
        return np.array(self._groups, np.int32)

    @property
    def sizes(self) -> np.ndarray:
        """The characters of each document, int64 [D]."""
        return np.array(self._characters, np.int64)

    def texts(self, wanted: np.ndarray) -> Iterator[str]:
        """Yields the documents for which `wanted`, bool [D], is true, in order. Only one such iteration may be under way."""
        if self._waiting:
            self._flush()
        self._file.seek(0)
        first = 0
        for size, count in self._frames:
            packed = self._file.read(size)
            chosen = np.flatnonzero(wanted[first : first + count])
            if len(chosen):
                raw = zlib.decompress(packed)
                ends = np.cumsum(self._lengths[first : first + count])
                for place in chosen.tolist():
                    end = int(ends[place])
                    yield raw[end - self._lengths[first + place] : end].decode()
            first += count

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

"""The metrics of a run: writing them round by round, and reading them back.

A killed run may leave half a line at the end of metrics.jsonl. Every function here treats such a torn line as one that
was never written.
"""

from __future__ import annotations

import datetime
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from fedbert_jax import disk
from fedbert_jax.errors import UserError

Record = dict[str, Any]


# --- writing ---------------------------------------------------------------------------------------------------------


class Sink(Protocol):
    """Another place that a run's records go to."""

    def begin(self, records: Sequence[Record]) -> None:
        """Takes the records that there are: those of rounds that stand, when a run is gone on with."""
        ...

    def add(self, record: Record) -> None:
        """Takes the next one, as it reads back from metrics.jsonl."""
        ...

    def close(self) -> None:
        """Ends it; nothing more comes."""
        ...


class MetricsLog:
    """metrics.jsonl, open for appending: one JSON object per line, on its way to the disk when `append` returns.

    A resumed run calls `truncate` first, and opens the log after that: truncating replaces the file.

    Args:
      path: of the file.
      sinks: where the records go, too.
    """

    def __init__(self, path: str | os.PathLike[str], sinks: Sequence[Sink] = ()) -> None:
        self._path, self._sinks = path, sinks = Path(path), tuple(sinks)
        with disk.writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and not path.read_bytes().endswith(b"\n"):  # else the next line would join the torn one
                _rewrite(path, [line for line, _ in _parsed_lines(path)])
            self._file = path.open("ab", buffering=0)
            for sink in sinks:
                sink.begin(read_metrics(path))

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes one line; scalars and arrays of numpy and JAX become numbers and lists, NaN and infinities null.

        Raises:
          DiskError: if it can't be written whole; the part that was written is a torn line.
        """
        text = to_json(record)
        line = text.encode() + b"\n"
        with disk.writing(self._path):
            while line:  # a disk that fills up takes a part first
                line = line[self._file.write(line) or 0 :]
        for sink in self._sinks:
            sink.add(json.loads(text))

    def close(self) -> None:
        self._file.close()
        sinks, self._sinks = self._sinks, ()
        for sink in sinks:
            sink.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Journal:
    """events.jsonl: what happened in a federation, and when, beside the numbers of metrics.jsonl; it is never cut short.

    Args:
      path: of the file.
      always: fields of every line, such as the run's and the client's name.
    """

    def __init__(self, path: str | os.PathLike[str], **always: Any) -> None:
        self._log, self._always = MetricsLog(path), always

    def note(self, event: str, round: int, **what: Any) -> None:
        """Writes one line, with the time of day in UTC."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
        self._log.append({"time": now, **self._always, "event": event, "round": round, **what})

    def close(self) -> None:
        self._log.close()


def to_json(value: Any, indent: int | None = None) -> str:
    """Returns `value` as valid JSON; floats read back to the same bits, those that are not finite become null."""
    return json.dumps(_plain(value), indent=indent, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy's and JAX's arrays and scalars
        return _plain(np.asarray(value, np.float64).tolist() if value.dtype.kind in "fV" else value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def truncate(path: str | os.PathLike[str], round: int) -> None:
    """Drops every line of a round after `round`, and a torn last line; the lines that stay keep their bytes.

    A kill at any moment leaves either the old file or the new one. A missing file stays missing.
    """
    path = Path(path)
    if path.exists():
        with disk.writing(path):
            lines = [line for line, record in _parsed_lines(path) if record["round"] <= round]
        _rewrite(path, lines)


def _rewrite(path: Path, lines: Iterable[bytes]) -> None:
    disk.write_atomically(path, b"".join(line + b"\n" for line in lines))


# --- reading ---------------------------------------------------------------------------------------------------------


def read_metrics(path: str | os.PathLike[str]) -> list[Record]:
    """Returns the records of a metrics.jsonl, oldest first; a torn last line is left out.

    Raises:
      UserError: for a line other than the last that is not a JSON object with a `round`.
      FileNotFoundError: if there is no such file.
    """
    return [record for _, record in _parsed_lines(Path(path))]


def _parsed_lines(path: Path) -> list[tuple[bytes, Record]]:
    lines = path.read_bytes().split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    parsed = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and "round" in record:
            parsed.append((line, record))
        elif number < len(lines):
            raise UserError(f"{path}: line {number} is not a JSON object with a round; mend or remove that line.")
    return parsed

"""The numbers of a run: writing them down a round at a time, reading them back, printing them for people.

A killed run may leave half a line at the end of metrics.jsonl. Every function here takes such a torn line for one that
was never written.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from fedbert_jax import disk
from fedbert_jax.config import Config, flatten, to_dict
from fedbert_jax.errors import UserError

Record = dict[str, Any]

BYTE_UNITS, COUNT_UNITS = ("B", "kB", "MB", "GB", "TB", "PB"), ("", "k", "M", "B", "T")


# --- writing ---------------------------------------------------------------------------------------------------------


class MetricsLog:
    """metrics.jsonl, open for appending; one JSON object a line, on its way to the disk when `append` returns.

    A resumed run calls `truncate` first, and opens the log after that: truncating replaces the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = path = Path(path)
        with disk.writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and not path.read_bytes().endswith(b"\n"):  # else the next line would join the torn one
                _replace(path, [line for line, _ in _parsed_lines(path)])
            self._file = path.open("ab", buffering=0)

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes one line; scalars and arrays of numpy and JAX become numbers and lists, NaN and infinities null.

        Raises:
          DiskError: if it can't be written whole; what is there of it is a torn line.
        """
        line = to_json(record).encode() + b"\n"
        with disk.writing(self._path):
            while line:  # a disk that has become full takes a part first
                line = line[self._file.write(line) or 0 :]

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


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

    A kill at any moment leaves either the old file or the new one. A file that does not exist stays so.
    """
    path = Path(path)
    if path.exists():
        with disk.writing(path):
            _replace(path, [line for line, record in _parsed_lines(path) if record["round"] <= round])


def _replace(path: Path, lines: Iterable[bytes]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.writelines(line + b"\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the rename itself is on the disk only when the directory is
    finally:
        os.close(directory)


# --- reading ---------------------------------------------------------------------------------------------------------


def read_metrics(path: str | os.PathLike[str]) -> list[Record]:
    """Returns the records of a metrics.jsonl, oldest first; a torn last line is left out.

    Raises:
      UserError: for a line, not the last, that is not a JSON object with a `round`.
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


@dataclass(frozen=True)
class Run:
    """What a workdir says about its run.

    `config` is flat ({"federated.rounds": 200, ...}); a key that was not there yet when the run was made has its
    default. `facts` is run.json, and may be empty.
    """

    workdir: Path
    config: dict[str, Any]
    metrics: list[Record]
    facts: Record

    def series(self, key: str, x: str = "tokens") -> tuple[np.ndarray, np.ndarray]:
        """Returns `x` and `key` of the rounds that have `key`, float64 [R] each; null is NaN, an absent `x` 0."""
        rows = [row for row in self.metrics if key in row]
        return (
            np.array([row.get(x) or 0 for row in rows], np.float64),
            np.array([row[key] for row in rows], np.float64),
        )

    def final(self, key: str) -> float | None:
        """Returns the last value of `key`, NaN if it was not finite, None if no round has it."""
        values = self.series(key)[1]
        return float(values[-1]) if values.size else None

    def best(self, key: str, pick: Callable[[np.ndarray], Any] = np.min) -> float | None:
        """Returns the smallest (or `pick`ed) finite value of `key`, NaN if none is finite, None if no round has it."""
        values = self.series(key)[1]
        finite = values[np.isfinite(values)]
        return float(pick(finite)) if finite.size else self.final(key)

    @property
    def scope(self) -> str:
        """Which mean `eval_loss` and `eval_accuracy` are, and of how many clients; "" if that isn't known."""
        scored, there = self.final("eval_clients_scored"), self.facts.get("num_clients")
        if scored is None:
            return ""
        mean = "mean over" if self.config["federated.weighting"] == "uniform" else "mean by text,"
        return f"{mean} {int(scored):,}" + (f" of {int(there):,}" if there else "") + " clients"

    @property
    def messages(self) -> dict[str, dict[str, int]]:
        """Bytes of a round's messages, {"up": {"activations": 3000, ...}, "down": ...}; without those of none."""
        known = self.facts.get("bytes_per_round") or {}
        if "up" not in known:  # an older run's: activations_up and so on
            known = {w: {k.removesuffix(f"_{w}"): n for k, n in known.items() if k.endswith(w)} for w in ("up", "down")}
        return {way: {name: size for name, size in messages.items() if size} for way, messages in known.items()}

    @property
    def rounds(self) -> int:
        """Finished rounds."""
        return int(self.metrics[-1]["round"])

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        return int(self.metrics[-1].get("tokens") or 0)

    @property
    def bytes(self) -> int:
        """Bytes sent so far, up and down together."""
        return int((self.final("uplink_bytes") or 0) + (self.final("downlink_bytes") or 0))

    @property
    def seconds(self) -> float:
        """Seconds of training: the sum of the rounds' own."""
        return float(np.nansum(self.series("seconds")[1]))


def load_run(workdir: str | os.PathLike[str]) -> Run:
    """Reads config.json, metrics.jsonl and, if it is there, run.json.

    Raises:
      UserError: if `workdir` is no workdir, or holds no metrics yet.
    """
    workdir = Path(workdir)
    if not os.path.isfile(workdir / "config.json"):  # no error for a name that is too long
        raise UserError(f"{workdir} is not a workdir: it holds no config.json.")
    config = flatten(to_dict(Config())) | flatten(_read_object(workdir / "config.json"))
    if config["task"] == "finetune":
        raise UserError(f"{workdir} is a run of fine-tuning: its numbers are in results.json, its model is hf/.")
    path = workdir / "metrics.jsonl"
    metrics = read_metrics(path) if path.is_file() else []
    if not metrics:
        raise UserError(f"{workdir} has no metrics yet: its metrics.jsonl is missing or empty.")
    facts = _read_object(workdir / "run.json") if (workdir / "run.json").is_file() else {}
    return Run(workdir, config, metrics, facts)


def _read_object(path: Path) -> Record:
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {type(value).__name__}, and not a JSON object.")
    return value


# --- for people ------------------------------------------------------------------------------------------------------


def scale(largest: float, units: Sequence[str]) -> tuple[float, str]:
    """Returns the power of 1000 that leaves one to three digits of `largest` before the point, and its unit."""
    power = 0
    while largest >= 1000 and power < len(units) - 1:
        largest, power = largest / 1000, power + 1
    return 1000.0**power, units[power]


def quantity(value: float | None, units: Sequence[str] = COUNT_UNITS) -> str:
    """Returns `value` to three digits with its unit: 12345678 is "12.3 M"; None, never measured, is a dash."""
    if value is None or not math.isfinite(value):
        return "–" if value is None else "not finite"
    value = float(f"{value:.3g}")  # before the unit is chosen, or 999,999 would be "1,000 k"
    divisor, unit = scale(abs(value), units)
    return f"{value / divisor:,.10g} {unit}".strip()  # the digits left over are zeros, which g drops


def number(value: float | None, digits: int = 3, unit: str = "") -> str:
    """Returns `value` to a fixed number of digits; None, never measured, is a dash."""
    if value is None:
        return "–"
    return f"{value:.{digits}f}{unit}" if math.isfinite(value) else "not finite"


def percent(value: float | None) -> str:
    """Returns a fraction in per cent."""
    return number(None if value is None else 100 * value, 1, " %")


def duration(seconds: float | None) -> str:
    """Returns "48 s", "12 min 5 s" or "3 h 20 min"; None, never measured, is a dash."""
    if seconds is None:
        return "–"
    if seconds < 99.5:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"

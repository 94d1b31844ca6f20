"""A run as read from its workdir, and its numbers as people read them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedbert_jax.config import Config, flatten, to_dict
from fedbert_jax.errors import UserError
from fedbert_jax.workdir.log import Record, read_metrics

BYTE_UNITS, COUNT_UNITS = ("B", "kB", "MB", "GB", "TB", "PB"), ("", "k", "M", "B", "T")


@dataclass(frozen=True)
class Run:
    """The contents of a run's workdir.

    `config` is flat ({"federated.rounds": 200, ...}); a key that did not exist when the run was made has its default.
    `facts` is run.json, and may be empty.
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
        """Which mean `eval_loss` and `eval_accuracy` are, and over how many clients; "" if that isn't known."""
        scored, there = self.final("eval_clients_scored"), self.facts.get("num_clients")
        if scored is None:
            return ""
        mean = "mean over" if self.config["federated.weighting"] == "uniform" else "mean by text,"
        return f"{mean} {int(scored):,}" + (f" of {int(there):,}" if there else "") + " clients"

    @property
    def messages(self) -> dict[str, dict[str, int]]:
        """Bytes of a round's messages, {"up": {"activations": 3000, ...}, "down": ...}, without empty ones."""
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
        """Seconds of training, summed over the rounds."""
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
    if config["task"] == "join":
        raise UserError(f"{workdir} is a client's in a federation: the run's numbers are in its server's workdir.")
    if config["task"] == "serve" and str(config["data.source"]).startswith("glue:"):
        raise UserError(f"{workdir} is a federation's that trains a classifier: its scores are in metrics.jsonl.")
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
    """Returns `value` to three digits with its unit: 12345678 is "12.3 M"; None (never measured) is a dash."""
    if value is None or not math.isfinite(value):
        return "–" if value is None else "not finite"
    value = float(f"{value:.3g}")  # before the unit is chosen, or 999,999 would be "1,000 k"
    divisor, unit = scale(abs(value), units)
    return f"{value / divisor:,.10g} {unit}".strip()  # the digits left over are zeros, which g drops


def number(value: float | None, digits: int = 3, unit: str = "") -> str:
    """Returns `value` to a fixed number of digits; None (never measured) is a dash."""
    if value is None:
        return "–"
    return f"{value:.{digits}f}{unit}" if math.isfinite(value) else "not finite"


def percent(value: float | None) -> str:
    """Returns a fraction in per cent."""
    return number(None if value is None else 100 * value, 1, " %")


def duration(seconds: float | None) -> str:
    """Returns "48 s", "12 min 5 s" or "3 h 20 min"; None (never measured) is a dash."""
    if seconds is None:
        return "–"
    if seconds < 99.5:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"

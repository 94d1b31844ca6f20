"""Two programs against one another on a noisy machine: paired, interleaved samples, and the ratios of the pairs."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Side:
    """A program to be timed: a call of `run` does the work of `tokens` tokens, waits for its end and returns its loss."""

    name: str
    tokens: int
    run: Callable[[], float]
    guess: float  # ln(vocabulary size): the loss of knowing nothing
    initial_loss: float
    compile_seconds: float = 0.0
    losses: list[float] = field(default_factory=list)

    def timed(self) -> float:
        """Runs once; returns seconds a token."""
        start = time.perf_counter()
        loss = self.run()
        seconds = time.perf_counter() - start
        self.losses.append(loss)
        return seconds / self.tokens

    def check(self) -> None:
        """Raises unless this side starts at a guess and learns, so that nobody measures a broken program."""
        if not abs(self.initial_loss - self.guess) < 0.15:
            raise RuntimeError(f"{self.name}: first loss {self.initial_loss:.3f}, expected ln(V) = {self.guess:.3f}.")
        while self.losses[-1] > self.initial_loss - 0.05:
            if len(self.losses) == 32:
                raise RuntimeError(f"{self.name}: the loss does not fall: {self.initial_loss:.3f}, then {self.losses}.")
            self.timed()  # few samples of few steps have not shown it yet


@dataclass(frozen=True)
class Row:
    """A comparison to make: how many times as many tokens a second as `b` does `a` train?"""

    name: str
    a: str
    b: str
    target: float | None = None


def compare(row: Row, a: Side, b: Side, tokens_per_step: int, samples: int) -> dict[str, Any]:
    """Measures a row.

    Each sample runs both sides once, one right after the other, alternately `a` and `b` first: what slows the machine
    down for a while meets both, and a drift favours neither. The ratio is taken within a sample.

    Args:
      row: the comparison.
      a: the side whose speed is the numerator.
      b: the side whose speed is the denominator.
      tokens_per_step: tokens of the global batch; the milliseconds returned are for so many.
      samples: pairs to measure.

    Returns:
      The row's results; JSON can hold them.
    """
    for side in (a, b):
        if not side.losses:
            side.timed()  # the first call pays for what later ones find ready
    seconds: list[tuple[float, float]] = []
    for n in range(samples):
        gc.collect()
        if n % 2 == 0:
            first = a.timed()
            seconds.append((first, b.timed()))
        else:
            first = b.timed()
            seconds.append((a.timed(), first))
    a.check()
    b.check()
    ratios = [one_b / one_a for one_a, one_b in seconds]
    ratio = statistics.median(ratios)
    low, high = quartiles(ratios)
    return {
        "name": row.name,
        "a": a.name,
        "b": b.name,
        "ratio": ratio,
        "quartiles": [low, high],
        "ratios": ratios,
        "a_ms": 1e3 * tokens_per_step * statistics.median(s for s, _ in seconds),
        "b_ms": 1e3 * tokens_per_step * statistics.median(s for _, s in seconds),
        "target": row.target,
        "met": None if row.target is None else ratio >= row.target,
        "a_loss": [a.initial_loss, a.losses[-1]],
        "b_loss": [b.initial_loss, b.losses[-1]],
    }


def quartiles(values: list[float]) -> tuple[float, float]:
    """Returns the first and third quartile; of one value, that value twice."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def guess_loss(vocab_size: int) -> float:
    """Returns the cross-entropy in nats of a uniform guess."""
    return math.log(vocab_size)

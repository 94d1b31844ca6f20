"""Compares two programs on a noisy machine: paired, interleaved samples, and the ratios of the pairs."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from benchmarks.flops import Flops
from benchmarks.watch import compilations


def _nothing() -> None:
    return None


@dataclass
class Side:
    """A program to be timed: a call of `run` does the work of `tokens` tokens, waits for its end and returns the loss."""

    name: str
    tokens: int
    run: Callable[[], float]
    guess: float  # the loss of a model that knows nothing
    initial_loss: float
    compile_seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    flops: Flops | None = None
    seconds: list[float] = field(default_factory=list)  # per token, of the samples that rows were made of
    peak_bytes: int | None = None
    ready: Callable[[], None] = _nothing  # makes it run again after a rest
    rest: Callable[[], None] = _nothing  # gives its memory back; only a side with a process of its own can
    close: Callable[[], None] = _nothing

    def timed(self) -> float:
        """Runs once; returns seconds per token.

        Raises:
          RuntimeError: if a call other than the first compiled something: its time would be the compiler's.
        """
        before = compilations()
        start = time.perf_counter()
        loss = self.run()
        seconds = time.perf_counter() - start
        if self.losses and compilations() != before:
            raise RuntimeError(f"{self.name}: something was compiled during the measurement.")
        self.losses.append(loss)
        return seconds / self.tokens

    def check(self) -> None:
        """Raises RuntimeError unless this side starts at a guess and learns, so that nobody measures a broken program."""
        if not abs(self.initial_loss - self.guess) < 0.15:
            raise RuntimeError(f"{self.name}: first loss {self.initial_loss:.3f}, expected {self.guess:.3f}, a guess.")
        while not self.losses[-1] < self.initial_loss - 0.05:
            if len(self.losses) >= 32:
                raise RuntimeError(f"{self.name}: the loss does not fall: {self.initial_loss:.3f}, then {self.losses}.")
            self.timed()  # a few samples of a few steps may not have shown it yet

    def free(self) -> None:
        """Frees the side's model, after the last row that needs it."""
        self.close()
        self.run = self._freed

    def _freed(self) -> float:
        raise RuntimeError(f"{self.name}: the model was freed after the last row that needed it")


@dataclass(frozen=True)
class Row:
    """A measurement to make.

    `ratio`: on how many times as many tokens per second as `b` does `a` train? `share`: which share of the device's matmul
    ceiling does `a` reach? `seconds`: how long does the compilation of `a` take?
    """

    name: str
    a: str
    b: str = ""
    target: float | None = None
    size: str = ""
    kind: str = "ratio"

    @property
    def goal(self) -> str:
        """The target in words."""
        if self.target is None:
            return ""
        return {"ratio": f"≥ {self.target}", "share": f"≥ {self.target:.0%}", "seconds": f"< {self.target:.0f} s"}[self.kind]


def compare(row: Row, a: Side, b: Side, tokens_per_step: int, samples: int, turns: bool = False) -> dict[str, Any]:
    """Measures a row of two sides.

    Each sample runs both sides once, one right after the other, with `a` and `b` first in turn: a temporary slowdown of the
    machine meets both, and a drift favours neither. The ratio is taken within a sample.

    Args:
      row: the comparison.
      a: the side whose speed is the numerator.
      b: the side whose speed is the denominator.
      tokens_per_step: tokens of the global batch; the milliseconds returned are for that many.
      samples: pairs to measure.
      turns: one side rests while the other runs.

    Returns:
      The row's results; JSON can hold them.
    """

    def sample(side: Side, other: Side) -> float:
        if turns:
            other.rest()
        side.ready()
        return side.timed()

    for side, other in ((a, b), (b, a)):
        if not side.losses:
            sample(side, other)  # the first call has costs that later ones don't
    seconds: list[tuple[float, float]] = []
    for n in range(samples):
        gc.collect()
        if n % 2 == 0:
            first = sample(a, b)
            seconds.append((first, sample(b, a)))
        else:
            first = sample(b, a)
            seconds.append((sample(a, b), first))
    for side, other in ((b, a), (a, b)):
        if turns:
            other.rest()
        side.ready()
        side.check()
    for side, times in ((a, [s for s, _ in seconds]), (b, [s for _, s in seconds])):
        side.seconds.extend(times)
    return summary(row, [one_b / one_a for one_a, one_b in seconds]) | {
        "a": a.name,
        "b": b.name,
        "a_ms": 1e3 * tokens_per_step * statistics.median(s for s, _ in seconds),
        "b_ms": 1e3 * tokens_per_step * statistics.median(s for _, s in seconds),
        "a_loss": [a.initial_loss, a.losses[-1]],
        "b_loss": [b.initial_loss, b.losses[-1]],
    }


def summary(row: Row, values: list[float]) -> dict[str, Any]:
    """Returns a row's median, quartiles and verdict; JSON can hold them."""
    value = statistics.median(values)
    met = None
    if row.target is not None:
        met = value < row.target if row.kind == "seconds" else value >= row.target
    return {
        "size": row.size,
        "name": row.name,
        "kind": row.kind,
        "value": value,
        "quartiles": list(quartiles(values)),
        "values": values,
        "target": row.target,
        "met": met,
    }


def quartiles(values: list[float]) -> tuple[float, float]:
    """Returns the first and third quartile; for one value, that value twice."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def guess_loss(vocab_size: int, hidden_size: int) -> float:
    """Returns an untrained model's cross-entropy in nats: that of a uniform guess plus half the variance of its logits.

    Its last hidden states are normalised, and its word table is drawn with BERT's standard deviation of 0.02.
    """
    return math.log(vocab_size) + 0.02**2 * hidden_size / 2

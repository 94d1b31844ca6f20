"""Rounds under way: starts them without waiting, reads their metrics in a thread, and times each one by itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import jax
from rich.console import Console

from fedbert_jax.federated.metrics import RoundMetrics
from fedbert_jax.federated.state import State

EVENTS = "/jax/core/compile/"  # tracing, lowering, compiling: what JAX does before a program can run
LAST = EVENTS + "backend_compile_duration"


class Compiling:
    """Measures, within `with`, the time this thread spends compiling; `seconds` is 0 if everything was compiled before."""

    def __init__(self) -> None:
        self._spans: list[tuple[float, float]] = []
        self.done = False  # whether there was a program to compile
        self._thread = threading.get_ident()

    def __enter__(self) -> Compiling:
        jax.monitoring.register_event_duration_secs_listener(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._note)

    def _note(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event.startswith(EVENTS) and threading.get_ident() == self._thread:
            now = time.perf_counter()
            self._spans.append((now - duration_secs, now))
            self.done |= event == LAST

    @property
    def seconds(self) -> float:
        """The time covered by all events noted, each second counted once: tracing a function includes those it calls."""
        total, end = 0.0, -1.0
        for start, stop in sorted(self._spans):
            total += max(0.0, stop - max(start, end))
            end = max(end, stop)
        return total

    def tell(self, console: Console, what: str) -> None:
        """Prints how long compiling took, if there was anything to compile."""
        if self.done:
            console.print(f"compiling {what} took {self.seconds:.1f} s", style="dim", markup=False)


class Dispatched(NamedTuple):
    """A round under way."""

    round: int  # from 1
    started: float
    compiling: Compiling
    numbers: Future[tuple[RoundMetrics, float]]  # its metrics, on the host, and the time when they arrived


class Done(NamedTuple):
    """A round's numbers."""

    metrics: RoundMetrics  # on the host
    seconds: float  # duration, including compilation
    running: float  # duration, without compilation


class Dispatcher:
    """Starts rounds and collects them in the same order."""

    def __init__(self) -> None:
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="fedbert-metrics")
        self._finished = 0.0  # when the last round collected had ended

    def start(
        self, run_round: Callable[[State, int], tuple[State, RoundMetrics]], state: State, n: int
    ) -> tuple[State, Dispatched]:
        """Starts round `n`, from 0; `state` is used up."""
        started = time.perf_counter()
        with jax.profiler.StepTraceAnnotation("round", step_num=n + 1), Compiling() as compiling:
            state, metrics = run_round(state, n)
        return state, Dispatched(n + 1, started, compiling, self._reader.submit(_read, metrics))

    def collect(self, dispatched: Dispatched) -> Done:
        """Waits for a round."""
        metrics, finished = dispatched.numbers.result()
        began = dispatched.started
        # It may have queued behind the round before it.
        seconds = finished - max(began, self._finished)
        running = finished - max(began + dispatched.compiling.seconds, self._finished)
        self._finished = finished
        return Done(metrics, seconds, running)

    def close(self) -> None:
        """Ends the reading thread."""
        self._reader.shutdown()


def _read(metrics: RoundMetrics) -> tuple[RoundMetrics, float]:
    """Waits for a round's metrics; runs in its own thread, so that the time is the round's and not the reader's."""
    return jax.device_get(metrics), time.perf_counter()

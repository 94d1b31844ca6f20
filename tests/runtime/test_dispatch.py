"""Compiling is measured apart from running: each second once, only in this thread, and left out of a round's speed."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from fedbert_jax.federated.metrics import RoundMetrics
from fedbert_jax.runtime import dispatch
from fedbert_jax.runtime.dispatch import Compiling, Dispatched, Dispatcher


def test_what_is_compiled_within_is_measured_and_nothing_else(capsys):
    fn = jax.jit(lambda x: jnp.sin(x) @ x)
    x = jnp.ones((5, 5))
    began = time.perf_counter()
    with Compiling() as first:
        fn(x)
    whole = time.perf_counter() - began
    with Compiling() as second:
        fn(x)
    with Compiling() as elsewhere:
        thread = threading.Thread(target=jax.jit(lambda x: jnp.cos(x) @ x), args=(x,))
        thread.start()
        thread.join()
    assert first.done and 0 < first.seconds <= whole
    assert not second.done and second.seconds == 0 and not elsewhere.done
    for compiling in (first, second):
        compiling.tell(Console(highlight=False), "a round")
    assert capsys.readouterr().out == f"compiling a round took {first.seconds:.1f} s\n"


def test_what_overlaps_counts_once(monkeypatch):
    """JAX reports the inner functions, then the outer one, whose time includes theirs."""
    compiling = Compiling()
    for now, duration in ((12.0, 1.0), (15.0, 2.0), (16.0, 6.0), (20.0, 1.0)):  # 11-12 and 13-15 lie in 10-16; then 19-20
        monkeypatch.setattr(dispatch.time, "perf_counter", lambda now=now: now)
        compiling._note("/jax/core/compile/jaxpr_trace_duration", duration)
    compiling._note("/jax/checkpoint/write/duration", 100.0)
    assert compiling.seconds == 7.0


def test_a_round_is_timed_with_compiling_and_its_speed_without():
    dispatcher = Dispatcher()

    def dispatched(number: int, started: float, compiling: float, ended: float) -> Dispatched:
        numbers: Future = Future()
        numbers.set_result((RoundMetrics(*np.zeros(4, np.float32)), ended))
        return Dispatched(number, started, SimpleNamespace(seconds=compiling), numbers)  # type: ignore[arg-type]

    first, second = dispatched(1, 100.0, 8.0, 110.0), dispatched(2, 109.0, 0.0, 113.0)
    assert dispatcher.collect(first)[1:] == (10.0, 2.0)
    assert dispatcher.collect(second)[1:] == (3.0, 3.0)  # it waited a second for the first
    dispatcher.close()

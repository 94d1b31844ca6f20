"""Bars on the terminal, and how long compiling takes."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

EVENTS = "/jax/core/compile/"  # tracing, lowering, compiling: what JAX does before a program can run
LAST = EVENTS + "backend_compile_duration"


def bar(console: Console, *fields: str) -> Progress:
    """Returns a bar that counts; `fields` are columns of text, to be given to its tasks. It leaves nothing behind."""
    columns = [TextColumn(f"{{task.fields[{name}]}}", markup=False) for name in fields]
    return Progress(
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), *columns, TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip


@contextlib.contextmanager
def waiting(console: Console, text: str) -> Iterator[None]:
    """Shows a text with the time since it appeared, on a terminal, until `with` ends."""
    columns = (TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:
        shown.add_task(text, total=None)
        yield


class Compiling:
    """Within `with`, measures what this thread spends on compiling; `seconds` is 0 where all was compiled before."""

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
        """The time covered by all that was noted, each second once: tracing a function includes those that it calls."""
        total, end = 0.0, -1.0
        for start, stop in sorted(self._spans):
            total += max(0.0, stop - max(start, end))
            end = max(end, stop)
        return total

    def tell(self, console: Console, what: str) -> None:
        """Prints how long it took, if there was anything to compile."""
        if self.done:
            console.print(f"compiling {what} took {self.seconds:.1f} s", style="dim", markup=False)

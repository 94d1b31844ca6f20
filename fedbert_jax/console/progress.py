"""Progress on a console: a bar that counts rounds, a text with a clock, and the stages of a preparation."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fedbert_jax.console.output import is_live, shown

LIVE_SECONDS, PLAIN_SECONDS = 0.1, 30.0  # between two counts shown


def bar(console: Console, *fields: str) -> Progress:
    """Returns a counting bar that leaves nothing behind; `fields` are text columns, which its tasks fill."""
    columns = [TextColumn(f"{{task.fields[{name}]}}", markup=False) for name in fields]
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        *columns,
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not is_live(console),
    )


@contextlib.contextmanager
def waiting(console: Console, text: str) -> Iterator[None]:
    """Shows a text with the elapsed time on a terminal, until `with` ends."""
    columns = (TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not is_live(console)) as shown:
        shown.add_task(text, total=None)
        yield


class Stages:
    """A `data.progress.Progress`, and a context manager, since a live count has to be cleared at the end.

    A stage is a line that stays. Below it, a terminal shows how much of it is done; a log file gets a line with the count
    every `PLAIN_SECONDS`.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic):
        self._console, self._clock = console, clock
        self._live: tuple[Progress, TaskID] | None = None
        self._unit, self._total = "", 0  # of the stage
        self._shown = 0.0  # when a count was last shown

    def stage(self, text: str, unit: str = "", total: int | None = None) -> None:
        """Begins a stage; see `data.progress.Progress`."""
        self._clear()
        self._console.print(shown(text), style="dim", markup=False, highlight=False, soft_wrap=True)
        self._unit, self._total, self._shown = unit, total or 0, self._clock()
        if unit and is_live(self._console) and not self._console.is_dumb_terminal:
            columns = BarColumn(), TextColumn("{task.fields[shown]}"), TimeElapsedColumn()
            live = Progress(*columns, console=self._console, transient=True)
            self._live = live, live.add_task("", total=total, shown=self._describe(0))
            live.start()

    def count(self, done: int) -> None:
        """Shows the count, unless one was shown a moment ago."""
        now = self._clock()
        if not self._unit or now - self._shown < (LIVE_SECONDS if self._live else PLAIN_SECONDS):
            return
        self._shown = now
        if self._live:
            live, task = self._live
            live.update(task, completed=done, shown=self._describe(done))
        else:
            self._console.print(f"  {self._describe(done)}", style="dim", markup=False, highlight=False, soft_wrap=True)

    def _describe(self, done: int) -> str:
        total = f" of {self._total:,}" if self._total else ""
        return f"{done:,}{total} {self._unit}"

    def _clear(self) -> None:
        if self._live:
            self._live[0].stop()
            self._live = None

    def __enter__(self) -> Stages:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._clear()

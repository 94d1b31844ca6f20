"""The one loop of rounds, for pre-training and fine-tuning alike: everything around a round, whatever it trains.

It starts afresh or after the newest checkpoint, evaluates and saves the state, keeps the progress bar and the metrics log,
handles signals, and ends the run when numbers stop being finite.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from fedbert_jax.console import progress
from fedbert_jax.console.output import shown
from fedbert_jax.devices import processes
from fedbert_jax.devices.interrupts import Interrupts
from fedbert_jax.errors import DivergedError
from fedbert_jax.federated import finite
from fedbert_jax.federated.metrics import RoundMetrics
from fedbert_jax.federated.state import State
from fedbert_jax.runtime.dispatch import Compiling, Dispatched, Dispatcher, Done
from fedbert_jax.runtime.profiling import Profile
from fedbert_jax.workdir.checkpoint import Checkpoints
from fedbert_jax.workdir.log import MetricsLog, Record, Sink, truncate


class Job(Protocol):
    """What the loop trains. Rounds are counted from 1, except in `run_round`, which counts from 0.

    A method that finds a number that is not finite raises `finite.NotFiniteError`.
    """

    name: str  # shown beside the progress bar
    what: str  # names what is trained, in sentences about a round; "" for the run itself
    total: int  # rounds
    state_shape: Any  # the shapes that a checkpoint is restored to
    state_sharding: Any
    remedy: str  # what may help if numbers stop being finite

    def begin(self) -> tuple[State, Record]:
        """Returns the state before the first round, and its line in the log; {} for no line."""
        ...

    def resume(self, round: int, meta: dict[str, Any]) -> None:
        """Takes up what a checkpoint holds beside the state."""
        ...

    def run_round(self, state: State, round: int) -> tuple[State, RoundMetrics]:
        """Dispatches a round and returns at once; `state` is donated."""
        ...

    def evaluates(self, round: int) -> bool:
        """Whether the state after this round is evaluated."""
        ...

    def enough(self) -> bool:
        """Whether the evaluations so far end the training before its last round."""
        ...

    def saves(self, round: int) -> bool:
        """Whether the state after this round is saved."""
        ...

    def record(self, round: int, done: Done) -> Record:
        """Takes a round's numbers and returns its line in the log; {} for no line."""
        ...

    def evaluate(self, state: State) -> Record:
        """Returns what an evaluation adds to the log's line."""
        ...

    def say(self, record: Record) -> None:
        """Prints a line with an evaluation, which outlasts the progress bar and also appears in a log file."""
        ...

    def show(self, done: Done) -> str:
        """Returns the numbers beside the progress bar."""
        ...

    def check(self, state: State) -> None:
        """Checks every number of a state that is about to be saved."""
        ...

    def meta(self, round: int) -> dict[str, Any]:
        """Returns what a checkpoint holds beside the state, which `resume` takes up."""
        ...


class Watcher:
    """A sink of metrics that may ask for an end."""

    def __init__(self, watch: Callable[[Record], bool], interrupts: Interrupts):
        self._watch, self._interrupts = watch, interrupts

    def begin(self, records: Sequence[Record]) -> None:
        """What was trained before is not told again."""

    def add(self, record: Record) -> None:
        if self._watch(record):
            self._interrupts.request()

    def close(self) -> None:
        """Nothing is left to do."""


class Loop:
    """Runs a job's rounds and keeps its open files: the metrics log and the checkpoints.

    With several processes, each one goes through all of it, and only the first one writes the log.

    Args:
      job: what is trained.
      checkpoints: its checkpoints.
      log: the file of its metrics.
      console: where to print.
      profile: which rounds to trace.
      sinks: where its metrics go, too.
    """

    def __init__(
        self,
        job: Job,
        checkpoints: Checkpoints,
        log: Path,
        console: Console,
        profile: Profile | None = None,
        sinks: Sequence[Sink] = (),
    ):
        self.job, self.checkpoints, self.console = job, checkpoints, console
        self.round = 0  # finished rounds, whose lines are in the log
        self._path, self._sinks = log, sinks
        self._log: MetricsLog | None = None
        self._profile = profile or Profile("", log.parent)
        self._dispatcher = Dispatcher()

    def begin(self) -> State:
        """Restores the newest checkpoint, or makes the state before the first round."""
        done = self.checkpoints.rounds()
        if done:
            self.round = done[-1]
            state, meta = self.checkpoints.restore(self.round, self.job.state_shape, self.job.state_sharding)
            self.job.resume(self.round, meta)
            self.console.print(f"resuming after round {self.round} of {self.job.total}")
            self._open(after=self.round)
            return state
        self._open(after=None)
        with progress.waiting(self.console, "compiling the initial model"), Compiling() as compiling, self.guard(0):
            state, record = self.job.begin()
        compiling.tell(self.console, "the initial model")
        self._append(record)
        return state

    def run(self, state: State, interrupts: Interrupts) -> State:
        """Runs the remaining rounds; a signal stops it after the round under way, with a checkpoint."""
        job = self.job
        with progress.bar(self.console, "numbers") as bar:
            task = bar.add_task("compiling", total=job.total, completed=self.round, numbers="")

            def collect(dispatched: Dispatched, state: State | None = None) -> None:
                numbers = self._collect(dispatched, state)
                bar.update(task, completed=self.round, numbers=numbers)

            waiting: Dispatched | None = None
            for n in range(self.round + 1, job.total + 1):
                if interrupts.stop() or job.enough():
                    break
                self.checkpoints.check()
                self._profile.before(n, state)
                state, dispatched = self._dispatcher.start(job.run_round, state, n - 1)
                dispatched.compiling.tell(self.console, "a round")
                bar.update(task, description=job.name)
                self._profile.after(n, state)
                if waiting is not None:  # round n is under way while the numbers of n - 1 are read
                    collect(waiting)
                waiting = dispatched
                evaluates, saves = job.evaluates(n), job.saves(n)
                if evaluates or saves:
                    collect(waiting, state if evaluates else None)
                    waiting = None
                if saves or (evaluates and job.enough()):
                    self._save(state)
            self._profile.close(state)
            if self._profile.written:
                self.console.print(f"profile      {shown(self._profile.directory)} (tensorboard --logdir, or perfetto.dev)")
            if waiting is not None:
                collect(waiting)
            if interrupts.settle() and self.round:
                self._save(state)
            self.checkpoints.wait()
        return state

    @property
    def finished(self) -> bool:
        """Whether the last round is over."""
        return self.round == self.job.total or self.job.enough()

    def close(self) -> None:
        """Waits for the last checkpoint, and closes the files."""
        self.checkpoints.close()
        self._dispatcher.close()
        self.close_log()

    def close_log(self) -> None:
        """Closes the metrics log and its sinks, whatever has ended the run."""
        if self._log is not None:
            self._log.close()
            self._log = None

    @contextlib.contextmanager
    def guard(self, round: int) -> Iterator[None]:
        """Within `with`, numbers that are not finite end the run with a sentence that says what is left of it."""
        try:
            yield
        except finite.NotFiniteError as error:
            self.checkpoints.wait()
            kept = self.checkpoints.rounds()
            where = f"the checkpoint of round {kept[-1]} is kept" if kept else "there was no checkpoint yet"
            what = f"{self.job.what}, round {round}" if self.job.what else f"round {round}"
            raise DivergedError(
                f"{what}: {error}; {where}, and nothing is exported; {self.job.remedy}, and begin in another workdir."
            ) from None

    # --- one round's end ---

    def _collect(self, dispatched: Dispatched, state: State | None) -> str:
        """Waits for a round and writes its line, with an evaluation of `state` if given; returns what the bar shows."""
        round, done = dispatched.round, self._dispatcher.collect(dispatched)
        with self.guard(round):
            record = self.job.record(round, done)
            if state is not None:
                with Compiling() as compiling:
                    record |= self.job.evaluate(state)
                compiling.tell(self.console, "the evaluation")
                finite.require(finite.in_scores(record))
                self.job.say(record)
        self._append(record)
        self.round = round
        return self.job.show(done)

    def _save(self, state: State) -> None:
        """Begins to save the state after the recorded rounds; a state whose numbers aren't all finite is never saved."""
        with self.guard(self.round):
            self.job.check(state)
        self.checkpoints.save(self.round, state, self.job.meta(self.round))

    def _open(self, after: int | None) -> None:
        """Opens the log and drops its lines about rounds later than `after`; None drops all of them."""
        if not processes.first():
            return
        if after is None:
            self._path.unlink(missing_ok=True)
        else:
            truncate(self._path, after)
        self._log = MetricsLog(self._path, self._sinks)

    def _append(self, record: Record) -> None:
        if record and self._log is not None:
            self._log.append(record)

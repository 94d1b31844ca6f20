"""A group of seeds of a task as a job of the loop: what its rounds report, and when it is evaluated and saved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console

from fedbert_jax.console.output import shown
from fedbert_jax.devices.interrupts import Interrupts
from fedbert_jax.errors import about
from fedbert_jax.federated import finite
from fedbert_jax.federated.metrics import RoundMetrics
from fedbert_jax.federated.state import State
from fedbert_jax.glue.results import Scores
from fedbert_jax.glue.simulation import Finetuning
from fedbert_jax.glue.start import Checkpoint
from fedbert_jax.loop import Loop
from fedbert_jax.models import huggingface
from fedbert_jax.runtime.dispatch import Done
from fedbert_jax.workdir import resume
from fedbert_jax.workdir.checkpoint import Checkpoints
from fedbert_jax.workdir.log import Record
from fedbert_jax.workdir.paths import Workdir


class SeedGroup:
    """A group of seeds of a task as the loop's job (`loop.Job`). Each epoch's end is evaluated and, except the last, saved.

    Args:
      tuning: the fine-tuning of these seeds.
      console: where messages go.
    """

    remedy = "lower the learning rates"

    def __init__(self, tuning: Finetuning, console: Console):
        self.tuning, self.console = tuning, console
        self.what = tuning.data.task.name
        self.name, self.total = f"{self.what} {group_name(tuning.seeds)}", tuning.rounds
        self.state_shape, self.state_sharding = tuning.state_shape, tuning.state_sharding
        self.losses: list[Any] = []  # [S] of each round since the last line of the log
        self.scores: list[Scores] = []  # each seed's, of the last epoch

    def begin(self) -> tuple[State, Record]:
        """Makes the seeds' states, and prints what the checkpoint gave them."""
        with about("config key model.init_from"):
            state, missing = self.tuning.init_state()
        said = self.tuning.start.classifier if isinstance(self.tuning.start, Checkpoint) else ""
        fresh = huggingface.describe_missing([name for name in missing if not said or name not in huggingface.CLASSIFIER])
        if fresh:
            text = f"the checkpoint lacks, so it starts fresh: {shown(', '.join(fresh))}"
            self.console.print(text, style="dim", markup=False)
        if said:
            self.console.print(shown(said), style="dim", markup=False)
        return state, {}

    def resume(self, round: int, meta: dict[str, Any]) -> None:
        """Takes up the losses that are not in the log yet."""
        self.losses = meta["losses"]

    def run_round(self, state: State, round: int) -> tuple[State, RoundMetrics]:
        """Dispatches a round, from 0."""
        return self.tuning.step(state, round)

    def evaluates(self, round: int) -> bool:
        """Returns whether to evaluate: at the end of each epoch, and of training."""
        epochs = self.tuning.epochs
        return int(epochs(round)) > int(epochs(round - 1)) or round == self.total

    def enough(self) -> bool:
        """Fine-tuning goes on to its last epoch, whose score is the one that counts."""
        return False

    def saves(self, round: int) -> bool:
        """Returns whether to save: at the end of every epoch but the last, after which results are written at once."""
        return self.evaluates(round) and round < self.total

    def record(self, round: int, done: Done) -> Record:
        """Collects a round's losses; at an epoch's end, returns the line for the log."""
        self.tuning.check_round(round - 1, done.metrics)
        self.losses.append(np.asarray(done.metrics.loss, np.float64).tolist())
        if not self.evaluates(round):
            return {}
        mean, self.losses = np.mean(np.asarray(self.losses, np.float64), axis=0), []
        return {"round": round, "epoch": self.tuning.epochs(round), "train_loss": mean}

    def evaluate(self, state: State) -> Record:
        """Scores the seeds on the splits that the task is evaluated on."""
        self.check(state)
        self.scores = self.tuning.scores(state)
        return {"scores": self.scores}

    def say(self, record: Record) -> None:
        """Prints nothing: the seeds' scores are printed when they are done."""

    def show(self, done: Done) -> str:
        """Returns the numbers beside the progress bar."""
        return f"loss {float(np.mean(done.metrics.loss)):.3f}"

    def check(self, state: State) -> None:
        """Requires every number of the seeds' states to be finite."""
        finite.require(finite.in_state(state, [str(seed) for seed in self.tuning.seeds], "seed"))

    def meta(self, round: int) -> dict[str, Any]:
        """Returns what a checkpoint holds beside the state."""
        return {"config": resume.stamp(self.tuning.config), "losses": self.losses}


def train_group(
    tuning: Finetuning, workdir: Workdir, interrupts: Interrupts, console: Console
) -> tuple[State, list[Scores]] | None:
    """Trains a group of seeds to its last round; returns the state and each seed's scores, or None if interrupted."""
    name, job = group_name(tuning.seeds), SeedGroup(tuning, console)
    loop = Loop(job, Checkpoints(workdir.checkpoints / name, keep=1), workdir.root / f"metrics-{name}.jsonl", console)
    state = loop.run(loop.begin(), interrupts)
    loop.close()
    if not loop.finished:
        return None
    return state, job.scores or tuning.scores(state)  # there are none if a signal came after the last round


def group_name(seeds: Sequence[int]) -> str:
    """Returns the name of a group of seeds in file names."""
    return f"seed-{seeds[0]}" if len(seeds) == 1 else f"seeds-{seeds[0]}-{seeds[-1]}"

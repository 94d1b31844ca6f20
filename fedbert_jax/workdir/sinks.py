"""Sinks of metrics: TensorBoard and Weights & Biases, fed with the records of metrics.jsonl.

A run that is killed and gone on with repeats the rounds after its last checkpoint, with the same numbers. TensorBoard's file
is written anew from the records that stand; Weights & Biases takes nothing back, so it is told of what it may have missed.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fedbert_jax import config as config_lib
from fedbert_jax import disk
from fedbert_jax.config import Config
from fedbert_jax.errors import ConfigError, UserError
from fedbert_jax.workdir.log import Record, Sink, to_json
from fedbert_jax.workdir.paths import Workdir

ROUND = "round"


def check_installed(config: Config) -> None:
    """Raises `ConfigError` if a package that a sink needs isn't there."""
    for name in config_lib.listed(config.metrics.sinks):
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"config key metrics.sinks={config.metrics.sinks!r}: accepted without {name}: others than {name!r}; "
                f"pip install 'fedbert_jax[{name}]' installs it."
            )


def make_sinks(config: Config, workdir: Workdir) -> list[Sink]:
    """Returns the sinks that a config names, for the process that writes a run's metrics."""
    kinds: dict[str, Callable[[Config, Workdir], Sink]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
    return [kinds[name](config, workdir) for name in config_lib.listed(config.metrics.sinks)]


def scalars(record: Record, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yields the numbers of a record by name; what lies deeper has a path for a name: `eval_clients/numpy/loss`."""
    for name, value in record.items():
        if isinstance(value, dict):
            yield from scalars(value, f"{prefix}{name}/")
        elif value is None:
            yield prefix + name, math.nan  # in metrics.jsonl, null is a number that is not finite
        elif isinstance(value, int | float) and prefix + name != ROUND:
            yield prefix + name, float(value)


class TensorBoard:
    """Event files in DIR/tensorboard, a scalar a number, with the round for a step."""

    def __init__(self, config: Config, workdir: Workdir):
        self._directory = workdir.root / "tensorboard"
        self._writer: Any = None

    def begin(self, records: Sequence[Record]) -> None:
        """Writes the file anew, so that no round is in it twice."""
        from tensorboard.summary import Writer

        with disk.writing(self._directory):
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory.mkdir(parents=True)
            self._writer = Writer(str(self._directory))
            for record in records:
                self._write(record)
            self._writer.flush()

    def add(self, record: Record) -> None:
        """Adds a round; an evaluation is on the disk at once, other rounds within two minutes or at the end."""
        with disk.writing(self._directory):
            self._write(record)
            if any(name.startswith("eval_") for name in record):
                self._writer.flush()

    def _write(self, record: Record) -> None:
        for name, value in scalars(record):
            self._writer.add_scalar(name, value, record[ROUND])

    def close(self) -> None:
        """Writes what is left."""
        if self._writer is not None:
            with disk.writing(self._directory):
                self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, whose files are in DIR/wandb; WANDB_PROJECT, WANDB_MODE and so on say the rest.

    Its id is made once for a workdir, so a run that is gone on with is the same one. A step of it is a round. What the
    service has it says itself. Offline, where nobody says what a killed process had still to write, all rounds since the
    last orderly end are told again, with the same numbers.
    """

    def __init__(self, config: Config, workdir: Workdir):
        self._config, self._workdir = config, workdir
        self._note = workdir.root / "wandb" / "told.json"  # its id, and the last round before an orderly end
        self._run: Any = None
        self._told = -1

    def begin(self, records: Sequence[Record]) -> None:
        """Opens the run, and tells it of the rounds that it has not heard of.

        Raises:
          UserError: if it can't be opened: nobody is logged in, or the service can't be reached.
        """
        import wandb

        note = read_note(self._note)
        self._id, self._told = str(note.get("id") or secrets.token_hex(4)), int(note.get("round", -1))
        self._note_down(self._told)
        try:
            self._run = wandb.init(
                id=self._id,
                resume="allow",
                name=self._workdir.root.resolve().name,
                dir=str(self._workdir.root),
                config=config_lib.flatten(config_lib.to_dict(self._config)),
                settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False),
            )
        except (wandb.errors.Error, OSError, ValueError) as error:
            why = " ".join(str(error).split())
            raise UserError(
                f"metrics.sinks: Weights & Biases can't be opened ({why}); wandb login, or WANDB_MODE=offline, mends that."
            ) from error
        if self._run.resumed:
            self._told = max(self._told, self._run.starting_step - 1)
        for record in records:
            self.add(record)

    def add(self, record: Record) -> None:
        """Tells of a round that it has not been told of before."""
        if record[ROUND] <= self._told:
            return
        named = {re.sub(r"[^\x20-\x7e]", "_", name): value for name, value in scalars(record)}
        self._run.log(named, step=record[ROUND], commit=True)
        self._told = record[ROUND]

    def close(self) -> None:
        """Waits until everything is sent, or written."""
        if self._run is not None:
            self._run.finish()
            self._note_down(self._told)

    def _note_down(self, round: int) -> None:
        with disk.writing(self._note):
            self._note.parent.mkdir(parents=True, exist_ok=True)
        disk.write_atomically(self._note, to_json({"id": self._id, "round": round}) + "\n")


def read_note(path: Path) -> Record:
    """Returns what a JSON file holds; {} if it isn't there, or can't be read."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}

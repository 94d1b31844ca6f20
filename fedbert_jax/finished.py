"""A run that has been trained, opened again for reading."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

from fedbert_jax.config import Config, MeshConfig, from_dict, to_dict, validate
from fedbert_jax.errors import UserError
from fedbert_jax.experiment import Run, build
from fedbert_jax.workdir import resume
from fedbert_jax.workdir.checkpoint import Checkpoints
from fedbert_jax.workdir.paths import Workdir


class Reopened(NamedTuple):
    """A run's workdir, open for reading."""

    run: Run
    checkpoints: Checkpoints
    round: int  # of the checkpoint that was asked for


def reopen(root: Path, round: int | None, changes: dict[str, Any] | None = None) -> Reopened:
    """Opens a run that has checkpoints, on whatever devices there are here.

    Args:
      root: the run's workdir.
      round: which checkpoint; None: the newest.
      changes: to the config, by dotted key, that change neither data nor parameters.

    Raises:
      UserError: if there is no such run or checkpoint, or config.json was edited.
    """
    workdir, (checkpoints, round) = Workdir(root), find_checkpoint(root, round)
    config = elsewhere(workdir.read_config())
    if not (workdir.data / "meta.json").is_file():
        raise UserError(f"{root} has no prepared text in {workdir.data}, where the tokenizer is.")
    config = changed(config, changes or {})
    return Reopened(build(config, workdir, begun=True), checkpoints, round)


def changed(config: Config, changes: dict[str, Any]) -> Config:
    """Returns a config with other values for some keys, dotted, validated.

    Raises:
      ConfigError: for a value or a combination that isn't accepted.
    """
    nested = to_dict(config)
    for key, value in changes.items():
        section, _, name = key.partition(".")
        nested[section][name] = value
    config = from_dict(nested)
    validate(config)
    return config


def elsewhere(config: Config) -> Config:
    """Returns a config for other devices than the run's, on which parameters don't depend."""
    return dataclasses.replace(
        config,
        mesh=MeshConfig(),
        model=dataclasses.replace(config.model, attention="xla"),
        data=dataclasses.replace(config.data, store="auto"),
    )


def find_checkpoint(root: Path, round: int | None) -> tuple[Checkpoints, int]:
    """Opens a workdir's checkpoints, and returns the round of the one asked for, by default of the newest.

    Raises:
      UserError: if there is no such checkpoint, or it was made with another config than config.json.
    """
    workdir = Workdir(root)
    checkpoints = Checkpoints(workdir.checkpoints) if workdir.checkpoints.is_dir() else None
    rounds = checkpoints.rounds() if checkpoints else []
    if not checkpoints or not rounds:
        raise UserError(f"{root} has no checkpoints yet.")
    if round is not None and round not in rounds:
        raise UserError(f"--round {round}: there is no such checkpoint; accepted: {', '.join(map(str, rounds))}.")
    found = rounds[-1] if round is None else round
    resume.check_unedited(workdir.config, workdir.read_config(), resume.Made(found, checkpoints.meta(found).get("config")))
    return checkpoints, found

"""The clients of a federation whose workdirs are here: what they sent, made once more from their own text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console

from fedbert_jax.config import Config
from fedbert_jax.data.streams import seeds_of
from fedbert_jax.errors import UserError
from fedbert_jax.federated.state import Rows
from fedbert_jax.finished import elsewhere
from fedbert_jax.jobs import open_job
from fedbert_jax.runtime.credentials import open_group_secret
from fedbert_jax.runtime.parties import ClientPrograms
from fedbert_jax.workdir.paths import Workdir


class Client(NamedTuple):
    """A client whose workdir is here."""

    root: Path
    source: str  # its `data.source`
    secret: int  # the clients'
    rows: Callable[[int], Rows]  # (round) -> what it trains on, [K, B, ...]
    programs: ClientPrograms
    text: tuple[np.ndarray, ...]  # its own, as tokens [n, T]


def open_clients(roots: Sequence[Path], roster: Sequence[str], run: str, cohort: int) -> dict[int, Client]:
    """Opens clients' workdirs; returns them by their places in the roster.

    Args:
      roots: their workdirs.
      roster: the clients' names, as the server has them.
      run: the training's name, as the server has it.
      cohort: how many take part in a round.

    Raises:
      UserError: if one is no workdir of a client of this training, or its text or the clients' secret isn't there.
    """
    found: dict[int, Client] = {}
    for root in roots:
        workdir = Workdir(root)
        config = elsewhere(workdir.read_config())
        if config.task != "join":
            raise UserError(f"--clients {root}: it is a workdir of task={config.task!r}; accepted: those of task='join'.")
        name = config.network.name or root.resolve().name
        if name not in roster or workdir.read_facts().get("run") != run:
            raise UserError(
                f"--clients {root}: {name!r} has no part in the server's training; accepted: the workdirs of "
                f"{', '.join(roster)}, whose names (network.name, or else the directory's) must have stayed."
            )
        if (index := roster.index(name)) in found:
            raise UserError(f"--clients {root}: the workdir of {name!r} is given twice.")
        found[index] = _open(workdir, config, index, name, len(roster), cohort)
    if len({client.secret for client in found.values()}) > 1:
        raise UserError("--clients: these clients don't have the same secret, so they are not of one training.")
    return found


def _open(workdir: Workdir, config: Config, index: int, name: str, clients: int, cohort: int) -> Client:
    if config.network.credentials and config.privacy.client_seed is None:
        secret = open_group_secret(Path(config.network.credentials).expanduser(), name)
        config = dataclasses.replace(config, privacy=dataclasses.replace(config.privacy, client_seed=secret))
    if not config.labelled and not (workdir.data / "meta.json").is_file():
        raise UserError(f"--clients {workdir.root}: it has no prepared text in {workdir.data}.")
    job = open_job(config)
    job.read(index, name, workdir, Console(quiet=True))
    programs = ClientPrograms(job.setting(clients, cohort), index, config.wire.microbatches)
    rows, secret = job.shard(index).rows, seeds_of(config).client
    return Client(workdir.root, config.data.source, secret, rows, programs, job.text())

"""What a federation's server and clients need to know of what is trained; all else is the same for every job."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from rich.console import Console

from fedbert_jax import config as config_lib
from fedbert_jax.config import Config
from fedbert_jax.federated.evaluation import Exam
from fedbert_jax.federated.setting import Setting
from fedbert_jax.federated.state import Rows
from fedbert_jax.models.bert import ClientParams, ServerParams
from fedbert_jax.runtime.frames import Schema
from fedbert_jax.workdir.paths import Workdir


class Shard(NamedTuple):
    """What a client trains on and is judged by: its own, and nobody else's."""

    size: int  # blocks of text, or examples: what it declares
    rows: Callable[[int], Rows]  # (round) -> [K, B, ...]
    trials: Sequence[Rows]  # rows [B, ...] of each length that comes up, for which steps are compiled; (): the first round's
    exam: Exam


class Verdict(NamedTuple):
    """An evaluation."""

    fields: dict[str, Any]  # for metrics.jsonl
    text: str  # for the console


class Job(Protocol):
    """One party's view of what is trained."""

    config: Config  # resolved; once the clients are known, with their number
    tokenizer: Any
    agreed: Mapping[str, Any]  # what all parties must have the same, beside config keys
    unit: tuple[str, int]  # what rows are counted in, and how many of it a row is
    lengths: tuple[int, ...]  # that rows may be padded to; (): they all have one
    sums: tuple[int, ...]  # the shape of what a client says of its answers

    def setting(self, clients: int, cohort: int) -> Setting:
        """Returns what the simulation's setting is, for the same clients."""
        ...

    def batch(self) -> Rows:
        """Returns the shapes of what a client trains on in a step, [B, ...]; T is the longest."""
        ...

    def questions(self) -> Schema:
        """Returns what is expected of a batch of an evaluation."""
        ...

    def fill(self, client: ClientParams, server: ServerParams) -> tuple[ClientParams, ServerParams, list[str]]:
        """Fills a new model from the checkpoint that it starts from; also returns sentences about what that lacks."""
        ...

    def read(self, index: int, name: str, workdir: Workdir, console: Console) -> None:
        """Reads what the client of this place in the roster has, and shows how much."""
        ...

    def shard(self, index: int) -> Shard:
        """Returns what was read, as it is trained on."""
        ...

    def text(self) -> tuple[np.ndarray, ...]:
        """Returns what was read as tokens, each [n, T]."""
        ...

    def judge(self, sums: Mapping[str, np.ndarray], sizes: Mapping[str, int]) -> Verdict | None:
        """Turns what clients have said of their answers into scores; None if nobody was asked anything.

        Args:
          sums: by client.
          sizes: what every client declared.
        """
        ...

    def judge_own(self, sums: np.ndarray) -> Verdict | None:
        """Turns what this client has said of its own answers into scores; None if it wasn't asked anything."""
        ...

    def save(
        self, directory: Path, client: ClientParams, server: ServerParams, round: int, verdict: Verdict | None = None
    ) -> None:
        """Writes the model of a round as a Hugging Face directory; `verdict` is on this client's own held-out data."""
        ...


def settled(config: Config, clients: int) -> Config:
    """Returns a party's config once it is known how many clients there are; raises ConfigError if that can't run."""
    config = config_lib.work_out(config, 0, clients, None)
    config = dataclasses.replace(config, federated=dataclasses.replace(config.federated, num_clients=clients))
    config_lib.validate(config)
    return config

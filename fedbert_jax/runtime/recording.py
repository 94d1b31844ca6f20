"""What a server keeps of its clients' messages for an audit: those of a round in one file, as they came.

Recorded are the first round, the one after each checkpoint, and the last one; as many of the newest stay as checkpoints do.

A tensor's name in a file is CLIENT/STEP/PART/NAME: the client's place in the roster, the step from 0 (what comes after the
last one is of the round's end), which of the step's microbatches, and its name in the message. What the server held as the
round began is named began/segment/..., began/opt/... and began/body/....
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedbert_jax import disk
from fedbert_jax.errors import UserError
from fedbert_jax.federated.wire import MESSAGES
from fedbert_jax.runtime.engine import FORWARD, Engine
from fedbert_jax.runtime.frames import Tensors
from fedbert_jax.runtime.payloads import to_tensors
from fedbert_jax.runtime.turns import Compute

Place = tuple[int, int, int]  # client, step, part


class Recorder:
    """The server's arithmetic (`work.Work`), which also keeps the messages of some rounds.

    A file is written when its round is over, of the messages that counted: a round that begins again begins with none.

    Args:
      engine: the arithmetic.
      folder: where the files go.
      done: finished rounds. What was recorded of later ones is removed: a server that has gone back makes them again.
      run: the training's name.
    """

    def __init__(self, engine: Engine, folder: Path, done: int, run: str):
        self._engine, self._folder, self._run = engine, folder, run
        self.weights, self.schema = engine.weights, engine.schema
        self.segment, self.transform = engine.segment, engine.transform
        self._kept: Tensors | None = None  # of the round under way; None: it isn't recorded
        with disk.writing(folder):
            folder.mkdir(exist_ok=True)
            for left in folder.glob("*.new"):  # of a process that was killed while it wrote
                left.unlink()
            for round in recorded_rounds(folder):
                if round >= done:
                    _path(folder, round).unlink()

    def begin(self, round: int, members: tuple[str, ...], blocks: Mapping[str, int]) -> None:
        """Begins a round, anew or again."""
        self._engine.begin(round, members, blocks)
        last = round + 1 == self._engine.f.rounds
        self._kept = {} if last or round % self._engine.s.config.checkpoint.every_rounds == 0 else None
        self._round, self._members, self._shares = round, members, self.weights(members, blocks)
        self._state = self._engine.state if self._kept is not None else None

    def compute(self, what: Compute) -> tuple[Mapping[str, Tensors], Callable[[], None]]:
        """Computes a barrier; what keeps the result also keeps its messages."""
        answers, keep = self._engine.compute(what)
        if self._kept is None:
            return answers, keep

        def keep_both() -> None:
            keep()
            assert self._kept is not None
            for client, tensors in what.messages.items():
                crossed = tensors | (answers[client] if what.barrier.phase == FORWARD else {})
                place = f"{self._engine.roster.index(client)}/{what.barrier.step}/{what.barrier.part}"
                self._kept |= {f"{place}/{name}": x for name, x in crossed.items()}

        return answers, keep_both

    def finish_round(self) -> None:
        """Ends a round, and writes what was kept of it."""
        self._engine.finish_round()
        if self._kept is None:
            return
        from safetensors.numpy import save_file

        state, self._state = self._state, None
        assert state is not None
        began = to_tensors("began", {"segment": state.segment, "opt": state.segment_opt, "body": state.body})
        said = {"members": self._members, "shares": list(self._shares), "roster": self._engine.roster, "run": self._run}
        with disk.replacing(_path(self._folder, self._round)) as path:
            # It writes the bytes from where an array begins, whatever its strides are.
            tensors = {name: np.asarray(x, order="C") for name, x in (self._kept | began).items()}
            save_file(tensors, path, {"said": json.dumps(said)})
        self._kept = None
        for round in recorded_rounds(self._folder)[: -self._engine.s.config.checkpoint.keep]:
            _path(self._folder, round).unlink()


class Recorded(NamedTuple):
    """What was kept of a round."""

    round: int  # from 0: how many were finished when it began
    roster: tuple[str, ...]  # all clients
    members: tuple[str, ...]  # who was in it when it began, in the order of turns where clients take turns
    shares: dict[str, float]  # the members', in averages
    run: str  # the training's name
    began: Tensors  # what the server held as it began
    messages: dict[Place, Tensors]

    def has(self, *names: str) -> Callable[[Place], bool]:
        """Returns whether messages with tensors of all these names came from a place."""
        there = lambda name, at: any(x.split("/")[0] == name for x in self.messages.get(at, {}))  # noqa: E731
        return lambda at: all(there(name, at) for name in names)


def recorded_rounds(folder: Path) -> list[int]:
    """Returns the rounds that are recorded in a folder, which need not exist; ascending, from 0."""
    found = (re.fullmatch(r"round_(\d+)\.safetensors", path.name) for path in folder.glob("round_*.safetensors"))
    return sorted(int(match[1]) for match in found if match)


def read_recorded(folder: Path, round: int, names: Sequence[str] | None = None) -> Recorded:
    """Reads what was kept of a round.

    Args:
      folder: from which.
      round: from `recorded_rounds`.
      names: what of messages, as their tensors' names begin; None: everything.

    Raises:
      UserError: if the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    path, began, messages = _path(folder, round), dict[str, Any](), dict[Place, Tensors]()
    try:
        with safe_open(path, framework="np") as file:  # bfloat16 through ml_dtypes
            said = json.loads(file.metadata()["said"])
            for key in list(file.keys()):
                if key.startswith("began/"):
                    began[key] = file.get_tensor(key)
                    continue
                *place, name = key.split("/", 3)
                client, step, part = map(int, place)
                if (kind := name.split("/")[0]) not in MESSAGES:
                    raise UserError(f"{path} was recorded by another version of fedbert_jax: it knows a message {kind!r}.")
                if names is None or kind in names:
                    messages.setdefault((client, step, part), {})[name] = file.get_tensor(key)
        shares = dict(zip(said["members"], said["shares"], strict=True))
        return Recorded(round, tuple(said["roster"]), tuple(said["members"]), shares, said["run"], began, messages)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} can't be read: it is damaged or not all there ({type(error).__name__}).") from error


def _path(folder: Path, round: int) -> Path:
    return folder / f"round_{round:06d}.safetensors"

"""A party of a federation that falls at an exact place: `falls.py PLACE ARGUMENTS-OF-THE-COMMAND`.

It is the real command, in which one function kills the process with SIGKILL, or fills the disk, before it goes on. What it
says then is the log's proof that it fell there.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Iterator
from typing import Any

from fedbert_jax import cli, main
from fedbert_jax.runtime import grpc
from fedbert_jax.runtime.engine import BACKWARD, Engine
from fedbert_jax.runtime.participant import Line
from fedbert_jax.runtime.turns import Compute, Id
from fedbert_jax.workdir.checkpoint import Checkpoints

STEPS = 2  # of a round, as tests/network.py has it: messages 0 to 3 are theirs, and 4 is the upload


def die(where: str) -> None:
    print(f"falls {where}", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def between(round: int) -> None:
    """A client, between a step's Forward, which was answered, and its Backward."""
    post = Line.post

    def posts(self: Line, id: Id, tensors: Any) -> Any:
        if (id.round, id.at) == (round, 3):
            die(f"between Forward and Backward, round {id.round}, message {id.at}")
        return post(self, id, tensors)

    Line.post = posts  # type: ignore[method-assign]


def upload(round: int) -> None:
    """A client, when some chunks of its upload are sent and others are not."""
    post, chunks_of = Line.post, grpc.chunks_of
    now: list[Id] = []

    def posts(self: Line, id: Id, tensors: Any) -> Any:
        now[:] = [id]
        if (id.round, id.at) == (round, 2 * STEPS):
            grpc.CHUNK = 1000  # a frame of one chunk would leave whole
        return post(self, id, tensors)

    def chunks(data: bytes) -> Iterator[bytes]:
        if not now or (now[0].round, now[0].at) != (round, 2 * STEPS):
            yield from chunks_of(data)
            return
        for n, start in enumerate(range(0, len(data), 1000)):
            if n == 3:
                die(f"in Upload, round {round}, with {start} of {len(data)} bytes sent")
            yield data[start : start + 1000]

    Line.post, grpc.chunks_of = posts, chunks  # type: ignore[method-assign]


def step(round: int) -> None:
    """The server, with a step's new weights computed and neither kept nor told."""
    compute = Engine.compute

    def computes(self: Engine, what: Compute) -> Any:
        found = compute(self, what)
        if (what.barrier.phase, what.id.round, what.barrier.step) == (BACKWARD, round, 1):
            die(f"in a step, round {round}, step 1")
        return found

    Engine.compute = computes  # type: ignore[method-assign]


def save(round: int) -> None:
    """The server, while its checkpoint is being written."""
    import orbax.checkpoint as ocp

    saves = ocp.CheckpointManager.save

    def saving(self: Any, at: int, *args: Any, **kwargs: Any) -> Any:
        result = saves(self, at, *args, **kwargs)
        if at == round:
            die(f"in a checkpoint write: {[n for n in os.listdir(self.directory) if n.startswith(str(round))]}")
        return result

    ocp.CheckpointManager.save = saving  # type: ignore[method-assign]


def term(round: int) -> None:
    """The server, which gets a SIGTERM in the midst of a step, and goes on."""
    compute = Engine.compute

    def computes(self: Engine, what: Compute) -> Any:
        if (what.barrier.phase, what.id.round, what.barrier.step) == (BACKWARD, round, 1):
            print(f"SIGTERM in a step, round {round}, step 1", flush=True)
            os.kill(os.getpid(), signal.SIGTERM)
        return compute(self, what)

    Engine.compute = computes  # type: ignore[method-assign]


def term_client(round: int) -> None:
    """A client, which gets a SIGTERM between a step's Forward and its Backward, and goes on."""
    post = Line.post

    def posts(self: Line, id: Id, tensors: Any) -> Any:
        if (id.round, id.at) == (round, 3):
            print(f"SIGTERM between Forward and Backward, round {id.round}", flush=True)
            os.kill(os.getpid(), signal.SIGTERM)
        return post(self, id, tensors)

    Line.post = posts  # type: ignore[method-assign]


def _fill() -> None:
    """From now on no file of this process grows beyond 6,000 bytes: the closest to a full disk without being root."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def full(round: int) -> None:
    """The server, whose disk is full when it writes its checkpoint."""
    saves = Checkpoints.save

    def saving(self: Checkpoints, at: int, state: Any, meta: Any) -> None:
        if at == round:
            _fill()
        saves(self, at, state, meta)

    Checkpoints.save = saving  # type: ignore[method-assign]


def full_export(_: int) -> None:
    """A client, whose disk is full when it writes its model."""
    from fedbert_jax.models import huggingface

    writes = huggingface.save

    def saving(*args: Any, **kwargs: Any) -> None:
        _fill()
        writes(*args, **kwargs)

    huggingface.save = saving


if __name__ == "__main__":
    name, _, number = sys.argv.pop(1).partition(":")
    {f.__name__: f for f in (between, upload, step, save, term, term_client, full, full_export)}[name](int(number or 0))
    cli.run(main.main)

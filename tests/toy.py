"""A federation with arithmetic in place of a model: the real session, service, frames and transports, in milliseconds.

As a program it is one party in a process of its own, to be killed or stopped: `toy.py server PORT CHECKPOINT [JSON]`,
`toy.py client PORT NAME [JSON]`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from fedbert_jax.errors import UserError
from fedbert_jax.runtime.calls import Abort, Hello
from fedbert_jax.runtime.frames import Schema, Tensors, TensorSpec
from fedbert_jax.runtime.member import Ended, Held
from fedbert_jax.runtime.participant import Line, Participant
from fedbert_jax.runtime.service import Service
from fedbert_jax.runtime.session import Session
from fedbert_jax.runtime.turns import Barrier, Compute, Id, Rules

NAMES = ("adams", "jefferson", "washington")
BLOCKS = {"adams": 51, "jefferson": 365, "washington": 116}
STEPS, ROUNDS, SIZE = 4, 3, 64
HELLO = Hello({"federated.rounds": ROUNDS}, "tokenizer", "secret", "0")
X = {"x": TensorSpec("float32", (4, SIZE))}


def script(members: tuple[str, ...], round: int) -> list[Barrier]:
    steps = [Barrier(phase, k, members) for k in range(STEPS) for phase in ("forward", "backward")]
    return [*steps, Barrier("upload", STEPS, members)]


class Work:
    """The server: a body that backward messages move, and a segment that uploads are averaged into."""

    def __init__(self, checkpoint: Path | None = None):
        self.body, self.client = np.zeros(SIZE, np.float32), np.ones(SIZE, np.float32)
        self.round, self.checkpoint = 0, checkpoint
        if checkpoint is not None and checkpoint.exists():
            found = json.loads(checkpoint.read_text())
            self.round = found["round"]
            self.body, self.client = (np.array(found[k], np.float32) for k in ("body", "client"))
        self.work = (self.body, self.client)
        self.history: list[tuple[str, int, tuple[str, ...]]] = []  # phase, step, who: of what was kept
        self.pause: Callable[[str, int, int], None] = lambda phase, round, step: None

    def weights(self, members: Sequence[str], blocks: Mapping[str, int]) -> list[float]:
        total = sum(blocks[c] for c in members)
        return [blocks[c] / total for c in members]

    def begin(self, round: int, members: tuple[str, ...], blocks: Mapping[str, int]) -> None:
        self.work, self.now = (self.body, self.client), round
        self.share = dict(zip(members, self.weights(members, blocks), strict=True))

    def schema(self, barrier: Barrier) -> Schema:
        return {"forward": X, "backward": X, "upload": X}[barrier.phase]

    def compute(self, what: Compute) -> tuple[dict[str, Tensors], Callable[[], None]]:
        body, client = self.work
        weights = np.array([self.share[c] for c in what.messages], np.float32)
        weights /= weights.sum()
        x = np.stack([m["x"] for m in what.messages.values()])
        if what.barrier.phase == "forward":
            answers = {c: {"x": x[n] + body} for n, c in enumerate(what.messages)}
        elif what.barrier.phase == "backward":
            body = np.float32(0.9) * body + np.float32(0.1) * np.tensordot(weights, x.mean(1), 1)
            answers = {c: {"x": 2 * x[n]} for n, c in enumerate(what.messages)}
        else:
            client = np.tensordot(weights, x.mean(1), 1)
            answers = {c: {"x": client} for c in what.messages}
        self.pause(what.barrier.phase, what.id.round, what.barrier.step)

        def keep() -> None:
            self.work = (body, client)
            self.history.append((what.barrier.phase, what.barrier.step, tuple(what.messages)))

        return answers, keep

    def finish_round(self) -> None:
        (self.body, self.client), self.round = self.work, self.now + 1
        if self.checkpoint is not None:
            saved = {"round": self.round, "body": self.body.tolist(), "client": self.client.tolist()}
            temporary = self.checkpoint.with_suffix(".tmp")
            temporary.write_text(json.dumps(saved))
            self.pause("checkpoint", self.now, 0)
            os.replace(temporary, self.checkpoint)

    def segment(self) -> Tensors:
        return {"x": self.work[1]}

    def transform(self, tensors: Tensors) -> Tensors:
        return tensors


class Part:
    """A client: what it sends follows from the round, its name and the segment. `trouble` is called before each message."""

    in_turn = False

    def __init__(self, name: str, trouble: Callable[[str, int, int], None] = lambda phase, round, step: None):
        self.name, self.trouble = name, trouble

    def fresh(self) -> Held:
        return Held(np.ones(SIZE, np.float32), (), (), 0)

    def received(self, tensors: Tensors, held: Held | None, round: int) -> Held:
        return Held(tensors["x"], (), (), round)

    def first_message(self, members: Sequence[str], me: str) -> int:
        return 0

    def scores_at(self, members: Sequence[str]) -> int:
        return 2 * STEPS + 1

    def run_round(
        self, held: Held, id: Id, members: Sequence[str], me: str, weight: float, evaluates: bool, wire: Any
    ) -> Ended:
        rng, segment, at = np.random.default_rng([id.round, NAMES.index(self.name)]), held.segment, 0

        def ask(phase: str, step: int, x: np.ndarray) -> np.ndarray:
            nonlocal at
            self.trouble(phase, id.round, step)
            future: Future[Tensors] = wire.post(id._replace(at=at), {"x": x})
            at += 1
            return future.result()["x"]

        for k in range(STEPS):
            h = rng.normal(size=(4, SIZE)).astype(np.float32) * segment
            z = ask("forward", k, h)
            dh = ask("backward", k, z * np.float32(0.5))
            segment = segment - np.float32(0.01) * dh.mean(0)
        after = ask("upload", STEPS, np.broadcast_to(segment, (4, SIZE)).copy())
        self.trouble("done", id.round, STEPS)
        return Ended(Held(after, (), (), id.round + 1), 0.0, None)


class Local:
    """A transport that is a function call, in which things go wrong when they are told to."""

    def __init__(self, service: Service, name: str):
        self.service, self.name = service, name
        self.lose_answers_of: set[str] = set()  # methods whose next answer gets lost

    def call(self, method: str, data: bytes, timeout: float) -> bytes:
        answer = self.service.call(method, self.name, data)
        if method in self.lose_answers_of:
            self.lose_answers_of.discard(method)
            raise Abort("UNAVAILABLE", "the answer got lost")
        return answer


def same(a: Work, b: Work) -> bool:
    """Whether two servers ended with the same bits."""
    return a.round == b.round and np.array_equal(a.body, b.body) and np.array_equal(a.client, b.client)


def make(checkpoint: Path | None = None, rounds: int = ROUNDS, **rules: Any) -> tuple[Service, Work]:
    """A service and its work; rounds that a checkpoint has are over."""
    work = Work(checkpoint)
    rules = dict(quorum=3, deadline=20.0, join_grace=20.0) | rules
    epoch = int(time.time() * 1000)
    session = Session(NAMES, rounds, Rules(**rules), lambda round: NAMES, script, epoch=epoch, round=work.round)
    return Service(session, work, HELLO._replace(secret=""), X), work


def participant(name: str, transport: Any, part: Part | None = None, patience: float = 20.0) -> Participant:
    line = Line(transport, 1, 1 << 20, patience, timeout=20.0, sleep=lambda seconds: time.sleep(min(seconds, 0.1)))
    return Participant(part or Part(name), line, name, HELLO, BLOCKS[name], wait=0.3)


def run(
    service: Service, transports: Mapping[str, Any], parts: Mapping[str, Part] | None = None, **options: Any
) -> dict[str, BaseException | None]:
    """Trains with every client in a thread; returns what each ended with."""
    ends: dict[str, BaseException | None] = {}

    def take_part(name: str) -> None:
        try:
            participant(name, transports[name], (parts or {}).get(name), **options).run()
            ends[name] = None
        except BaseException as error:
            ends[name] = error
            if isinstance(error, UserError):  # nobody expects that, and the others would wait for ever
                service.stop()

    threads = [threading.Thread(target=take_part, args=(name,), daemon=True) for name in transports]
    for thread in threads:
        thread.start()
    service.run()
    for thread in threads:
        thread.join(20)
    return ends


QUICK = {f"grpc.{key}": 1000 for key in ("keepalive_time_ms", "keepalive_timeout_ms", "http2.ping_timeout_ms")}


def notice_soon(options: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """gRPC's options, by which a connection that is dead is noticed in two seconds, and not in fifty."""
    assert QUICK.keys() <= dict(options).keys()
    return list((dict(options) | QUICK).items())


def main() -> None:
    from fedbert_jax.runtime import grpc as transport

    kind, port, what = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    given = json.loads(sys.argv[4]) if len(sys.argv) > 4 else {}
    spot, quick, rules = given.get("spot"), given.get("quick"), given.get("rules", {})  # where this process stops
    if quick:
        transport.OPTIONS = notice_soon(transport.OPTIONS)

    def stop_here(phase: str, round: int, step: int) -> None:
        if spot == [phase, round, step]:
            if given.get("goes_on"):
                os.kill(os.getpid(), signal.SIGSTOP)  # it is there and does nothing, until somebody sends SIGCONT
            else:
                print(f"AT {phase} {round} {step}", flush=True)
                time.sleep(3600)  # to be killed here

    if kind == "server":
        service, work = make(Path(what), **rules)
        work.pause = stop_here
        server = transport.Server(service, "127.0.0.1", port)
        print("UP", server.port, flush=True)
        service.run()
        service.farewell(60.0)
        server.stop()
        print("END", json.dumps([work.body.tolist(), work.client.tolist(), work.history]), flush=True)
    else:
        client = transport.Client("127.0.0.1", port, what, None, 1 << 20)
        one = participant(what, client, Part(what, stop_here), patience=60.0)
        one.line._say = lambda text: print(text, flush=True)
        one.run()
        one.line.ask("bye", {})
        print("END", flush=True)


if __name__ == "__main__":
    main()

"""One party of a measured federation, in a process of its own: what its programs take, what crosses, and a whole round.

The parent writes one JSON object per line to the child's standard input, and reads one per line back (`worker.Worker`).
"""

from __future__ import annotations

import json
import os
import queue
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.payloads import ROUNDS, built, frames_of, invented
from benchmarks.watch import compilations
from benchmarks.worker import replying

# JAX and the package are imported when the process has been given its cores.

LIMIT = 1 << 31  # bytes of an answer
WAIT = 3600.0  # seconds: nobody is late here
PHASES = ("draw", "begin", "head", "finish", "step"), ("forward", "backward", "step")  # a client's programs, the server's


class Clock:
    """Adds up the seconds of phases, each to the end of its arrays' computation."""

    def __init__(self, phases: tuple[str, ...]):
        self.seconds = dict.fromkeys(phases, 0.0)

    def __call__(self, phase: str, run: Callable[..., Any], *args: Any) -> Any:
        import jax

        start = time.perf_counter()
        result = jax.block_until_ready(run(*args))
        self.seconds[phase] += time.perf_counter() - start
        return result

    def per_step(self, steps: int) -> dict[str, float]:
        """Returns milliseconds a step, by phase."""
        return {phase: 1e3 * seconds / steps for phase, seconds in self.seconds.items()}


class Echo:
    """A service that computes nothing: it answers a frame of the size that a real one would be answered with."""

    def __init__(self, replies: dict[str, bytes]):
        self.replies = replies  # method -> frame

    def limit(self, method: str) -> int:
        return LIMIT

    def call(self, method: str, client: str, data: bytes, alive: Callable[[], bool] = lambda: True) -> bytes:
        return self.replies[method]

    def stop(self) -> None:
        pass


class Server:
    """The server's process: the federation at one port, and `Echo` at another."""

    def __init__(self, spec: dict[str, Any]):
        from fedbert_jax.runtime import grpc
        from fedbert_jax.runtime.calls import Hello
        from fedbert_jax.runtime.credentials import load_credentials, load_roster
        from fedbert_jax.runtime.engine import Engine
        from fedbert_jax.runtime.payloads import schema_of
        from fedbert_jax.runtime.script import questions
        from fedbert_jax.runtime.service import Service
        from fedbert_jax.runtime.session import Session
        from fedbert_jax.runtime.turns import Rules

        self.b, self.parts, self.steps = built(spec), spec["parts"], spec["steps"]
        b = self.b
        self.engine = engine = Engine(b.setting, b.names, b.rows, self.parts)
        self.programs = dict(vars(engine.programs))
        session = Session(
            b.names, ROUNDS, Rules(spec["clients"], WAIT, WAIT, self.parts), lambda round: b.names,
            lambda members, round: engine.script(members, round, False),
        )  # fmt: skip
        service = Service(
            session, engine, Hello({}, "", "", ""), questions(1, 1, 1, 1),
            segment=schema_of("first_segment", b.shapes.segment), on_segment=engine.begin_with,
        )  # fmt: skip
        folder = spec["credentials"] and Path(spec["credentials"]) / "server"
        who = (load_credentials(folder, "server"), lambda: load_roster(folder)) if folder else ()
        self.session = session
        self.servers = [grpc.Server(service, "127.0.0.1", 0, *who)]
        replies = {method: reply for method, (_, reply) in frames_of(b).items()}
        self.servers.append(grpc.Server(Echo(replies), "127.0.0.1", 0, *who))  # type: ignore[arg-type]
        self.facts = {"ports": [server.port for server in self.servers]}
        threading.Thread(target=self._serve, args=(service,), daemon=True).start()

    def _serve(self, service: Any) -> None:
        def watch(session: Any) -> None:
            session.events.clear()

        try:
            service.run(watch)
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    def compute(self) -> dict[str, Any]:
        """Runs the programs of a round's steps with nothing between them; returns milliseconds a step, by phase."""
        import jax

        e, clock, slots = self.engine, Clock(PHASES[1]), self.engine.slots.size
        assert e.state is not None
        lift = lambda like: jax.tree.map(  # noqa: E731
            lambda x: np.stack([x] * slots), invented(like, self.b.config.data.seq_len)
        )
        up, dz, body, opt = lift(self.b.shapes.up), lift(self.b.shapes.gradient), e.state.body, e.state.body_opt
        p, weights, ids = self.programs, np.full(slots, 1 / slots, np.float32), np.arange(slots, dtype=np.int32)
        for k in range(self.steps):
            kept = [
                clock("forward", p["forward"], body, up, weights, np.int32(0), np.int32(k), ids)[1]
                for _ in range(self.parts)
            ]
            total = None
            for one in kept:
                grads, _ = clock("backward", p["backward"], one, dz, weights)
                total = grads if total is None else clock("step", p["add"], total, grads)
            body, opt, _ = clock("step", p["update"], total, opt, body, np.int32(k))
        return {"ms": clock.per_step(self.steps)}

    def traffic(self) -> dict[str, Any]:
        """Returns the bytes of a round, as the package accounts for them."""
        from fedbert_jax.federated.traffic import round_traffic

        return {"bytes": sum(round_traffic(self.b.setting, self.b.rows).values())}

    def still(self, on: bool) -> None:
        """Lets the programs compute nothing, or what they are for."""
        import jax

        p, slots = self.engine.programs, self.engine.slots.size
        vars(p).update(self.programs)
        if on:
            lift = lambda like: jax.tree.map(lambda x: np.stack([x] * slots), invented(like, 2))  # noqa: E731
            z, dh = lift(self.b.shapes.hidden), lift(self.b.shapes.up.activations)
            p.forward = lambda *args: (z, None)
            p.backward = lambda *args: (0, dh)
            p.update = lambda grads, opt, body, step: (body, opt, np.zeros((), np.float32))
            p.add = lambda a, b: 0


class Client:
    """A client's process."""

    def __init__(self, spec: dict[str, Any]):
        from fedbert_jax.runtime import grpc
        from fedbert_jax.runtime.calls import Hello
        from fedbert_jax.runtime.credentials import load_credentials
        from fedbert_jax.runtime.member import Member
        from fedbert_jax.runtime.participant import Participant

        self.b, self.parts, self.steps, self.name = built(spec), spec["parts"], spec["steps"], spec["name"]
        shape = (self.steps, *self.b.rows.shape)
        self.tokens = np.random.default_rng(spec["index"]).integers(5, spec["model"]["vocabulary"], shape).astype(np.uint16)
        no_exam: Any = None  # no round ends with an evaluation
        rows = lambda round: self.tokens  # noqa: E731
        self.member = Member(self.b.setting, spec["index"], rows, self.b.shapes, no_exam, self.parts)
        self.programs = dict(vars(self.member.programs)) | {"draw": self.member.programs.draw}
        self.member.compile()
        folder = spec["credentials"] and Path(spec["credentials"]) / self.name
        who = load_credentials(folder, self.name) if folder else None
        transport, self.echo = (grpc.Client("127.0.0.1", p, self.name, who, LIMIT, self.parts) for p in spec["ports"])
        self.gate, self.done = threading.Semaphore(0), queue.Queue[float | BaseException]()
        per_step = 2 * self.parts + self.b.setting.how.averages_gradients
        self.line = clocked(transport, self.parts, per_step)
        self.participant = Participant(self.member, self.line, self.name, Hello({}, "", "", ""), 1000)
        self.pool = ThreadPoolExecutor(self.parts)
        self.frames = frames_of(self.b)
        threading.Thread(target=self._take_part, daemon=True).start()
        self.facts = {
            "bytes": {"up": [len(up) for up, _ in self.frames.values()], "down": [len(d) for _, d in self.frames.values()]}
        }

    def _take_part(self) -> None:
        def on_round(round: int, ended: Any) -> None:
            self.done.put(self.line.step_seconds())
            self.gate.acquire()

        try:
            self.gate.acquire()
            self.participant.run(on_round)
        except BaseException as error:
            self.done.put(error)

    def round(self) -> dict[str, Any]:
        """Takes part in a round; returns the milliseconds of a step: from its first message to the next step's."""
        self.gate.release()
        found = self.done.get()
        if isinstance(found, BaseException):
            raise found
        return {"ms": 1e3 * found}

    def compute(self) -> dict[str, Any]:
        """Runs the programs of a round's steps with nothing between them; returns milliseconds a step, by phase."""
        clock, p = Clock(PHASES[0]), self.programs
        held, length = self.member.fresh(), self.b.config.data.seq_len
        segment, opt = held.segment, held.opt or p["new_optimizer"](held.segment)
        z, dh = invented(self.b.shapes.hidden, length), invented(self.b.shapes.up.activations, length)
        parts = [np.int32(n) for n in range(self.parts)]
        for k in range(self.steps):
            drawn = clock("draw", p["draw"], self.tokens[k], np.int32(0), np.int32(k))
            kept = [clock("begin", p["begin"], segment, drawn, n)[1] for n in parts]
            heads = [clock("head", p["head"], segment, drawn, n, z)[1] for n in parts]
            total = None
            for one, head in zip(kept, heads, strict=True):
                grads = clock("finish", p["finish"], one, dh, head)
                total = grads if total is None else clock("finish", p["add"], total, grads)
            segment, opt, _ = clock("step", p["update"], total, opt, segment, np.int32(k))
        return {"ms": clock.per_step(self.steps)}

    def transfer(self) -> dict[str, Any]:
        """Sends a round's frames there and gets those back that answer them; returns milliseconds a step."""
        seconds = []
        for _ in range(self.steps):
            start = time.perf_counter()
            for method, (frame, _) in self.frames.items():
                sent: list[Future[bytes]] = []
                for _ in range(self.parts):
                    sent.append(self.pool.submit(self.echo.call, method, frame, WAIT))
                for one in sent:
                    one.result()
            seconds.append(time.perf_counter() - start)
        return {"ms": 1e3 * statistics.fmean(seconds)}

    def still(self, on: bool) -> None:
        """Lets the programs compute nothing, or what they are for."""
        p = self.member.programs
        vars(p).update(self.programs)
        if on:
            up, dz = invented(self.b.shapes.up, 2**15), invented(self.b.shapes.gradient, 2)
            contribution, zero = invented(self.b.shapes.contribution, 2), np.zeros((), np.float32)
            p.draw = lambda *args: None
            p.begin = lambda *args: (up, None)
            p.head = lambda *args: (zero, None, dz)
            p.finish = p.add = lambda *args: zero
            p.update = lambda grads, opt, params, step: (params, opt, zero)
            p.contribution = lambda grads, unsent, weight: (contribution, unsent)
            p.mean_gradient = lambda payload: payload


def clocked(transport: Any, parts: int, per_step: int) -> Any:
    """Returns a client's line that notes when each step of a round sends its first message."""
    from fedbert_jax.runtime.participant import Line

    class Clocked(Line):
        starts: list[float]

        def post(self, id: Any, tensors: Any) -> Any:
            if id.at == 0:
                self.starts = []
            if id.at % per_step == 0:
                self.starts.append(time.perf_counter())
            return super().post(id, tensors)

        def step_seconds(self) -> float:
            # The last interval ends with the segment's upload, which is no step's.
            return statistics.fmean(np.diff(self.starts)[:-1])

    return Clocked(transport, parts, LIMIT, WAIT, WAIT)


def main() -> None:
    reply = replying()
    spec = json.loads(sys.stdin.readline())
    try:
        if spec["cores"]:
            os.sched_setaffinity(0, spec["cores"])
        import jax  # noqa: F401

        compilations()  # begins to count, now that JAX is there
        party = {"server": Server, "client": Client}[spec["role"]](spec)
        reply(party.facts)
        for line in sys.stdin:
            request = json.loads(line)
            found = getattr(party, request.pop("do"))(**request)
            reply((found or {}) | {"compilations": compilations()})
    except Exception as e:
        traceback.print_exc()
        reply({"error": f"{spec['name']}: {type(e).__name__}: {e}"})
    os._exit(0)  # without waiting for threads that wait for others


if __name__ == "__main__":
    main()

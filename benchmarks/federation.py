"""A measured federation from outside: its processes, their cores, the line between them, and what a step's parts take."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.link import Link, Speed
from benchmarks.worker import Worker

SIZES: dict[str, dict[str, Any]] = {
    "tiny": dict(preset="tiny", vocabulary=4096, rows=8, tokens=128, steps=8),
    "base": dict(preset="base", vocabulary=30522, rows=8, tokens=128, steps=3),
    # For debugging: its times mean nothing.
    "fast": dict(preset="tiny", vocabulary=128, rows=2, tokens=16, steps=4,
                 changes=dict(hidden_size=16, num_layers=1, num_heads=2)),
}  # fmt: skip


@dataclass(frozen=True)
class Way:
    """One way to run a federation."""

    parts: int = 1  # microbatches
    codec: str = "float32"
    speed: Speed = field(default_factory=Speed)

    def __str__(self) -> str:
        return f"{self.speed}, {self.codec}, {self.parts} microbatch{'es' * (self.parts > 1)}"


@dataclass(frozen=True)
class Plan:
    """What all ways of a measurement share.

    `model` is of `SIZES`. `cores`: the last one is the server's, and the clients share the others; (): everybody may use
    all. `credentials` is a folder of them; "": in clear.
    """

    model: dict[str, Any]
    clients: int = 1
    cores: tuple[int, ...] = ()
    credentials: str = ""
    settings: dict[str, Any] = field(default_factory=dict)  # other keys of the config

    def spec(self, way: Way) -> dict[str, Any]:
        """Returns what every process is told."""
        return dict(
            model=self.model, clients=self.clients, steps=self.model["steps"], parts=way.parts,
            credentials=self.credentials, settings={"wire.codec": way.codec} | self.settings,
        )  # fmt: skip


@dataclass
class Sample:
    """Milliseconds of a step, taken one after the other."""

    step: float
    client: dict[str, float]  # by phase: the programs alone
    server: dict[str, float]
    transfer: float
    still: float  # a step whose programs compute nothing

    @property
    def compute(self) -> float:
        """The programs alone, one after the other."""
        return sum(self.client.values()) + sum(self.server.values())

    @property
    def ratio(self) -> float:
        """A step over the larger of its two ingredients."""
        return self.step / max(self.compute, self.transfer)

    @property
    def overhead(self) -> float:
        """What the session adds to its frames' way there and back."""
        return self.still - self.transfer


class Federation:
    """A server and its clients, each a process, joined by a line."""

    def __init__(self, way: Way, plan: Plan, counting: bool = False):
        """Starts the processes.

        Args:
          way, plan: what is run.
          counting: whether there is a line between, to count bytes, although it does nothing.
        """
        self.way, self.plan = way, plan
        spec, module = plan.spec(way), "benchmarks.parties"
        own = plan.cores[:-1] or plan.cores
        self._sharing = -(-plan.clients // len(own)) if own else 1  # clients of one core
        self.links: list[Link] = []
        self.clients: list[Worker] = []
        self.server = Worker(spec | {"name": "server", "role": "server", "cores": plan.cores[-1:]}, module)
        try:
            ports = self.server.start()["ports"]
            if counting or not way.speed.plain:
                self.links += [Link(port, way.speed) for port in ports]
                ports = [link.port for link in self.links]
            for n in range(plan.clients):
                mine = own[n % len(own) :][:1] if own else ()
                who = {"name": f"client{n}", "role": "client", "index": n, "ports": ports, "cores": mine}
                self.clients.append(Worker(spec | who, module))
                self.clients[-1].launch()
            facts = [client.answer() for client in self.clients]
            self.frames: dict[str, list[int]] = facts[0]["bytes"]  # of a microbatch's two, by direction
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the processes."""
        for worker in (*self.clients, self.server):
            worker.stop()
        for link in self.links:
            link.close()

    def _all(self, request: dict[str, Any], workers: Sequence[Worker]) -> list[dict[str, Any]]:
        """Sends a request to several processes at once; returns their replies."""
        for worker in workers:
            worker.ask(dict(request))
        return [worker.answer() for worker in workers]

    def still(self, on: bool) -> int:
        """Lets all programs compute nothing, or what they are for; returns how many have been compiled so far."""
        return sum(reply["compilations"] for reply in self._all({"do": "still", "on": on}, [self.server, *self.clients]))

    def round(self) -> float:
        """Trains a round; returns milliseconds a step, of the slowest client."""
        return max(reply["ms"] for reply in self._all({"do": "round"}, self.clients))

    def transfer(self) -> float:
        """Sends a round's frames there and back, all clients at once; returns milliseconds a step."""
        return max(reply["ms"] for reply in self._all({"do": "transfer"}, self.clients))

    def compute(self) -> tuple[dict[str, float], dict[str, float]]:
        """Runs the programs alone, party after party; returns milliseconds a step, of the clients and the server."""
        phases = [client.call({"do": "compute"})["ms"] for client in self.clients]
        return {k: self._sharing * max(p[k] for p in phases) for k in phases[0]}, self.server.call({"do": "compute"})["ms"]

    def sample(self, backwards: bool) -> Sample:
        """Measures each part of a sample once, in one order or the other."""
        found: dict[str, Any] = {}

        def step() -> None:
            found["step"] = self.round()

        def compute() -> None:
            found["client"], found["server"] = self.compute()

        def transfer() -> None:
            found["transfer"] = self.transfer()

        def still() -> None:
            self.still(True)
            found["still"] = self.round()
            self.still(False)

        order = [step, compute, transfer, still]
        for measure in reversed(order) if backwards else order:
            measure()
        return Sample(**found)

    def bytes_of_a_round(self) -> int:
        """Returns the bytes at the server's socket, both ways, of a round that is not the first; nothing is computed."""
        self.still(True)
        self.round()
        count = lambda: self.links[0].up + self.links[0].down  # noqa: E731
        before = count()
        self.round()
        return count() - before

    def hurry(self) -> None:
        """Lets all its threads go before everything else on this machine, and the line's, which are here; only root may."""
        for process in ("self", *(worker.pid for worker in (self.server, *self.clients))):
            for thread in Path(f"/proc/{process}/task").iterdir():
                with contextlib.suppress(ProcessLookupError):  # it has ended
                    os.sched_setscheduler(int(thread.name), os.SCHED_RR, os.sched_param(1))


@contextlib.contextmanager
def credentials(clients: int) -> Iterator[str]:
    """Makes everybody's certificates in a folder of their own."""
    from fedbert_jax import provision

    with tempfile.TemporaryDirectory() as folder:
        root, names = Path(folder), ["server", *(f"client{n}" for n in range(clients))]
        with contextlib.redirect_stdout(None):
            provision.main(["init", str(root / "ca")])
            for name in names:
                role = "server" if name == "server" else "client"
                provision.main(["request", name, "--role", role, "--into", str(root / name)])
                provision.main(["approve", str(root / "ca"), str(root / name / f"{name}.csr")])
        for name in names:
            for file in (root / "ca" / "issued" / name).iterdir():
                (root / name / file.name).write_bytes(file.read_bytes())
        yield folder

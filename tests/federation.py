"""A federation of the tiny model in one process: a service and clients in threads, joined by function calls or sockets."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from tiny import make_simulation, mask_spec

from fedbert_jax.config import Config
from fedbert_jax.data import sampling
from fedbert_jax.data.streams import seeds_of
from fedbert_jax.federated.evaluation import plan_evaluation
from fedbert_jax.runtime.calls import Hello
from fedbert_jax.runtime.engine import Engine
from fedbert_jax.runtime.member import Ended, Member
from fedbert_jax.runtime.participant import Line, Participant
from fedbert_jax.runtime.service import EVALUATION, Service
from fedbert_jax.runtime.session import Session
from fedbert_jax.runtime.shapes import shapes_of
from fedbert_jax.runtime.turns import Rules

NAMES = ("adams", "jefferson", "washington")
HELLO = Hello({"federated.rounds": 4}, "tokenizer", "secret", "0")


class Local:
    """A transport that is a function call."""

    def __init__(self, service: Service, name: str):
        self.service, self.name = service, name

    def call(self, method: str, data: bytes, timeout: float) -> bytes:
        return self.service.call(method, self.name, data)


class Federation:
    """The server and the clients of a config; the simulation of the same is `simulation`."""

    def __init__(self, config: Config, parts: int = 1, evaluates: bool = False, **rules: Any):
        self.config, self.parts = config, parts
        self.simulation = make_simulation(config)
        s, feed = self.simulation.setting, self.simulation.feed
        self.rows = jax.ShapeDtypeStruct((config.federated.batch_size, config.data.seq_len), np.uint16)
        self.shapes = shapes_of(s, self.rows, parts)
        self.engine = Engine(s, NAMES, self.rows, parts)
        rules = dict(quorum=len(NAMES), deadline=60.0, join_grace=60.0, window=parts) | rules
        names = lambda round: [NAMES[c] for c in feed.cohort_of(round)]  # noqa: E731
        ends = lambda round: evaluates  # noqa: E731
        self.session = Session(
            NAMES, config.federated.rounds, Rules(**rules), names, lambda m, r: self.engine.script(m, r, ends(r))
        )
        spec = mask_spec(config)
        batch = min(config.eval.batch_size, config.eval.max_blocks)
        self.rounds: list[tuple[int, dict[str, float]]] = []
        self.service = Service(
            self.session, self.engine, HELLO._replace(secret=""),
            EVALUATION(batch, config.data.seq_len, spec.num_masked, config.model.hidden_size),
            ends, segment=self.schema(), on_segment=self.engine.begin_with,
            on_round=self._on_round, in_turn=self.engine.in_turn,
        )  # fmt: skip

    def schema(self):
        from fedbert_jax.runtime.payloads import schema_of

        return schema_of("segment", self.shapes.segment)

    def _on_round(self, round: int, members: tuple[str, ...]) -> None:
        self.rounds.append((round, self.engine.metrics() | {"scores": self.engine.scores}))

    def member(self, name: str) -> Member:
        index, config = NAMES.index(name), self.config
        own, f, seeds = np.asarray(self.simulation.train.client(index)), config.federated, seeds_of(config)

        def rows(round: int) -> np.ndarray:
            count = f.local_steps * f.batch_size
            places = sampling.block_indices(seeds, index, len(own), round * count, count)
            return own[places].reshape(f.local_steps, f.batch_size, -1)

        sizes = np.zeros(4, np.int64)
        sizes[index + 1 :] = 3
        plan = plan_evaluation(sizes, np.array([index]), config.eval.max_blocks, config.eval.batch_size, seeds)
        held = self.simulation._eval_set
        mine = np.flatnonzero(np.asarray(held.clients) == index)
        assert len(mine) == len(plan.clients)
        heldout = jax.tree.map(lambda x: np.asarray(x)[mine], held)
        return Member(self.simulation.setting, index, rows, self.shapes, self.parts, heldout=heldout, mask=mask_spec(config))

    def participant(self, name: str, transport: Any = None, **options: Any) -> Participant:
        line = Line(transport or Local(self.service, name), self.parts, 1 << 26, patience=5.0, timeout=60.0)
        blocks = int(self.simulation.train.sizes[NAMES.index(name)])
        return Participant(self.member(name), line, name, HELLO, blocks, wait=0.5, **options)

    def run(
        self,
        on_round: Callable[[str, int, Ended], None] = lambda name, round, ended: None,
        transport: Callable[[str], Any] = lambda name: None,
    ) -> dict[str, Participant]:
        """Trains with every client in a thread of its own, over a transport; returns the clients."""
        participants = {name: self.participant(name, transport(name)) for name in NAMES}
        failures: list[BaseException] = []

        def take_part(name: str) -> None:
            try:
                participants[name].run(on_round=lambda round, ended: on_round(name, round, ended))
            except BaseException as error:
                failures.append(error)
                self.service.stop()

        threads = [threading.Thread(target=take_part, args=(name,), daemon=True) for name in NAMES]
        for thread in threads:
            thread.start()
        self.service.run()
        for thread in threads:
            thread.join(30)
        if failures:
            raise failures[0]
        return participants

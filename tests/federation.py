"""A federation of the tiny model in one process: a service and clients in threads, joined by function calls or sockets."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from tiny import make_simulation, mask_spec

from fedbert_jax.config import Config
from fedbert_jax.data import sampling
from fedbert_jax.data.streams import seeds_of
from fedbert_jax.devices.tuning import compute_dtype
from fedbert_jax.federated.evaluation import masked_exam, plan_evaluation
from fedbert_jax.federated.setting import Setting
from fedbert_jax.jobs.job import Shard
from fedbert_jax.privacy.pads import Pads
from fedbert_jax.runtime.calls import Hello
from fedbert_jax.runtime.engine import Engine
from fedbert_jax.runtime.frames import Schema
from fedbert_jax.runtime.member import Ended, Member
from fedbert_jax.runtime.participant import Line, Participant
from fedbert_jax.runtime.parties import ClientPrograms
from fedbert_jax.runtime.payloads import schema_of
from fedbert_jax.runtime.script import questions
from fedbert_jax.runtime.service import Service
from fedbert_jax.runtime.session import Session
from fedbert_jax.runtime.turns import Rules

NAMES = ("adams", "jefferson", "washington")
HELLO = Hello({"federated.rounds": 4}, "tokenizer", "secret", "0")


PROGRAMS: dict[Any, Any] = {}  # of both sides, compiled once for all federations of a config


class Local:
    """A transport that is a function call."""

    def __init__(self, service: Service, name: str):
        self.service, self.name = service, name

    def call(self, method: str, data: bytes, timeout: float) -> bytes:
        return self.service.call(method, self.name, data)


class Federation:
    """The server and the clients of a config; the simulation of the same is `simulation`."""

    lengths: tuple[int, ...] = ()
    sums: tuple[int, ...] = (3,)

    def __init__(
        self, config: Config, parts: int = 1, evaluates: bool = False, state: Any = None, done: int = 0, **rules: Any
    ):
        """`state` is the server's after `done` rounds of an earlier process."""
        self.config, self.parts = config, parts
        s, rows, questions, cohort_of = self.make()
        self.setting = s
        self.engine = Engine(s, NAMES, rows, parts, self.lengths, self.sums)
        self.shapes = self.engine.shapes
        made = (ClientPrograms(s, 0, parts), self.engine.programs)
        kept = PROGRAMS.setdefault((type(self), config, parts), made)
        self.client_programs, self.engine.programs = map(copy.copy, kept)  # a test may change its own
        rules = dict(quorum=len(NAMES), deadline=60.0, join_grace=60.0, window=parts) | rules
        names = lambda round: [NAMES[c] for c in cohort_of(round)]  # noqa: E731
        script = lambda members, round: self.engine.script(members, round, evaluates)  # noqa: E731
        self.session = Session(NAMES, config.federated.rounds, Rules(**rules), names, script, round=done)
        self.engine.state = state
        self.rounds: list[tuple[int, dict[str, float]]] = []
        self.service = Service(
            self.session, self.engine, HELLO._replace(secret=""), questions, evaluates=lambda round: evaluates,
            segment=None if state else schema_of("first_segment", self.engine.first_segment),
            on_segment=self.engine.begin_with,
            on_round=self._on_round, in_turn=self.engine.in_turn,
        )  # fmt: skip

    def make(self) -> tuple[Setting, Any, Schema, Callable[[int], Any]]:
        """Makes the simulation; returns its setting, shapes of a step and of an evaluation, and who is drawn for a round."""
        config = self.config
        self.simulation = make_simulation(config)
        rows = jax.ShapeDtypeStruct((config.federated.batch_size, config.data.seq_len), np.uint16)
        batch, masked = min(config.eval.batch_size, config.eval.max_blocks), mask_spec(config).num_masked
        asked = questions(batch, config.data.seq_len, masked, config.model.hidden_size, compute_dtype(config).name)
        return self.simulation.setting, rows, asked, self.simulation.feed.cohort_of

    def _on_round(self, round: int, members: tuple[str, ...]) -> None:
        self.rounds.append((round, self.engine.metrics() | {"scores": self.engine.scores}))

    def shard(self, name: str) -> Shard:
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
        return Shard(int(self.simulation.train.sizes[index]), rows, (), masked_exam(heldout, mask_spec(config), seeds))

    def participant(self, name: str, transport: Any = None, **options: Any) -> Participant:
        line = Line(transport or Local(self.service, name), self.parts, 1 << 26, patience=5.0, timeout=60.0)
        own, place = self.shard(name), NAMES.index(name)
        pads = self.pads() if self.setting.blinded else None
        member = Member(
            self.setting, place, own.rows, self.shapes, own.exam, self.parts, own.trials, pads, self.client_programs
        )
        return Participant(member, line, name, HELLO, own.size, wait=0.5, **options)

    def pads(self) -> Pads:
        return Pads(seeds_of(self.config).client, "a run")

    def run(
        self,
        on_round: Callable[[str, int, Ended], None] = lambda name, round, ended: None,
        transport: Callable[[str], Any] = lambda name: None,
    ) -> dict[str, Participant]:
        """Trains with every client in a thread of its own, over a transport; returns the clients."""
        participants = {name: self.participant(name, transport(name)) for name in NAMES}
        self.train(participants, on_round)
        return participants

    def train(
        self,
        participants: dict[str, Participant],
        on_round: Callable[[str, int, Ended], None] = lambda name, round, ended: None,
        excused: Callable[[str, BaseException], bool] = lambda name, error: False,
    ) -> None:
        """Trains with these clients, each in a thread of its own; raises what one of them raises, unless it is excused."""
        failures: list[BaseException] = []

        def take_part(name: str) -> None:
            try:
                participants[name].run(on_round=lambda round, ended: on_round(name, round, ended))
            except BaseException as error:
                if not excused(name, error):
                    failures.append(error)
                    self.service.stop()

        threads = [threading.Thread(target=take_part, args=(name,), daemon=True) for name in participants]
        for thread in threads:
            thread.start()
        self.service.run()
        for thread in threads:
            thread.join(60)
        if failures:
            raise failures[0]

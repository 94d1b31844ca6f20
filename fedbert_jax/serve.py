"""task=serve: the server of a federation, which holds the body, waits for its clients and computes their rounds."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from fedbert_jax import config as config_lib
from fedbert_jax.config import Config
from fedbert_jax.console import progress
from fedbert_jax.console.output import make_console, shown
from fedbert_jax.data import sampling
from fedbert_jax.data.streams import seeds_of
from fedbert_jax.devices import platforms
from fedbert_jax.devices.interrupts import Interrupts
from fedbert_jax.devices.mesh import make_mesh
from fedbert_jax.errors import StoppedError, UserError
from fedbert_jax.federated import optim
from fedbert_jax.jobs import open_job
from fedbert_jax.jobs.engine import engine_of, restored
from fedbert_jax.jobs.job import settled
from fedbert_jax.runtime.agreement import hello_of
from fedbert_jax.runtime.credentials import SERVER, load_credentials, load_roster
from fedbert_jax.runtime.gathering import Gathering, Listening
from fedbert_jax.runtime.grpc import Server
from fedbert_jax.runtime.news import line_of
from fedbert_jax.runtime.payloads import schema_of, zeros_like
from fedbert_jax.runtime.prometheus import Exporter
from fedbert_jax.runtime.recording import Recorder
from fedbert_jax.runtime.service import Service
from fedbert_jax.runtime.session import Session
from fedbert_jax.runtime.turns import Rules
from fedbert_jax.workdir import resume, sinks
from fedbert_jax.workdir.checkpoint import Checkpoints
from fedbert_jax.workdir.log import Journal, MetricsLog, read_metrics, truncate
from fedbert_jax.workdir.paths import Workdir, check_same, open_workdir

FAREWELL = 60.0  # seconds that the server stays for clients to fetch what is theirs
LOOK = 2.0  # seconds between two looks at the roster


def serve(
    config: Config,
    root: Path,
    console: Console | None = None,
    listen: Callable[[Gathering], Listening] | None = None,
    interrupts: Interrupts | None = None,
) -> int:
    """Runs a federation's server to its last round, from wherever its workdir stands.

    Args:
      config: validated, with task='serve'.
      root: the workdir.
      console: where to speak; the terminal by default.
      listen: makes what carries the clients' calls; gRPC at `network.host` and `network.port` by default.
      interrupts: what ends it; signals by default.

    Returns:
      The exit code: 0, or 128 + the signal that interrupted it.

    Raises:
      UserError: for what the user can mend.
    """
    console = console or make_console()
    optim.check(config)
    sinks.check_installed(config)
    platforms.introduce(console, lambda: make_mesh(config.mesh).size)
    workdir, lock = open_workdir(root)
    with lock:
        return Serving(config, workdir, console).run(listen, interrupts or Interrupts())


class Serving:
    """A server's process: its files, its address and its console."""

    def __init__(self, config: Config, workdir: Workdir, console: Console):
        self.workdir, self.console = workdir, console
        self.job = open_job(config)
        config = self.job.config
        self.credentials, self.roster_of = None, None
        if config.network.credentials:
            folder = Path(config.network.credentials)
            self.credentials, self.roster_of = load_credentials(folder, "server", SERVER), lambda: load_roster(folder)
        self.given = config
        if workdir.exists():
            # With credentials, the roster says how many clients there are.
            free = ("federated.num_clients",) if self.credentials else ()
            check_same(workdir.read_config(), config, free, config_lib.HARMLESS)

    def run(self, listen: Callable[[Gathering], Listening] | None, interrupts: Interrupts) -> int:
        """Gathers the clients, serves them, and ends."""
        n = self.given.network
        self.exporter = Exporter(n.metrics_port) if n.metrics_port else None
        self.log: MetricsLog | None = None
        self.facts = {"run": secrets.token_hex(6)} | self.workdir.read_facts()
        self.workdir.write_facts(self.facts)
        known, wanted = self._names(), self.given.federated.num_clients or 0
        gathering = Gathering(known, wanted, self.facts["run"])
        clients = max(len(known), wanted)
        begun = settled(self.given, len(known) or wanted)  # whether it can go on is said before anybody is waited for
        steps = begun.federated.steps_per_round(min(begun.federated.clients_per_round or clients, len(known) or wanted))
        resume.check(begun, resume.newest(self.workdir.checkpoints), steps, None)
        grpc = lambda service: Server(service, n.host, n.port, self.credentials, self.roster_of, clients)  # noqa: E731
        server = (listen or grpc)(gathering)
        try:
            with interrupts:
                self.console.print(f"listening at {server.where}")
                if self.given.audit.record:
                    self.console.print(f"keeps messages, from which text can be read, in {shown(self.workdir.recorded)}")
                names = self._gather(gathering, interrupts)
                if names is None:
                    return interrupts.exit_code
                self.service = service = self._prepare(names)
                server.use(service)
                self._serve(service, interrupts)
                service.farewell(FAREWELL if not interrupts.received else 5.0)
        finally:
            server.stop()
            if self.exporter is not None:
                self.exporter.close()
            if self.log is not None:
                self.log.close()
        self.checkpoints.close()
        self.journal.close()
        if (rounds := self.config.federated.rounds) > self.done:
            if interrupts.received:
                self.console.print(f"stopped after round {self.done}; the same command goes on from there")
                return interrupts.exit_code
            left = len(names) - len(service.session.gone)
            raise StoppedError(
                f"stopped after round {self.done} of {rounds}: {left} of {len(names)} clients are left, and "
                f"network.quorum={n.quorum or 1}."
            )
        self.console.print(f"checkpoints  {shown(self.workdir.checkpoints)}")
        return 0

    # --- before the first round ---

    def _names(self) -> tuple[str, ...]:
        """Returns the clients' names, if they are known: from the workdir once training has begun, or from the roster."""
        kept = tuple(self.facts.get("roster", ()))
        if self.roster_of is None:
            return kept
        names = self.roster_of().clients
        if not names:
            raise UserError(f"config key network.credentials={self.given.network.credentials!r}: its roster has no client.")
        if not any(self.workdir.checkpoints.glob("[0-9]*")):
            self.console.print(f"clients, by the roster: {shown(', '.join(names))}")
            return names
        # A client's place decides its draws, so who is out of the roster keeps it, and nobody gets a new one.
        if late := [name for name in names if name not in kept]:
            self.console.print(
                f"approved since training began, so not in this one: {shown(', '.join(late))}", style="yellow"
            )
        return kept

    def _gather(self, gathering: Gathering, interrupts: Interrupts) -> tuple[str, ...] | None:
        """Waits until the clients are known; None if a signal came first."""
        told: tuple[str, ...] | None = None
        while (names := gathering.names()) is None:
            if interrupts.received:
                return None
            if gathering.waiting != told:
                told = gathering.waiting
                here = ", ".join(told) or "nobody"
                self.console.print(f"waiting for {gathering.wanted} clients; here: {shown(here)}")
            time.sleep(0.1)
        return names

    def _prepare(self, names: Sequence[str]) -> Service:
        """Builds the engine and the session, from the newest checkpoint if there is one."""
        clients, job = len(names), self.job
        self.config = job.config = config = settled(self.given, clients)
        self.names, f = tuple(names), config.federated
        self.cohort = cohort = min(f.clients_per_round or clients, clients)
        self.engine, seeds = engine_of(job, names, cohort), seeds_of(config)

        def cohort_of(round: int) -> list[str]:
            chosen = sampling.draw_cohort(seeds, round, clients, cohort)
            if f.arrangement.clients == "in turn" and f.order == "shuffled":
                chosen = chosen[sampling.turn_order(seeds, round, cohort)]
            return [names[c] for c in chosen]

        n = config.network
        rules = Rules(n.quorum, n.deadline, n.join_grace, config.wire.microbatches)
        self.checkpoints = Checkpoints(self.workdir.checkpoints, config.checkpoint.keep)
        self.done = done = self._restore()
        script = lambda members, round: self.engine.script(members, round, self._evaluates(round))  # noqa: E731
        # Time makes every start of the server another epoch, whatever became of the one before.
        gone = set(self.facts.get("left", ()))
        since = self.checkpoints.meta(done).get("epoch", 0) if done else 0
        self.session = Session(self.names, f.rounds, rules, cohort_of, script, int(time.time()), done, gone, since)
        if done >= f.rounds:
            self.session.drain()
        self.mark = time.perf_counter()
        self.workdir.write_config(config)
        self.facts |= {"roster": list(names)}
        self.workdir.write_facts(self.facts)
        self.journal = Journal(self.workdir.events, run=self.facts["run"])
        self.journal.note("resumed" if done else "begun", done, roster=list(names))
        return Service(
            self.session,
            Recorder(self.engine, self.workdir.recorded, done, self.facts["run"]) if config.audit.record else self.engine,
            hello_of(config, job.tokenizer, None, job.agreed),
            job.questions(),
            self._evaluates,
            segment=None if self.engine.state is not None else schema_of("first_segment", self.engine.first_segment),
            on_segment=self._begin_with,
            on_round=self._on_round,
            on_end=self._on_end,
            in_turn=self.engine.in_turn,
            body=self.engine.body if n.release_body else None,
            run=self.facts["run"],
        )

    def _restore(self) -> int:
        """Takes the newest checkpoint; returns how many rounds are finished."""
        rounds, done = self.checkpoints.rounds(), 0
        if rounds:
            done = rounds[-1]
            self.engine.state = restored(self.engine, self.checkpoints, done, self.config)
            over = done >= self.config.federated.rounds
            self.console.print(
                f"training is over since round {done}: clients may fetch what is theirs, for {FAREWELL:.0f} s at most"
                if over
                else f"resuming after round {done} of {self.config.federated.rounds}"
            )
            truncate(self.workdir.metrics, done)
        else:
            self.workdir.metrics.unlink(missing_ok=True)
        records = read_metrics(self.workdir.metrics) if rounds else []
        # Of rounds that may have had other members, and of processes before this one.
        sums = (self.job.unit[0], "uplink_bytes", "downlink_bytes")
        self.before = {key: int(records[-1][key]) if records else 0 for key in sums}
        self.log = MetricsLog(self.workdir.metrics, sinks.make_sinks(self.config, self.workdir))
        return done

    def _begin_with(self, tensors: dict[str, np.ndarray]) -> None:
        self.engine.begin_with(tensors)
        if self.config.model.init_from:
            assert self.engine.state is not None
            like = self.engine.shapes.segment  # the clients fill theirs
            _, body, _ = self.job.fill(zeros_like(like), self.engine.state.body)
            self.engine.state = self.engine.state._replace(body=body)

    def _evaluates(self, round: int) -> bool:
        last = round + 1 == self.config.federated.rounds
        return last or (round + 1) % self.config.eval.every_rounds == 0

    # --- the rounds ---

    def _serve(self, service: Service, interrupts: Interrupts) -> None:
        f = self.config.federated
        with progress.bar(self.console, "phase", "numbers") as bar:
            task = bar.add_task("rounds", total=f.rounds, completed=self.session.round, phase="", numbers="")
            self._numbers, self.look = "", 0.0

            def watch(session: Session) -> None:
                for event in self._news(session):
                    self.console.print(event)
                if interrupts.received and not session.draining:
                    self.console.print("ends with the round under way")
                    service.drain()
                self._revoke(service)
                late = session.late()
                waits = f"waits for {', '.join(late[:3])}" if late else session.state
                if session.state == "enrolling" and session.missing():
                    waits = f"waits for {', '.join(session.missing()[:3])}"
                bar.update(task, completed=session.round, phase=shown(waits), numbers=self._numbers)
                if self.exporter is not None:
                    here = {"clients_here": len(session.here()), "clients_late": len(late), "round": session.round}
                    self.exporter.set(here | {"received_bytes": service.received, "sent_bytes": service.sent})

            service.run(watch)
        for event in self._news(self.session):  # of the last round
            self.console.print(event)

    def _revoke(self, service: Service) -> None:
        """Takes those out who are in the roster no more; it is read again once in a while."""
        if self.roster_of is not None and time.monotonic() > self.look:
            self.look = time.monotonic() + LOOK
            try:
                clients = self.roster_of().clients
            except UserError:  # somebody is replacing it and its signature, which are two files
                return
            for name in self.names:
                if name not in clients and name not in service.session.gone:
                    self.console.print(f"{shown(name)} is in the roster no more")
                    service.remove(name)

    def _news(self, session: Session) -> list[str]:
        """Writes down what has happened, and returns what of it is told."""
        events, session.events = session.events, []
        for event in events:
            self.journal.note(**({"round": session.round} | event))
            if event["event"] == "left":
                self.facts |= {"left": sorted(session.gone)}
                self.workdir.write_facts(self.facts)
        lines = (line_of(event, len(session.roster)) for event in events)
        return [line for line in lines if line]

    def _on_round(self, round: int, members: tuple[str, ...]) -> None:
        f, now, engine = self.config.federated, time.perf_counter(), self.engine
        numbers, done = engine.metrics(), round + 1
        steps = f.steps_per_round(self.cohort)
        unit, per_row = self.job.unit
        seen = len(members) * f.local_steps * f.batch_size * per_row
        self.before[unit] += seen
        record: dict[str, Any] = {"round": done, "step": done * steps, "members": list(members)} | numbers
        record |= {
            "uplink_bytes": self.before["uplink_bytes"] + self.service.received,
            "downlink_bytes": self.before["downlink_bytes"] + self.service.sent,
            unit: self.before[unit],
            "seconds": now - self.mark,
            f"{unit}_per_second": seen / (now - self.mark),
        }
        self.mark = now
        blocks = self.session.blocks()
        verdict = self.job.judge(engine.scores, {c: blocks.get(c, 0) for c in self.names}) if engine.scores else None
        record |= verdict.fields if verdict is not None else {}
        assert self.log is not None
        self.log.append(record)
        if self.exporter is not None:
            self.exporter.set(record | {"round_seconds": record["seconds"]})
        speed, received = seen / record["seconds"], self.service.received / 1e6
        self._numbers = f"loss {numbers['train_loss']:.3f}  {speed:,.0f} {unit}/s  received {received:,.0f} MB"
        if verdict is not None:
            self.console.print(f"round {done}  train loss {numbers['train_loss']:.3f}  {verdict.text}")
        self.done = done
        if done % self.config.checkpoint.every_rounds == 0 or done == f.rounds or self.session.draining:
            self._save()

    def _on_end(self) -> None:
        """Waits until the last round is saved: a client that has got its model doesn't come back to train it again."""
        self.checkpoints.wait()
        if self.done not in self.checkpoints.rounds() and self.done:
            self._save()
            self.checkpoints.wait()

    def _save(self) -> None:
        assert self.engine.state is not None
        meta = {"round": self.done, "config": resume.stamp(self.config), "epoch": self.session.since}
        self.checkpoints.save(self.done, tuple(self.engine.state), meta)

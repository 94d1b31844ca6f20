"""task=join: one client of a federation, which keeps its text, its embedding and its head."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from fedbert_jax import config as config_lib
from fedbert_jax import disk
from fedbert_jax.config import Config
from fedbert_jax.console import progress
from fedbert_jax.console.output import make_console, shown
from fedbert_jax.data.streams import seeds_of
from fedbert_jax.devices import platforms
from fedbert_jax.devices.interrupts import Interrupts
from fedbert_jax.devices.mesh import make_mesh
from fedbert_jax.errors import StoppedError, UserError
from fedbert_jax.federated import optim
from fedbert_jax.jobs import open_job
from fedbert_jax.jobs.job import Verdict, settled
from fedbert_jax.models import huggingface
from fedbert_jax.privacy.pads import Pads
from fedbert_jax.runtime import frames
from fedbert_jax.runtime.agreement import hello_of
from fedbert_jax.runtime.calls import Abort
from fedbert_jax.runtime.credentials import CLIENT, load_credentials, load_roster, open_group_secret
from fedbert_jax.runtime.dispatch import Compiling
from fedbert_jax.runtime.grpc import Client
from fedbert_jax.runtime.member import Ended, Held, Member
from fedbert_jax.runtime.participant import Line, Participant, Transport
from fedbert_jax.runtime.payloads import from_tensors, schema_of
from fedbert_jax.runtime.shapes import shapes_of
from fedbert_jax.runtime.waiting import Waiting, Watch
from fedbert_jax.workdir import resume, sinks
from fedbert_jax.workdir.checkpoint import Checkpoints
from fedbert_jax.workdir.log import Journal, MetricsLog, read_metrics, truncate
from fedbert_jax.workdir.paths import Workdir, check_same, open_workdir

LIMIT = 1 << 31  # bytes that an answer may have: the whole model


def join(
    config: Config,
    root: Path,
    console: Console | None = None,
    transport: Transport | None = None,
    interrupts: Interrupts | None = None,
) -> int:
    """Takes part in a federation until training is over, and exports the client's model.

    Args:
      config: validated, with task='join'.
      root: the workdir.
      console: where to speak; the terminal by default.
      transport: what carries its calls; gRPC to `network.host` and `network.port` by default.
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
        huggingface.check_target(workdir.hf)
        return Joining(config, workdir, console).run(transport, interrupts or Interrupts())


class Joining:
    """A client's process: its text, its files, its line to the server."""

    def __init__(self, config: Config, workdir: Workdir, console: Console):
        self.workdir, self.console = workdir, console
        n = config.network
        self.name = n.name or workdir.root.resolve().name
        self.verdict: Verdict | None = None  # of the last evaluation
        self.journal: Journal | None = None  # until the server has said which run this is
        self.credentials = None
        if n.credentials:
            folder = Path(n.credentials)
            self.credentials = load_credentials(folder, self.name, CLIENT)
            if self.name not in load_roster(folder).clients:
                raise UserError(f"config key network.name={self.name!r}: the roster in {folder} has no client of that name.")
            if config.privacy.client_seed is None:
                secret = open_group_secret(folder, self.name)
                config = dataclasses.replace(config, privacy=dataclasses.replace(config.privacy, client_seed=secret))
        self.job = open_job(config)
        self.config = self.job.config
        if workdir.exists():
            # The server says how many clients there are.
            check_same(workdir.read_config(), self._shown(self.config), ("federated.num_clients",), config_lib.HARMLESS)

    def _shown(self, config: Config) -> Config:
        """Returns the config as config.json has it: without a secret that came from the credentials."""
        if not config.network.credentials:
            return config
        return dataclasses.replace(config, privacy=dataclasses.replace(config.privacy, client_seed=None))

    def run(self, given: Transport | None, interrupts: Interrupts) -> int:
        """Joins, trains and exports."""
        n, parts = self.config.network, self.config.wire.microbatches
        transport = given or Client(n.host, n.port, self.name, self.credentials, LIMIT, parts)
        self.where, timeout = transport.where, max(2 * n.deadline, 60.0)
        stop = lambda: interrupts.received is not None  # noqa: E731
        line = Line(transport, parts, LIMIT, n.patience, timeout, self._warn, stop=stop)
        try:
            with interrupts, contextlib.closing(line):
                if n.leave:
                    return self._leave(line)
                names = self._enrol(line, stop)
                if not names:
                    return interrupts.exit_code
                self.job.read(names.index(self.name), self.name, self.workdir, self.console)
                participant = self._participant(names, line)
                over = self._train(participant, stop)
                if not over:
                    self.console.print(f"stopped after round {self.done}; the same command goes on from there")
                    return interrupts.exit_code
                if participant.over_at < self.config.federated.rounds:
                    raise StoppedError(
                        f"the server has stopped after round {participant.over_at} of {self.config.federated.rounds}; "
                        "the same command goes on when it is back."
                    )
                self._export(participant, line)
                line.ask("bye", {})
        finally:
            transport.close()
            if self.journal is not None:
                self.journal.close()
        return 0

    def _leave(self, line: Line) -> int:
        """Leaves the federation for good."""
        try:
            line.ask("leave", {})
        except Abort as error:
            raise UserError(f"the server was not told that {self.name!r} leaves: {error.text}.") from error
        self.console.print(f"{shown(self.name)} has left for good")
        return 0

    def _note(self, event: str, round: int, **what: Any) -> None:
        if self.journal is not None:
            self.journal.note(event, round, **what)

    def _warn(self, text: str) -> None:
        self.console.print(f"warning: {shown(text)}", style="yellow")

    # --- before the first round ---

    def _enrol(self, line: Line, stop: Callable[[], bool]) -> tuple[str, ...]:
        """Asks for the roster; waits for a server that isn't there yet, and for the other clients; () if a signal came."""
        where = self.where
        waiting = Waiting(lambda text: self.console.print(shown(text)), lambda text: None)
        with progress.waiting(self.console, f"waiting for the server at {where}, and for all clients"):
            try:
                while not (answer := line.ask("enrol", {})[0])["roster"]:
                    here, more = answer["here"], answer["wanted"] - len(answer["here"])
                    waiting.waits(f"training with {', '.join(here)}", [f"{more} more client{'s' * (more != 1)}"], None)
                    if stop():
                        return ()
            except Abort as error:
                if stop():
                    return ()
                if error.code == "UNAVAILABLE":
                    raise UserError(f"no server answers at {where} ({error.text}).") from error
                raise UserError(f"the server at {where} refuses {self.name!r}: {error.text}.") from error
        facts = self.workdir.read_facts()
        run = facts.setdefault("run", answer["run"])
        if run != answer["run"]:
            raise UserError(
                f"the server at {where} runs another training ({shown(answer['run'])}) than that of workdir "
                f"{self.workdir.root} ({shown(run)}); give another --workdir."
            )
        self.workdir.write_facts(facts)
        self.journal = Journal(self.workdir.events, run=run, client=self.name)
        return tuple(answer["roster"])

    def _participant(self, names: tuple[str, ...], line: Line) -> Participant:
        """Builds and compiles this client's part."""
        clients, index, job = len(names), names.index(self.name), self.job
        self.config = job.config = config = settled(self.config, clients)
        f, parts = config.federated, config.wire.microbatches
        self.setting = setting = job.setting(clients, min(f.clients_per_round or clients, clients))
        shard = job.shard(index)
        pads = Pads(seeds_of(config).client, self.workdir.read_facts()["run"]) if setting.blinded else None
        shapes = shapes_of(setting, job.batch(), parts)
        member = Member(setting, index, shard.rows, shapes, shard.exam, parts, shard.trials, pads)
        with progress.waiting(self.console, "compiling a step"), Compiling() as compiling:
            member.compile()
        compiling.tell(self.console, "a step")
        # What no server has: a client's own optimizer state, and what its gradient codec has yet to send.
        keeps = f.client_optimizer_state == "keep" or config.wire.gradient_codec == "int8"
        self.checkpoints = Checkpoints(self.workdir.checkpoints, keep=4) if keeps else None
        self.shape = jax.eval_shape(member.fresh)
        hello = hello_of(config, job.tokenizer, seeds_of(config).client, job.agreed)
        fresh = self._from_checkpoint if config.model.init_from else None
        return Participant(member, line, self.name, hello, shard.size, recall=self._recall, fresh=fresh)

    def _from_checkpoint(self, held: Held) -> Held:
        """Fills the segment that a client begins with from the checkpoint that all start from."""
        body = self.setting.segments.init(jax.random.key(0), jax.random.key(0))[1]  # of which the client needs nothing
        segment, _, said = self.job.fill(held.segment, body)
        for sentence in said:
            self._warn(sentence)
        return held._replace(segment=segment)

    # --- the rounds ---

    def _train(self, participant: Participant, stop: Callable[[], bool]) -> bool:
        """Takes part; returns whether training is over."""
        f, log = self.config.federated, None
        last = (read_metrics(self.workdir.metrics) if self.workdir.metrics.exists() else [])[-1:]
        self.done, self.mark = last[0]["round"] if last else 0, time.perf_counter()
        self.before = [last[0][key] if last else 0 for key in ("uplink_bytes", "downlink_bytes")]  # of earlier processes
        with progress.bar(self.console, "phase", "numbers") as bar:
            task = bar.add_task("rounds", total=f.rounds, phase="joins", numbers="")
            waiting = Waiting(lambda text: self.console.print(shown(text)), lambda text: bar.update(task, phase=shown(text)))

            def on_wait(turn: dict[str, Any]) -> None:
                if waiting.waits(f"round {turn['round'] + 1}", turn["missing"], turn["within"]):
                    self._note("waits", turn["round"], missing=turn["missing"])
                self.mark = time.perf_counter()

            def on_round(round: int, ended: Ended) -> None:
                nonlocal log
                if log is None or round < self.done:  # done again, since the server went back or began it again
                    if log is not None:
                        log.close()
                    truncate(self.workdir.metrics, round)
                    log = MetricsLog(self.workdir.metrics, sinks.make_sinks(self.config, self.workdir))
                self._record(log, round, ended, participant)
                waiting.over()
                bar.update(task, completed=round + 1, phase="trains", numbers=f"loss {ended.loss:.3f}")

            try:
                with Watch(participant.line, self.name, waiting):
                    # What is refused leaves no config behind: it may be what has to be mended.
                    agreed = lambda: self.workdir.write_config(self._shown(self.config))  # noqa: E731
                    return participant.run(on_round, on_wait, stop, agreed)
            finally:
                if log is not None:
                    log.close()
                if self.checkpoints is not None:
                    self.checkpoints.close()

    def _record(self, log: MetricsLog, round: int, ended: Ended, participant: Participant) -> None:
        now, self.done = time.perf_counter(), round + 1
        self._note("round", round)
        line = participant.line
        record: dict[str, Any] = {
            "round": self.done,
            "train_loss": ended.loss,
            "seconds": now - self.mark,
            "uplink_bytes": self.before[0] + line.sent,
            "downlink_bytes": self.before[1] + line.received,
        }
        self.mark = now
        verdict = None if ended.sums is None else self.job.judge_own(ended.sums)
        if verdict is not None:
            self.verdict = verdict
            record |= verdict.fields
            self.console.print(f"round {self.done}  train loss {ended.loss:.3f}  own {verdict.text}")
        log.append(record)
        if self.checkpoints is not None:
            held = ended.held
            stamp = {"config": resume.stamp(self._shown(self.config))}
            self.checkpoints.save(self.done, {"opt": held.opt, "averaging": held.averaging, "segment": held.segment}, stamp)

    def _recall(self, round: int) -> Held | None:
        """Returns what the client held at the beginning of a round, if it kept it."""
        if self.checkpoints is None or round not in self.checkpoints.rounds():
            return None
        like = {"opt": self.shape.opt, "averaging": self.shape.averaging, "segment": self.shape.segment}
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        found, _ = self.checkpoints.restore(round, like, jax.tree.map(lambda _: here, like))
        return Held(found["segment"], found["opt"], found["averaging"], round)

    # --- after the last round ---

    def _export(self, participant: Participant, line: Line) -> None:
        """Writes the model, if the server gives the body away."""
        held = participant.held
        try:
            # It came when all was over, or was left out of the last round, or others had their turns after its own.
            if held is None or held.round < self.config.federated.rounds or participant.member.in_turn:
                _, tensors = line.ask("segment", {"id": [0, 0, 0]})
                held = participant.member.received(tensors, None, self.config.federated.rounds)
            _, tensors = line.ask("body", {})
        except Abort as error:
            if error.code != "PERMISSION_DENIED":
                raise UserError(f"the server at the end: {error.text}.") from error
            self.console.print(f"no model: {shown(error.text)}")
            return
        like = jax.eval_shape(self.setting.fresh).server
        if why := frames.check(tensors, schema_of("body", like)):
            raise UserError(f"the server sent a body that doesn't fit: {why}.")
        client, body = jax.device_get(held.segment), from_tensors("body", like, tensors)
        with disk.writing(self.workdir.hf):
            self.job.save(self.workdir.hf, client, body, self.config.federated.rounds, self.verdict)
        self.console.print(f"model  {shown(self.workdir.hf)}")

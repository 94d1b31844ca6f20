"""The round loop: data, model, rounds, evaluations, checkpoints, export, report. Reads from top to bottom."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from fedbert_jax import config as config_lib
from fedbert_jax import distributed, finite, huggingface, optim, platforms, progress, resume
from fedbert_jax import run as run_lib
from fedbert_jax.checkpoint import Checkpoints
from fedbert_jax.config import Config
from fedbert_jax.console import make_console, print_table, shown
from fedbert_jax.data.summary import client_table
from fedbert_jax.dispatch import Dispatched, Dispatcher
from fedbert_jax.errors import DivergedError
from fedbert_jax.federated.state import Pair, State
from fedbert_jax.federated.wire import by_way
from fedbert_jax.fill_mask import fill_mask
from fedbert_jax.interrupts import Interrupts
from fedbert_jax.metrics import MetricsLog, read_metrics, truncate
from fedbert_jax.models.bert import count_parameters
from fedbert_jax.profiling import Profile
from fedbert_jax.report import write_report
from fedbert_jax.run import Run
from fedbert_jax.sharding import make_mesh
from fedbert_jax.stages import Stages
from fedbert_jax.workdir import open_workdir


def train(config: Config, root: Path, console: Console | None = None) -> int:
    """Trains a run to its last round, from wherever its workdir stands.

    Args:
      config: validated.
      root: the workdir.
      console: where to speak; the terminal by default, and of several processes only the first's.

    Returns:
      The exit code: 0, or 128 + the signal that interrupted it.

    Raises:
      UserError: for what the user can mend.
    """
    console = console or make_console(quiet=not distributed.first())
    optim.check(config)
    platforms.introduce(console, lambda: make_mesh(config.mesh).size)
    distributed.check_same("config", config_lib.flatten(config_lib.to_dict(config)))
    workdir, lock = open_workdir(root)
    with lock:
        huggingface.check_target(workdir.hf)  # now, not after hours of training
        with Stages(console) as stages:
            warn = lambda text: console.print(f"warning: {shown(text)}", style="yellow")  # noqa: E731
            run = resume.open_run(config, workdir, stages, warn)
        loop = Loop(run, console)
        loop.introduce()
        state = loop.begin()
        with Interrupts() as interrupts:
            state = loop.rounds(state, interrupts)
            if interrupts.settle():
                console.print(f"stopped after round {loop.round}; the same command goes on from there")
                return interrupts.exit_code
        loop.finish(state)
    return 0


class Loop:
    """One run's loop, with its open files: the metrics log and the checkpoints.

    Of several processes, each goes through all of it, and the first alone `writes`.
    """

    def __init__(self, run: Run, console: Console):
        self.run, self.console, self.sim = run, console, run.simulation
        self.writes = distributed.first()
        self.round = 0  # rounds finished, whose lines are in the log
        self.scores: dict[str, Any] = {}  # the last evaluation's numbers, and the best loss so far
        self.checkpoints = Checkpoints(run.workdir.checkpoints, run.config.checkpoint.keep)
        self.log: MetricsLog | None = None
        self.messages = self.sim.traffic()  # bytes a round
        self.dispatcher = Dispatcher()

    # --- before the first round ---

    def introduce(self) -> None:
        """Prints who takes part and what has to be beaten, and writes the run's facts."""
        run, f, sim = self.run, self.run.config.federated, self.sim
        self.guessing = sim.evaluate_frequencies(run.dataset.unigram, run.dataset.special_ids)
        # Which mean the held-out numbers are, and over how many clients: said wherever they stand.
        self.scope = self.guessing.scope(f.weighting, sim.num_clients) if self.guessing else ""
        if not self.writes:
            return
        client, server = (count_parameters(part) for part in jax.eval_shape(sim.setting.fresh))
        print_table(self.console, client_table(run.dataset.summary))
        m = run.config.model
        self.console.print(
            f"{f.title}: {sim.cohort} of {sim.num_clients} clients a round, {f.local_steps} steps of "
            f"{f.batch_size} x {run.config.data.seq_len} tokens each; BERT {m.num_layers} x {m.hidden_size}, "
            f"{client:,} parameters at each client, {server:,} at the server"
        )
        if self.guessing is not None:
            chance = self.guessing.headline(f.weighting)
            self.console.print(
                f"to beat where held-out text is masked ({self.scope}): "
                f"always the commonest token {chance.accuracy:.1%}, unigram loss {chance.loss:.3f}"
            )
        versions = {name: __import__(name).__version__ for name in ("jax", "flax", "optax", "numpy")}
        self.facts: dict[str, Any] = run.workdir.read_facts() | {
            "clients": [dataclasses.asdict(c) for c in run.dataset.summary],
            "baselines": self._baselines(),
            "parameters": {"client": client, "server": server},
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}"
            + (f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""), "versions": versions,
            "bytes_per_round": {"up": by_way(self.messages, "up"), "down": by_way(self.messages, "down")},
            "num_clients": sim.num_clients, "clients_per_round": sim.cohort,
            "finished": False,
        }  # fmt: skip
        run.workdir.write_facts(self.facts)

    def begin(self) -> State:
        """Restores the newest checkpoint, or makes the state before round 0 and evaluates it."""
        workdir, done = self.run.workdir, self.checkpoints.rounds()
        if done:
            state, meta = run_lib.restore(self.run, self.checkpoints, done[-1])
            self.round, self.scores = done[-1], {k: v for k, v in meta.items() if "eval_" in k}
            self.console.print(f"resuming after round {self.round} of {self.run.config.federated.rounds}")
            if self.writes:
                truncate(workdir.metrics, self.round)
                self.log = MetricsLog(workdir.metrics)
            return state
        if self.writes:
            workdir.metrics.unlink(missing_ok=True)
            self.log = MetricsLog(workdir.metrics)
        with progress.waiting(self.console, "compiling the first evaluation"), progress.Compiling() as compiling:
            state, missing = run_lib.initial_state(self.run)
            record = {"round": 0, "step": 0, "tokens": 0} | self._evaluate(state)
        compiling.tell(self.console, "the model's start and its evaluation")
        if missing:
            self.console.print(f"warning: the checkpoint lacks, so it starts fresh: {', '.join(missing)}", style="yellow")
        self._stop_if(0, finite.in_scores(record))
        self._append(record)
        self._say(record)
        return state

    # --- the rounds ---

    def rounds(self, state: State, interrupts: Interrupts) -> State:
        """Runs the rounds that are left; a signal stops it after the round under way, with a checkpoint."""
        c, last = self.run.config, self.run.config.federated.rounds
        profile = Profile(c.profile if self.writes else "", self.run.workdir.profile)
        with progress.bar(self.console, "loss", "rate") as bar:
            task = bar.add_task("compiling", total=last, completed=self.round, loss="", rate="")

            def show(record: dict[str, Any]) -> None:
                loss, rate = f"loss {record['train_loss']:.3f}", f"{record['tokens_per_second']:,.0f} tokens/s"
                bar.update(task, completed=record["round"], loss=loss, rate=rate)

            waiting: Dispatched | None = None
            for n in range(self.round, last):
                if interrupts.stop():
                    break
                self.checkpoints.check()
                profile.before(n + 1, state)
                state, dispatched = self.dispatcher.start(self.sim.run_round, state, n)
                dispatched.compiling.tell(self.console, "a round")
                bar.update(task, description="rounds")
                profile.after(n + 1, state)
                if waiting is not None:  # round n is under way while the numbers of n - 1 are read
                    show(self._record(waiting))
                waiting = dispatched
                evaluates = (n + 1) % c.eval.every_rounds == 0 or n + 1 == last
                saves = (n + 1) % c.checkpoint.every_rounds == 0 or n + 1 == last
                if evaluates or saves:
                    show(self._record(waiting, state if evaluates else None))
                    waiting = None
                if saves:
                    self._save(state)
            profile.close(state)
            if profile.written:
                self.console.print(f"profile      {shown(profile.directory)} (tensorboard --logdir, or perfetto.dev)")
            if waiting is not None:
                show(self._record(waiting))
            if interrupts.settle() and self.round:
                self._save(state)
            self.checkpoints.wait()
        return state

    def _record(self, dispatched: Dispatched, state: State | None = None) -> dict[str, Any]:
        """Reads a round's metrics and writes its line, with an evaluation of `state` if that is given."""
        round = dispatched.round
        metrics, seconds, running = self.dispatcher.collect(dispatched)
        loss, client_norm, server_norm = map(float, metrics[:-1])
        first = [self.run.dataset.client_names[c] for c in self.sim.first_to_fail(round - 1, np.asarray(metrics.failed))]
        self._stop_if(round, finite.in_round(loss, client_norm, server_norm, first))
        tokens = self.sim.tokens_per_round
        record = {
            "round": round,
            "step": round * self.sim.strategy.steps_per_round,
            "tokens": round * tokens,
            "train_loss": loss,
            "learning_rate": float(np.asarray(self.sim.setting.client_tx.schedule(
                np.int32(round * self.sim.strategy.steps_per_round - 1)))),
            "grad_norm_client": client_norm,
            "grad_norm_server": server_norm,
            "seconds": seconds,
            "tokens_per_second": tokens / running,  # compiling is no part of a round's speed
            "uplink_bytes": round * sum(by_way(self.messages, "up").values()),
            "downlink_bytes": round * sum(by_way(self.messages, "down").values()),
        }  # fmt: skip
        if state is not None:
            with progress.Compiling() as compiling:
                record |= self._evaluate(state)
            compiling.tell(self.console, "the evaluation")
            self._stop_if(round, finite.in_scores(record))
            self._say(record)
        self._append(record)
        self.round = round
        return record

    def _save(self, state: State) -> None:
        """Begins to save the state after the rounds recorded; one whose numbers aren't all finite is never kept."""
        self._stop_if(self.round, finite.in_state(state, self.run.dataset.client_names))
        self.checkpoints.save(self.round, state, self._meta() | {"config": resume.stamp(self.run.config)})

    def _stop_if(self, round: int, problem: str) -> None:
        """Raises DivergedError if there is a problem with numbers that aren't finite."""
        if not problem:
            return
        self.checkpoints.wait()
        kept = self.checkpoints.rounds()
        where = f"the checkpoint of round {kept[-1]} is kept" if kept else "there was no checkpoint yet"
        raise DivergedError(
            f"round {round}: {problem}; {where}, and nothing is exported; lower the learning rates, lengthen warmup_steps "
            "or set clip_norm, and begin in another workdir."
        )

    def _append(self, record: dict[str, Any]) -> None:
        if self.log is not None:
            self.log.append(record)

    def _evaluate(self, state: State) -> dict[str, Any]:
        """Returns the eval fields of a metrics line; none if no client has held-out text."""
        found = self.sim.evaluate(state)
        if found is None:
            return {}
        fields = found.fields("eval_loss", "eval_accuracy", self.run.config.federated.weighting)
        fields["eval_clients_scored"] = len(found.clients)
        best = self.scores.get("best_eval_loss")
        self.scores = fields | {"best_eval_loss": fields["eval_loss"] if best is None else min(best, fields["eval_loss"])}
        names = self.run.dataset.client_names
        return fields | {"eval_clients": {names[c]: score._asdict() for c, score in found.clients.items()}}

    def _baselines(self) -> dict[str, float]:
        """Returns what guessing by frequency reaches, for run.json and the model card; nothing without held-out text."""
        if self.guessing is None:
            return {}
        return self.guessing.fields("unigram_loss", "commonest_accuracy", self.run.config.federated.weighting)

    def _say(self, record: dict[str, Any]) -> None:
        """Prints an evaluation: a line that stays when the progress bar has gone, and in a log file."""
        width = len(str(self.run.config.federated.rounds))
        parts = [f"round {record['round']:>{width}}", f"{record['tokens'] / 1e6:7.2f}M tokens"]
        if "train_loss" in record:
            parts.append(f"train loss {record['train_loss']:.3f}")
        if "eval_loss" in record:
            parts.append(f"held-out loss {record['eval_loss']:.3f}  accuracy {record['eval_accuracy']:.1%}")
            parts.append(f"({self.scope})")
        if "seconds" in record:
            parts.append(f"{record['tokens_per_second']:,.0f} tokens/s")
            parts.append(f"wire {(record['uplink_bytes'] + record['downlink_bytes']) / 1e6:,.0f} MB")
        self.console.print("  ".join(parts))

    def _meta(self) -> dict[str, Any]:
        """What a checkpoint holds beside the state, and the model card says."""
        return self._baselines() | self.scores | {
            "round": self.round,
            "seed": self.run.config.seed,
            "tokens": self.round * self.sim.tokens_per_round,
            "num_clients": self.sim.num_clients,
            "clients_per_round": self.sim.cohort,
        }

    # --- after the last round ---

    def finish(self, state: State) -> None:
        """Exports the model, fills in the examples, writes the report, and says where everything is."""
        run, workdir, config = self.run, self.run.workdir, self.run.config
        self.checkpoints.close()
        model = self.sim.model_of(state)
        self._check_model(model)
        name = run_lib.export(run, state, workdir.hf, self._meta())
        self.sim.close()
        self.dispatcher.close()
        if self.log is None:
            return
        self.log.close()
        segments = self.sim.setting.segments
        filled = fill_mask(segments, model.client, model.server, run.tokenizer, list(config.fill_mask))
        self.facts |= {
            "finished": True,
            "fill_mask": [{"text": t, "predictions": p} for t, p in zip(config.fill_mask, filled, strict=True)],
            "seconds_total": sum(r.get("seconds", 0.0) for r in read_metrics(workdir.metrics)),
        }
        workdir.write_facts(self.facts)
        report = write_report(workdir.root)
        if filled:
            self.console.print()
        for text, predictions in zip(config.fill_mask, filled, strict=True):
            self.console.print(f"  {shown(text)}", style="bold")
            self.console.print("    " + "  ".join(f"{shown(t)} {p:.0%}" for t, p in predictions))
        self.console.print(f"\nmodel        {shown(workdir.hf)}" + (f" (of client {shown(name)})" if name else ""))
        self.console.print(f"report       {shown(report)}")
        self.console.print(f"checkpoints  {shown(workdir.checkpoints)}")
        if self.guessing is not None:
            accuracy, chance = self.scores["eval_accuracy"], self.guessing.headline(config.federated.weighting).accuracy
            times = f", {accuracy / chance:.1f} times the" if chance else "; the"
            self.console.print(
                f"held-out accuracy {accuracy:.1%} ({self.scope}){times} commonest token's {chance:.1%} "
                "at the same masked positions"
            )

    def _check_model(self, model: Pair) -> None:
        """Raises DivergedError unless what the model says is finite: by the last evaluation, or without one by one word."""
        problem = finite.in_scores(self.scores)
        if "eval_loss" not in self.scores:
            segments, tokenizer = self.sim.setting.segments, self.run.tokenizer
            (((_, probability), *_),) = fill_mask(segments, model.client, model.server, tokenizer, ["[MASK]"])
            problem = "" if math.isfinite(probability) else "what the model predicts is not finite"
        self._stop_if(self.round, problem)

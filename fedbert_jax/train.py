"""Pre-training: runs the loop of rounds on a run's data and model, then exports and reports."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from fedbert_jax import config as config_lib
from fedbert_jax import experiment
from fedbert_jax.config import Config
from fedbert_jax.console.output import make_console, print_table, shown
from fedbert_jax.console.progress import Stages
from fedbert_jax.data.summary import client_table
from fedbert_jax.devices import platforms, processes
from fedbert_jax.devices.interrupts import Interrupts
from fedbert_jax.devices.mesh import make_mesh
from fedbert_jax.experiment import Run
from fedbert_jax.federated import finite, optim
from fedbert_jax.federated.metrics import RoundMetrics
from fedbert_jax.federated.state import Pair, State
from fedbert_jax.federated.wire import by_way
from fedbert_jax.loop import Loop, Watcher
from fedbert_jax.models import huggingface
from fedbert_jax.models.bert import count_parameters
from fedbert_jax.privacy import accountant
from fedbert_jax.report.page import write_report
from fedbert_jax.runtime.dispatch import Done
from fedbert_jax.runtime.fill_mask import fill_mask
from fedbert_jax.runtime.profiling import Profile
from fedbert_jax.workdir import resume, sinks
from fedbert_jax.workdir.checkpoint import Checkpoints
from fedbert_jax.workdir.log import Record, read_metrics
from fedbert_jax.workdir.paths import open_workdir


def train(config: Config, root: Path, console: Console | None = None, watch: Callable[[Record], bool] | None = None) -> int:
    """Trains a run to its last round, starting from the state of its workdir.

    Args:
      config: validated.
      root: the workdir.
      console: where to print; by default the terminal and, with several processes, only that of the first one.
      watch: is given every record of the metrics; True ends the run after the round under way, as SIGTERM does.

    Returns:
      The exit code: 0, or 128 + the signal that interrupted it.

    Raises:
      UserError: for what the user can fix.
    """
    console = console or make_console(quiet=not processes.first())
    optim.check(config)
    accountant.check_installed(config)
    sinks.check_installed(config)
    platforms.introduce(console, lambda: make_mesh(config.mesh).size)
    processes.check_same("config", config_lib.flatten(config_lib.to_dict(config)))
    workdir, lock = open_workdir(root)
    with lock:
        huggingface.check_target(workdir.hf)  # now, not after hours of training
        with Stages(console) as stages:
            warn = lambda text: console.print(f"warning: {shown(text)}", style="yellow")  # noqa: E731
            run = experiment.open_run(config, workdir, stages, warn)
        job = Pretraining(run, console)
        job.introduce()
        checkpoints = Checkpoints(workdir.checkpoints, run.config.checkpoint.keep)
        profile = Profile(run.config.profile if processes.first() else "", workdir.profile)
        interrupts = Interrupts()
        told = sinks.make_sinks(run.config, workdir) + ([] if watch is None else [Watcher(watch, interrupts)])
        loop = Loop(job, checkpoints, workdir.metrics, console, profile, told)
        with contextlib.ExitStack() as ending:
            ending.callback(loop.close_log)
            state = loop.begin()
            with interrupts:
                state = loop.run(state, interrupts)
                if interrupts.settle():
                    console.print(f"stopped after round {loop.round}; the same command goes on from there")
                    return interrupts.exit_code
            with loop.guard(loop.round):
                job.finish(state, loop.round)
            loop.close()
    return 0


def evaluated(run: Run, state: State) -> dict[str, Any]:
    """Returns the eval fields of a metrics line; {} if no client has held-out text."""
    found, names = run.simulation.evaluate(state), run.dataset.client_names
    extra: dict[str, Any] = {}
    if run.extra is not None:
        by_client = run.simulation.pseudo_perplexity(state, *run.extra)
        extra = {"eval_extra_perplexity": statistics.fmean(by_client.values())}
        if run.config.federated.arrangement.keeps_own:
            extra |= {"eval_extra_clients": {names[c]: {"perplexity": value} for c, value in by_client.items()}}
    if found is None:
        return extra
    fields: dict[str, Any] = found.fields("eval_loss", "eval_accuracy", run.config.federated.weighting)
    clients: dict[str, dict[str, float]] = {names[c]: score._asdict() for c, score in found.clients.items()}
    return fields | {"eval_clients_scored": len(clients), "eval_clients": clients} | extra


class Pretraining:
    """Pre-training as the loop's job (`loop.Job`).

    Args:
      run: ready for its next round.
      console: where to print.
    """

    name, what = "rounds", ""
    remedy = "lower the learning rates, lengthen warmup_steps or set clip_norm"

    def __init__(self, run: Run, console: Console):
        self.run, self.console, self.sim = run, console, run.simulation
        self.total = run.config.federated.rounds
        self.state_shape, self.state_sharding = self.sim.state_shape, self.sim.state_sharding
        self.scores: dict[str, Any] = {}  # the last evaluation's numbers, and the best loss so far
        self.messages = self.sim.traffic()  # bytes per round
        feed, dp = self.sim.feed, run.config.privacy.dp != "none"
        self.accountant = accountant.Accountant(run.config, feed.num_clients, feed.cohort) if dp else None

    # --- before the first round ---

    def introduce(self) -> None:
        """Prints who takes part and the baseline to beat, and writes the run's facts."""
        run, f, sim = self.run, self.run.config.federated, self.sim
        self.guessing = sim.evaluate_frequencies(run.dataset.unigram, run.dataset.special_ids)
        # Which mean the held-out numbers are, and over how many clients: stated wherever they appear.
        self.scope = self.guessing.scope(f.weighting, sim.feed.num_clients) if self.guessing else ""
        if not processes.first():
            return
        client, server = (count_parameters(part) for part in jax.eval_shape(sim.setting.fresh))
        print_table(self.console, client_table(run.dataset.summary))
        m = run.config.model
        self.console.print(
            f"{f.title}: {sim.feed.cohort} of {sim.feed.num_clients} clients a round, {f.local_steps} steps of "
            f"{f.batch_size} x {run.config.data.seq_len} tokens each; BERT {m.num_layers} x {m.hidden_size}, "
            f"{client:,} parameters at each client, {server:,} at the server"
        )
        if self.guessing is not None:
            chance = self.guessing.headline(f.weighting)
            self.console.print(
                f"to beat where held-out text is masked ({self.scope}): "
                f"always the commonest token {chance.accuracy:.1%}, unigram loss {chance.loss:.3f}"
            )
        if self.accountant is not None:
            self.console.print(self.accountant.sentence(self.total, over=False))
        versions = {name: __import__(name).__version__ for name in ("jax", "flax", "optax", "numpy")}
        self.facts: dict[str, Any] = run.workdir.read_facts() | {
            "clients": [dataclasses.asdict(c) for c in run.dataset.summary],
            "baselines": self._baselines(),
            "parameters": {"client": client, "server": server},
            "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}"
            + (f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""),
            "versions": versions,
            "bytes_per_round": {"up": by_way(self.messages, "up"), "down": by_way(self.messages, "down")},
            "num_clients": sim.feed.num_clients,
            "clients_per_round": sim.feed.cohort,
            "finished": False,
        }
        run.workdir.write_facts(self.facts)

    def begin(self) -> tuple[State, Record]:
        """Makes the state before round 0 and evaluates it."""
        state, missing = experiment.initial_state(self.run)
        if missing:
            self.console.print(f"warning: the checkpoint lacks, so it starts fresh: {', '.join(missing)}", style="yellow")
        record = {"round": 0, "step": 0, "tokens": 0} | self.evaluate(state)
        finite.require(finite.in_scores(record))
        self.say(record)
        return state, record

    def resume(self, round: int, meta: dict[str, Any]) -> None:
        """Takes up the last evaluation's numbers."""
        self.scores = {k: v for k, v in meta.items() if "eval_" in k}

    # --- the rounds ---

    def run_round(self, state: State, round: int) -> tuple[State, RoundMetrics]:
        """Dispatches a round, counted from 0."""
        return self.sim.run_round(state, round)

    def evaluates(self, round: int) -> bool:
        """True every `eval.every_rounds` rounds, and after the last."""
        return round % self.run.config.eval.every_rounds == 0 or round == self.total

    def enough(self) -> bool:
        """True once `eval.patience` evaluations in a row were no better than the best."""
        patience = self.run.config.eval.patience
        return patience is not None and self.scores.get("eval_stale", 0) >= patience

    def saves(self, round: int) -> bool:
        """True every `checkpoint.every_rounds` rounds, and after the last."""
        return round % self.run.config.checkpoint.every_rounds == 0 or round == self.total

    def record(self, round: int, done: Done) -> Record:
        """Returns a round's line in the log."""
        loss, client_norm, server_norm = map(float, done.metrics[:3])
        failed = self.sim.first_to_fail(round - 1, np.asarray(done.metrics.failed))
        names = [self.run.dataset.client_names[c] for c in failed]
        finite.require(finite.in_round(loss, client_norm, server_norm, names))
        step = round * self.sim.strategy.steps_per_round
        return {
            "round": round,
            "step": step,
            "tokens": round * self.sim.feed.tokens_per_round,
            "train_loss": loss,
            "learning_rate": float(np.asarray(self.sim.setting.client_tx.schedule(np.int32(step - 1)))),
            "grad_norm_client": client_norm,
            "grad_norm_server": server_norm,
            "seconds": done.seconds,
            "tokens_per_second": self._rate(done),
            "uplink_bytes": round * sum(by_way(self.messages, "up").values()),
            "downlink_bytes": round * sum(by_way(self.messages, "down").values()),
            **({"dp_epsilon": self.accountant.epsilon(round)} if self.accountant is not None else {}),
        }

    def _rate(self, done: Done) -> float:
        return self.sim.feed.tokens_per_round / done.running  # compiling is not part of a round's speed

    def show(self, done: Done) -> str:
        """Returns the numbers beside the progress bar."""
        return f"loss {float(done.metrics.loss):.3f}  {self._rate(done):,.0f} tokens/s"

    def check(self, state: State) -> None:
        """Checks every number of a state."""
        finite.require(finite.in_state(state, self.run.dataset.client_names))

    def evaluate(self, state: State) -> dict[str, Any]:
        """Returns the eval fields of a metrics line; {} if no client has held-out text."""
        fields = evaluated(self.run, state)
        if not fields:
            return {}
        numbers = {name: value for name, value in fields.items() if not isinstance(value, dict)}
        before, self.scores = self.scores, numbers
        if "eval_loss" in fields:
            self.scores |= {"best_eval_loss": min(before.get("best_eval_loss", math.inf), fields["eval_loss"])}
        judged = fields.get("eval_extra_perplexity", fields.get("eval_loss"))
        best = before.get("best_eval_judged", math.inf)
        stale = 0 if judged < best else before.get("eval_stale", 0) + 1
        self.scores |= {"best_eval_judged": min(best, judged), "eval_stale": stale}
        return fields

    def _baselines(self) -> dict[str, float]:
        """Returns what guessing by frequency reaches, for run.json and the model card; {} without held-out text."""
        if self.guessing is None:
            return {}
        return self.guessing.fields("unigram_loss", "commonest_accuracy", self.run.config.federated.weighting)

    def say(self, record: dict[str, Any]) -> None:
        """Prints a line with an evaluation, which outlasts the progress bar and also appears in a log file."""
        width = len(str(self.run.config.federated.rounds))
        parts = [f"round {record['round']:>{width}}", f"{record['tokens'] / 1e6:7.2f}M tokens"]
        if "train_loss" in record:
            parts.append(f"train loss {record['train_loss']:.3f}")
        if "eval_loss" in record:
            parts.append(f"held-out loss {record['eval_loss']:.3f}  accuracy {record['eval_accuracy']:.1%}")
            parts.append(f"({self.scope})")
        if "eval_extra_perplexity" in record:
            assert self.run.extra is not None
            own = record.get("eval_extra_clients")
            of = f"{len(self.run.extra.tokens)} blocks" + (f", mean over {len(own)} clients' models" if own else "")
            parts.append(f"pseudo-perplexity of eval.extra {record['eval_extra_perplexity']:,.1f} ({of})")
        if "seconds" in record:
            parts.append(f"{record['tokens_per_second']:,.0f} tokens/s")
            parts.append(f"wire {(record['uplink_bytes'] + record['downlink_bytes']) / 1e6:,.0f} MB")
        self.console.print("  ".join(parts))

    def meta(self, round: int) -> dict[str, Any]:
        """Returns what a checkpoint holds beside the state: the model card's facts, and the config it was made with."""
        return self._facts(round) | {"config": resume.stamp(self.run.config)}

    def _facts(self, round: int) -> dict[str, Any]:
        return (
            self._baselines()
            | self.scores
            | {
                "round": round,
                "seed": self.run.config.seed,
                "tokens": round * self.sim.feed.tokens_per_round,
                "num_clients": self.sim.feed.num_clients,
                "clients_per_round": self.sim.feed.cohort,
            }
            | ({} if self.accountant is None else {"dp": self.accountant.sentence(round, over=True)})
        )

    # --- after the last round ---

    def finish(self, state: State, round: int) -> None:
        """Exports the model, fills in the examples, writes the report, and prints where everything is."""
        run, workdir, config = self.run, self.run.workdir, self.run.config
        model = self.sim.model_of(state)
        self._check_model(model)
        name = experiment.export(run, state, workdir.hf, self._facts(round))
        self.sim.close()
        if not processes.first():
            return
        segments = self.sim.setting.segments
        filled = fill_mask(segments, model.client, model.server, run.tokenizer, list(config.fill_mask))
        self.facts |= {
            "finished": True,
            "ended_early_after": round if round < self.total else None,
            "fill_mask": [{"text": t, "predictions": p} for t, p in zip(config.fill_mask, filled, strict=True)],
            "seconds_total": sum(r.get("seconds", 0.0) for r in read_metrics(workdir.metrics)),
        }
        workdir.write_facts(self.facts)
        report = write_report(workdir.root)
        if round < self.total:
            self.console.print(
                f"ended after round {round} of {self.total}: {config.eval.patience} evaluations in a row were no better "
                "than the best"
            )
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
        if self.accountant is not None:
            self.console.print(self.accountant.sentence(round, over=True))

    def _check_model(self, model: Pair) -> None:
        """Requires finite predictions: those of the last evaluation or, without one, the prediction of one word."""
        problem = finite.in_scores(self.scores)
        if "eval_loss" not in self.scores:
            segments, tokenizer = self.sim.setting.segments, self.run.tokenizer
            (((_, probability), *_),) = fill_mask(segments, model.client, model.server, tokenizer, ["[MASK]"])
            problem = "" if math.isfinite(probability) else "what the model predicts is not finite"
        finite.require(problem)

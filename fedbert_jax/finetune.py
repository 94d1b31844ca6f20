"""Fine-tuning on GLUE: the same three segments with a classifier for a head, by any strategy that ends in one model."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fedbert_jax import huggingface, optim, run
from fedbert_jax.checkpoint import Checkpoints
from fedbert_jax.config import Config
from fedbert_jax.data import glue
from fedbert_jax.data.masking import MaskedBatch
from fedbert_jax.data.partition import assign
from fedbert_jax.data.sampling import client_weights
from fedbert_jax.data.sequences import ExampleStream, Sequences, encode, eval_batches, padded_length, take
from fedbert_jax.data.tokenizer import load_tokenizer, vocab_size
from fedbert_jax.errors import ConfigError, DivergedError, UserError
from fedbert_jax.federated.setting import Pair, RoundInputs, RoundMetrics, Setting, State
from fedbert_jax.federated.split import joined_logits
from fedbert_jax.federated.strategies import STRATEGIES
from fedbert_jax.glue_metrics import score, summary
from fedbert_jax.interrupts import Interrupts
from fedbert_jax.metrics import MetricsLog, to_json, truncate
from fedbert_jax.models.bert import Segments, make_segments
from fedbert_jax.optim import make_aggregator, make_optimizer
from fedbert_jax.runtime.simulation import compute_dtype
from fedbert_jax.workdir import check_same, open_workdir, write_atomically


@dataclass(frozen=True)
class TaskData:
    """A GLUE task, tokenised."""

    task: glue.Task
    train: Sequences
    dev: dict[str, Sequences]  # by split: MNLI has two
    test: dict[str, Sequences]  # empty unless predictions are asked for
    test_ids: dict[str, list[str]]


def read_task(config: Config, tokenizer: Any) -> TaskData:
    """Reads and tokenises the task that `data.source` names: `glue:TASK` from the hub or `glue:TASK@DIR`."""
    name, _, directory = config.data.source.removeprefix("glue:").partition("@")
    task = glue.find_task(name)
    dev, test = glue.dev_splits(task), glue.test_splits(task) if config.finetune.predict else ()
    found = glue.load(task, Path(directory).expanduser() if directory else None, ("train", *dev, *test))

    def tokens(split: str) -> Sequences:
        e = found[split]
        return encode(tokenizer, e.first, e.second, e.labels, config.data.seq_len)

    ids = {split: found[split].ids for split in test}
    return TaskData(task, tokens("train"), {s: tokens(s) for s in dev}, {s: tokens(s) for s in test}, ids)


def resolve(config: Config, tokenizer: Any) -> tuple[Config, huggingface.Tensors | None]:
    """Fills in the model's sizes, and reads the checkpoint to start from; None is a random start."""
    config = run.resolve(config, vocab_size(tokenizer))
    if not config.model.init_from:
        return config, None
    return config, huggingface.load_tensors(run.local(config.model.init_from))[0]


class Finetuning:
    """One task's fine-tuning for some seeds side by side: compiled programs, data order, evaluation.

    Args:
      config: with `model` resolved.
      data: the task.
      start: the checkpoint's tensors; None is a random start.
      seeds: each trains a model of its own; with several, all in one program.
    """

    def __init__(self, config: Config, data: TaskData, start: huggingface.Tensors | None, seeds: tuple[int, ...]):
        f = config.federated
        self.config, self.data, self.start, self.seeds = config, data, start, seeds
        if data.train.token_types.any() and config.model.type_vocab_size == 1:
            raise ConfigError(
                f"config key model.type_vocab_size=1: accepted: at least 2, since {data.task.name} has sentence pairs."
            )
        central = f.strategy == "centralized"
        self.clients = self._deal(1 if central else f.num_clients or 1)
        self.per_round = len(self.clients) * f.local_steps * f.batch_size
        self.rounds = math.ceil(config.finetune.epochs * len(data.train) / self.per_round)
        steps = self.rounds * f.local_steps * (len(self.clients) if f.strategy == "sequential" else 1)
        optimizers = [
            dataclasses.replace(o, warmup_steps=int(config.finetune.warmup * steps), decay_steps=None)
            for o in (config.client_optimizer, config.server_optimizer)
        ]
        self.setting = Setting(
            config=config,
            segments=make_segments(config.model, compute_dtype(config), data.task.num_outputs),
            mask=None,
            client_tx=make_optimizer(optimizers[0], "client_optimizer", steps),
            server_tx=make_optimizer(optimizers[1], "server_optimizer", steps),
            outer=make_aggregator(config.aggregator),
            num_clients=len(self.clients),
            cohort=len(self.clients),
        )
        sizes = np.array([len(own) for own in self.clients])
        self.weights = client_weights(sizes, np.arange(len(sizes)), f.weighting)
        self.streams = self._streams()
        self._round = jax.jit(jax.vmap(self._one_round, (0, 0, None, 0)), donate_argnums=0)
        self._predict = jax.jit(jax.vmap(self._one_predict, (0, None)))
        self.segments: Segments = self.setting.segments

    def for_seeds(self, seeds: tuple[int, ...]) -> Finetuning:
        """Returns the same for other seeds: for as many as here, the same compiled programs."""
        other = copy.copy(self)
        other.seeds = seeds
        other.streams = other._streams()
        return other

    def _streams(self) -> list[list[ExampleStream]]:
        f, lengths = self.config.federated, self.data.train.lengths
        return [
            [ExampleStream(seed, c, lengths[own], f.local_steps, f.batch_size) for c, own in enumerate(self.clients)]
            for seed in self.seeds
        ]

    def _deal(self, count: int) -> list[np.ndarray]:
        train, partition = self.data.train, self.config.data.partition
        if count == 1:
            return [np.arange(len(train))]
        labels = np.round(train.labels).astype(int)  # a regression's, to the nearest whole number
        _, owned = assign([str(x) for x in labels], np.ones(len(train)), partition, count, self.config.seed)
        empty = [n for n, own in enumerate(owned) if not len(own)]
        if empty:
            raise ConfigError(
                f"config key data.partition.alpha={partition.alpha}: client {empty[0]} of {count} gets no example; "
                "accepted: a larger alpha, or fewer clients."
            )
        return owned

    def _fresh_state(self) -> State:
        strategy = STRATEGIES[self.config.federated.strategy](self.setting)
        make = lambda seed: strategy.init(Pair(*self.setting.segments.init(jax.random.key(seed))))  # noqa: E731
        return jax.vmap(make)(jnp.asarray(self.seeds))

    def state_shape(self) -> State:
        """Returns the shapes of the states [S, ...]."""
        return jax.eval_shape(self._fresh_state)

    def init_state(self) -> tuple[State, list[str]]:
        """Returns the states before the first round [S, ...], and what the checkpoint lacked (initialised instead)."""
        if self.start is None:
            return jax.jit(self._fresh_state)(), []
        strategy, states = STRATEGIES[self.config.federated.strategy](self.setting), []
        missing: list[str] = []
        for seed in self.seeds:
            client, server = jax.jit(self.segments.init)(jax.random.key(seed))
            client, server, missing = huggingface.from_tensors(
                self.start, client, server, huggingface.CLASSIFIER_CLIENT
            )
            states.append(strategy.init(Pair(client, server)))
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states), huggingface.describe_missing(missing)

    def _one_round(
        self, state: State, batches: MaskedBatch, round: jax.Array, seed: jax.Array
    ) -> tuple[State, RoundMetrics]:
        s = dataclasses.replace(self.setting, seed=seed)
        clients = jnp.arange(len(self.clients), dtype=jnp.int32)
        inputs = RoundInputs(batches, clients, jnp.asarray(self.weights), round)
        return STRATEGIES[self.config.federated.strategy](s).round(state, inputs)

    def batches(self, round: int) -> MaskedBatch:
        """Returns a round's batches [S, K, C, B, ...]: functions of (seed, round, client)."""
        index = np.stack([
            np.stack([own[stream.round(round)] for own, stream in zip(self.clients, streams, strict=True)], axis=1)
            for streams in self.streams
        ])  # fmt: skip
        longest = int(self.data.train.lengths[index].max())
        return take(self.data.train, index, padded_length(longest, self.config.data.seq_len))

    def step(self, state: State, round: int) -> tuple[State, RoundMetrics]:
        """Dispatches a round; `state` is used up. Metrics are [S]."""
        return self._round(state, self.batches(round), jnp.int32(round), jnp.asarray(self.seeds))

    def _one_predict(self, model: Pair, batch: MaskedBatch) -> jax.Array:
        return joined_logits(self.segments, model.client, model.server, batch)[:, 0]

    def logits(self, state: State, data: Sequences) -> np.ndarray:
        """Returns the outputs for all sequences, float32 [S, n, outputs]."""
        result = np.zeros((len(self.seeds), len(data), self.data.task.num_outputs), np.float32)
        for index, batch in eval_batches(data, self.config.eval.batch_size, self.config.data.seq_len):
            result[:, index] = np.asarray(self._predict(state.model, batch))[:, : len(index)]
        return result

    def predictions(self, logits: np.ndarray) -> np.ndarray:
        """Turns outputs [..., outputs] into class ids, or scores of a regression."""
        return logits[..., 0] if self.data.task.regression else logits.argmax(-1)

    def scores(self, state: State) -> list[dict[str, dict[str, float]]]:
        """Returns the official metrics of each seed, by dev split."""
        found = {split: self.predictions(self.logits(state, d)) for split, d in self.data.dev.items()}
        return [
            {split: score(self.data.task, p[s], self.data.dev[split].labels) for split, p in found.items()}
            for s in range(len(self.seeds))
        ]


def finetune(config: Config, root: Path, console: Console | None = None) -> int:
    """Fine-tunes on a task in a workdir, from wherever it stands; writes metrics, results and the model.

    Args:
      config: validated, with task='finetune'.
      root: the workdir.
      console: where to speak; the terminal by default.

    Returns:
      The exit code: 0, or 128 + the signal that interrupted it.

    Raises:
      UserError: for what the user can mend.
    """
    console = console or Console(highlight=False)
    optim.check(config)
    workdir, _lock = open_workdir(root)
    tokenizer = load_tokenizer(config.data.tokenizer or str(run.local(config.model.init_from)))
    config, start = resolve(config, tokenizer)
    if workdir.exists():
        check_same(workdir.read_config(), config)
    data = read_task(config, tokenizer)
    workdir.write_config(config)
    all_seeds = tuple(range(config.seed, config.seed + config.finetune.seeds))
    at_once = config.finetune.seeds_at_once or (1 if jax.default_backend() == "cpu" else len(all_seeds))
    results = _read_results(workdir.root)
    console.print(
        f"{data.task.name}: {len(data.train):,} training examples, {sum(map(len, data.dev.values())):,} to judge by; "
        f"{config.federated.strategy}, {len(all_seeds)} seed{'s' * (len(all_seeds) > 1)}"
    )
    tuning: Finetuning | None = None
    with Interrupts() as interrupts:
        for n in range(0, len(all_seeds), at_once):
            group = all_seeds[n : n + at_once]
            if all(str(seed) in results["seeds"] for seed in group):
                continue
            tuning = tuning.for_seeds(group) if tuning else Finetuning(config, data, start, group)
            state = _train_group(tuning, workdir, interrupts, console)
            if state is None:
                console.print("stopped; the same command goes on from there")
                return interrupts.exit_code
            if n == 0:
                export(tuning, state, tokenizer, workdir.hf)
                for split, tests in data.test.items():
                    folder = workdir.root / "predictions"
                    folder.mkdir(exist_ok=True)
                    found = tuning.predictions(tuning.logits(state, tests))[0]
                    glue.write_submission(folder, data.task, split, data.test_ids[split], found)
            for seed, scores in zip(group, tuning.scores(state), strict=True):
                results["seeds"][str(seed)] = scores
                console.print(f"  seed {seed}: {_show(scores)}", highlight=False)
            results |= summarise(data.task, results["seeds"])
            write_atomically(workdir.root / "results.json", to_json(results, indent=2) + "\n")
    median, mean, std = (100 * results[k] for k in ("median", "mean", "std"))
    console.print(f"median {median:.1f}, mean {mean:.1f} ± {std:.1f} (last epoch)")
    console.print(f"model    {workdir.hf} (of seed {all_seeds[0]})\nresults  {workdir.root / 'results.json'}")
    return 0


def summarise(task: glue.Task, seeds: dict[str, Any]) -> dict[str, Any]:
    """Returns the median, mean and standard deviation over seeds of the task's GLUE number (MNLI: of both dev sets)."""
    values = [float(np.mean([summary(task, s) for s in scores.values()])) for scores in seeds.values()]
    return {
        "task": task.name, "seeds": seeds, "values": values, "median": float(np.median(values)),
        "mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
    }  # fmt: skip


def export(tuning: Finetuning, state: State, tokenizer: Any, directory: Path, which: int = 0) -> None:
    """Writes a directory that `AutoModelForSequenceClassification` loads: the model of seed number `which`."""
    client, server = jax.device_get(jax.tree.map(lambda x: x[which], state.model))
    task, card = tuning.data.task, huggingface.classifier_card(tuning.config, tuning.data.task.name)
    names = task.labels or ("score",)
    huggingface.save(
        directory, client, server, tuning.config.model, tokenizer, card, labels=names, regression=task.regression
    )


def _train_group(tuning: Finetuning, workdir: Any, interrupts: Interrupts, console: Console) -> State | None:
    """Trains a group of seeds to its last round; None if it was interrupted. Checkpoints come after epochs and then."""
    name = f"seed-{tuning.seeds[0]}"
    checkpoints = Checkpoints(workdir.checkpoints / name, keep=1)
    log_path = workdir.root / f"metrics-{name}.jsonl"
    per_epoch = max(round(tuning.rounds / max(tuning.config.finetune.epochs, 1)), 1)
    done, finished = checkpoints.rounds(), 0
    losses: list[Any] = []  # [S] of each round since the last line of the log
    if done:
        shape = tuning.state_shape()
        place = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), shape)
        state, meta = checkpoints.restore(done[-1], shape, place)
        finished, losses = done[-1], meta["losses"]
        truncate(log_path, finished)
    else:
        log_path.unlink(missing_ok=True)
        state, missing = tuning.init_state()
        if missing:
            console.print(f"the checkpoint lacks, so it starts fresh: {', '.join(missing)}", style="dim")
    with MetricsLog(log_path) as log, _progress(console) as progress:
        bar = progress.add_task(f"{tuning.data.task.name} {name}", total=tuning.rounds, completed=finished)
        for n in range(finished, tuning.rounds):
            if interrupts.received:
                checkpoints.save(n, state, {"losses": [np.asarray(x, np.float64).tolist() for x in losses]})
                checkpoints.close()
                return None
            state, metrics = tuning.step(state, n)
            if losses:
                jax.block_until_ready(losses[-1])  # round n is under way while the bar shows what n - 1 has finished
            losses.append(metrics.loss)
            progress.update(bar, completed=n)
            if (n + 1) % per_epoch == 0 or n + 1 == tuning.rounds:
                mean = np.mean([np.asarray(x, np.float64) for x in losses], axis=0)
                losses = []
                if not np.isfinite(mean).all():
                    raise DivergedError(
                        f"{tuning.data.task.name}, seeds {tuning.seeds}: the loss is not finite by round {n + 1}; lower the "
                        "learning rates and begin in another workdir."
                    )
                scores = tuning.scores(state)
                log.append({"round": n + 1, "epoch": (n + 1) / per_epoch, "train_loss": mean, "scores": scores})
                if n + 1 < tuning.rounds:
                    checkpoints.save(n + 1, state, {"losses": []})
    checkpoints.close()
    return state


def _read_results(root: Path) -> dict[str, Any]:
    path = root / "results.json"
    try:
        return json.loads(path.read_text()) if path.is_file() else {"seeds": {}}
    except ValueError as e:
        raise UserError(f"{path} is damaged ({e}); delete it to fine-tune again what it told of.") from e


def _show(scores: dict[str, dict[str, float]]) -> str:
    return "; ".join(
        (f"{split}: " if len(scores) > 1 else "") + ", ".join(f"{k} {100 * v:.1f}" for k, v in found.items())
        for split, found in scores.items()
    )


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(), console=console, transient=True,
    )  # fmt: skip

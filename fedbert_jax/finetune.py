"""Fine-tuning on GLUE: the same three segments with a classifier for a head, by any strategy that ends in one model."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from fedbert_jax import config as config_lib
from fedbert_jax import disk, huggingface, optim, platforms, progress, resume, run
from fedbert_jax.checkpoint import Checkpoints
from fedbert_jax.config import Config
from fedbert_jax.console import make_console, shown
from fedbert_jax.data import glue
from fedbert_jax.data.submissions import submission_name, write_submission
from fedbert_jax.data.tasks import read_task, task_of
from fedbert_jax.data.tokenizer import load_tokenizer, vocab_size
from fedbert_jax.errors import DivergedError, UserError, about
from fedbert_jax.federated.metrics import RoundMetrics
from fedbert_jax.federated.state import Pair, State
from fedbert_jax.glue_metrics import summary
from fedbert_jax.interrupts import Interrupts
from fedbert_jax.metrics import MetricsLog, to_json, truncate
from fedbert_jax.models.bert import Params
from fedbert_jax.runtime.finetuning import Finetuning
from fedbert_jax.sharding import make_mesh
from fedbert_jax.workdir import Workdir, check_inputs, check_same, fingerprint, open_workdir, write_atomically

TRIAL = 2**30  # turns a seed into one that is none of those reported, however many


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's tensors, with which a fresh model is filled."""

    tensors: huggingface.Tensors
    classifier: str = ""  # what became of its own classifier, for the person to read; "" if it has none

    def __call__(self, client: Params, server: Params) -> tuple[Params, Params, list[str]]:
        """Fills parameters; returns also the names of what it lacks."""
        return huggingface.from_tensors(self.tensors, client, server, huggingface.CLASSIFIER_CLIENT)


def tokenizer_of(config: Config) -> Any:
    """Loads the tokenizer: the one named, or the starting checkpoint's."""
    key = "config key data.tokenizer" if config.data.tokenizer else "config key model.init_from"
    with about(key):
        try:
            return load_tokenizer(config.data.tokenizer or str(run.local(config.model.init_from)))
        except UserError as error:
            raise type(error)(str(error).replace("data.tokenizer=", f"{key}=")) from error


def resolve(config: Config, tokenizer: Any) -> tuple[Config, Checkpoint | None]:
    """Fills in the model's sizes, and reads the checkpoint to start from; None is a random start.

    A classifier that the checkpoint has is kept if its labels are the task's, with its outputs in the task's order.

    Raises:
      UserError: for a task that is none, or a checkpoint that can't be started from.
    """
    task, config = task_of(config), run.resolve(config, vocab_size(tokenizer))
    if not config.model.init_from:
        return config, None
    with about("config key model.init_from"):
        tensors, hf = huggingface.load_tensors(run.local(config.model.init_from))
        tensors, said = huggingface.fit_classifier(tensors, hf, task.name, task.labels)
        huggingface.check_finite(tensors, huggingface.CLASSIFIER_CLIENT)
    return config, Checkpoint(tensors, said)


def finetune(config: Config, root: Path, console: Console | None = None) -> int:
    """Fine-tunes on a task in a workdir, from wherever it stands; writes metrics, results and the model.

    A finished workdir can be given more seeds, and be asked for predictions.

    Args:
      config: validated, with task='finetune'.
      root: the workdir.
      console: where to speak; the terminal by default.

    Returns:
      The exit code: 0, or 128 + the signal that interrupted it.

    Raises:
      UserError: for what the user can mend.
    """
    console = console or make_console()
    optim.check(config)
    platforms.introduce(console, lambda: make_mesh(config.mesh).size)
    workdir, lock = open_workdir(root)
    with lock:
        return _finetune(config, workdir, console)


def _finetune(config: Config, workdir: Workdir, console: Console) -> int:
    tokenizer = tokenizer_of(config)
    config, start = resolve(config, tokenizer)
    if workdir.exists():
        check_same(workdir.read_config(), config, free=config_lib.EXTENDABLE)
    data = read_task(config, tokenizer)
    inputs = {"data.source": fingerprint(data.train, *data.dev.values())}
    if start:
        inputs["model.init_from"] = fingerprint(start.tensors)
    check_inputs(workdir, inputs)
    resume.check_stamp(str(workdir.facts), workdir.read_facts().get("config"), config, config_lib.EXTENDABLE)
    all_seeds = tuple(range(config.seed, config.seed + config.finetune.seeds))
    at_once = config.finetune.seeds_at_once or (1 if jax.default_backend() == "cpu" else len(all_seeds))
    results = _read_results(workdir.root)
    judges = ", ".join(f"{len(examples):,} of the split {split}" for split, examples in data.dev.items())
    console.print(
        f"{data.task.name}: {len(data.train):,} training examples, judged by {judges}; "
        f"{config.federated.title}, {len(all_seeds)} seed{'s' * (len(all_seeds) > 1)}"
    )
    if str(config.seed) not in results["seeds"]:
        huggingface.check_target(workdir.hf)  # now, not after hours of training
    tuning = Finetuning(config, data, start, all_seeds[:at_once])
    workdir.write_config(config)  # now that nothing about it was refused
    workdir.write_facts({"inputs": inputs, "config": resume.stamp(config)})
    with Interrupts() as interrupts:
        while pending := [seed for seed in all_seeds if str(seed) not in results["seeds"]]:
            group = _next_group(pending, at_once, workdir)
            tuning = tuning.for_seeds(group)
            trained = _train_group(tuning, workdir, interrupts, console)
            if trained is None:
                console.print("stopped; the same command goes on from there")
                return interrupts.exit_code
            state, scores_of_all = trained
            if config.seed in group:
                with disk.writing(workdir.hf):
                    export(tuning, state, tokenizer, workdir.hf, scores_of_all[group.index(config.seed)])
                for split in glue.test_splits(data.task):  # another model's predictions, if there are any
                    (workdir.root / "predictions" / submission_name(data.task, split)).unlink(missing_ok=True)
            results = {"seeds": results["seeds"]}  # without the summary of fewer seeds
            for seed, scores in zip(group, scores_of_all, strict=True):
                results["seeds"][str(seed)] = scores
                console.print(f"  seed {seed}: {_show(scores)}")
            _write_results(workdir.root, results)
            shutil.rmtree(workdir.checkpoints / _name(group), ignore_errors=True)  # its results are safe
            if interrupts.received:  # in the group's last round, or after it
                console.print("stopped; the same command goes on from there")
                return interrupts.exit_code
        trained_now = "values" not in results
        results |= summarise(data.task, {seed: results["seeds"][seed] for seed in map(str, all_seeds)})
        _write_results(workdir.root, results)
        if trained_now and workdir.hf.is_dir():
            card = huggingface.classifier_card(config, data.task, results["seeds"][str(config.seed)], results)
            write_atomically(workdir.root / "README.md", card)  # beside its place: hf/ holds an export and nothing else
            os.replace(workdir.root / "README.md", workdir.hf / "README.md")
        _predict(tuning, workdir)
    median, mean, std = (100 * results[k] for k in ("median", "mean", "std"))
    on = "" if data.dev.keys() == set(glue.dev_splits(data.task)) else f", on {', '.join(data.dev)}"
    numbers = f"median {median:.1f}, mean {mean:.1f} ± {std:.1f}" if len(all_seeds) > 1 else f"{mean:.1f}, of one seed"
    console.print(f"{numbers} (last epoch{on})")
    console.print(f"model    {shown(workdir.hf)} (of seed {all_seeds[0]})\nresults  {shown(workdir.root / 'results.json')}")
    return interrupts.exit_code if interrupts.received else 0


def _next_group(pending: Sequence[int], at_once: int, workdir: Workdir) -> tuple[int, ...]:
    """Returns the seeds to train next: those of a group that was interrupted, however many it has, or `at_once`."""

    def begun(group: Sequence[int]) -> bool:
        folder = workdir.checkpoints / _name(group)
        return folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir())  # a finished save

    sizes = (n for n in range(len(pending), 0, -1) if begun(pending[:n]))
    return tuple(pending[: next(sizes, at_once)])


def _predict(tuning: Finetuning, workdir: Workdir) -> None:
    """Writes the predictions of the exported model for the test files that have none yet."""
    task, folder = tuning.data.task, workdir.root / "predictions"
    for split, tests in tuning.data.test.items():
        path = folder / submission_name(task, split)
        if path.exists():
            continue
        client, server = jax.jit(tuning.setting.fresh)()  # all of it is replaced
        client, server, _ = Checkpoint(huggingface.load_tensors(workdir.hf)[0])(client, server)
        model = jax.tree.map(lambda x: x[None], Pair(client, server))
        found = tuning.predictions(tuning.logits(model, tests))[0]
        with disk.writing(path):
            folder.mkdir(exist_ok=True)
            write_submission(path, task, split, tuning.data.test_ids[split], found)


def choose_rate(config: Config, rates: Sequence[float], root: Path, console: Console) -> tuple[float, int]:
    """Tries learning rates, the same for both segments, on a tenth of the training examples that is kept back for this.

    Neither the dev set nor a seed that is reported has a part in the choice.

    Args:
      config: of the task, with the seeds to report.
      rates: to choose from, one seed each; a single one is not tried.
      root: of the workdirs, one a rate.
      console: where to speak.

    Returns:
      The rate with the best score, and the exit code: 0, or 128 + the signal that interrupted it.
    """
    scores = {}
    config = dataclasses.replace(config, seed=config.seed ^ TRIAL)
    for rate in rates if len(rates) > 1 else ():
        console.print(f"learning rate {rate:g}, judged by a tenth of the training examples", style="dim")
        trial, folder = with_rate(config, rate), root / repr(rate)
        settings = dataclasses.replace(config.finetune, seeds=1, holdout=0.1, predict=False)
        try:
            code = finetune(dataclasses.replace(trial, finetune=settings), folder, Console(quiet=True))
        except DivergedError:
            console.print(f"learning rate {rate:g} diverges", style="dim")
            continue
        if code:
            console.print("stopped; the same command goes on from there")
            return rate, code
        scores[rate] = _read_results(folder)["median"]
        huggingface.remove(folder / "hf")  # of no use
    if len(rates) > 1 and not scores:
        raise DivergedError(f"none of the learning rates {', '.join(f'{r:g}' for r in rates)} trains; give lower ones.")
    return max(scores, key=lambda rate: scores[rate], default=rates[0]), 0


def with_rate(config: Config, rate: float) -> Config:
    """Returns the config with this learning rate in both segments' optimizers."""
    client, server = (
        dataclasses.replace(o, learning_rate=rate) for o in (config.client_optimizer, config.server_optimizer)
    )
    return dataclasses.replace(config, client_optimizer=client, server_optimizer=server)


def summarise(task: glue.Task, seeds: dict[str, Any]) -> dict[str, Any]:
    """Returns the median, mean and standard deviation over seeds of the task's GLUE number (MNLI: of both dev sets)."""
    values = [float(np.mean([summary(task, s) for s in scores.values()])) for scores in seeds.values()]
    return {
        "task": task.name, "values": values, "median": float(np.median(values)),
        "mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
    }  # fmt: skip


def export(
    tuning: Finetuning, state: State, tokenizer: Any, directory: Path, scores: dict[str, dict[str, float]] | None = None
) -> None:
    """Writes a directory that `AutoModelForSequenceClassification` loads: the model of the first of the seeds.

    Args:
      tuning: of these seeds.
      state: [S, ...].
      tokenizer: the run's.
      directory: a new or empty one, or an earlier export, which is replaced.
      scores: that model's, for its card.
    """
    client, server = jax.device_get(jax.tree.map(lambda x: x[0], state.model))
    task, config = tuning.data.task, tuning.config
    huggingface.save(
        directory, client, server, config.model, tokenizer, huggingface.classifier_card(config, task, scores or {}),
        labels=task.labels or (huggingface.SCORE,), regression=task.regression, export=config.export,
    )  # fmt: skip


def _train_group(
    tuning: Finetuning, workdir: Workdir, interrupts: Interrupts, console: Console
) -> tuple[State, list[dict[str, dict[str, float]]]] | None:
    """Trains a group of seeds to its last round; returns the state and each seed's scores, None if it was interrupted.

    Checkpoints come after epochs, and when it is interrupted.
    """
    name = _name(tuning.seeds)
    checkpoints = Checkpoints(workdir.checkpoints / name, keep=1)
    log_path = workdir.root / f"metrics-{name}.jsonl"
    done, finished, scores = checkpoints.rounds(), 0, []
    losses: list[Any] = []  # [S] of each round since the last line of the log
    if done:
        state, meta = checkpoints.restore(done[-1], tuning.state_shape, tuning.state_sharding)
        finished, losses = done[-1], meta["losses"]
        truncate(log_path, finished)
    else:
        log_path.unlink(missing_ok=True)
        with about("config key model.init_from"):
            state, missing = tuning.init_state()
        said = tuning.start.classifier if isinstance(tuning.start, Checkpoint) else ""
        fresh = huggingface.describe_missing([name for name in missing if not said or name not in huggingface.CLASSIFIER])
        if fresh:
            console.print(f"the checkpoint lacks, so it starts fresh: {shown(', '.join(fresh))}", style="dim", markup=False)
        if said:
            console.print(shown(said), style="dim", markup=False)
    stamp = {"config": resume.stamp(tuning.config)}
    with MetricsLog(log_path) as log, progress.bar(console) as bars:
        bar = bars.add_task("compiling", total=tuning.rounds, completed=finished)
        under_way: RoundMetrics | None = None
        for n in range(finished, tuning.rounds):
            if interrupts.received:
                if under_way is not None:
                    tuning.check_round(n - 1, under_way)
                tuning.check_state(n, state)
                checkpoints.save(n, state, stamp | {"losses": [np.asarray(x, np.float64).tolist() for x in losses]})
                checkpoints.close()
                return None
            checkpoints.check()
            with progress.Compiling() as compiling:
                state, metrics = tuning.step(state, n)
            compiling.tell(console, "a round")
            if under_way is not None:
                tuning.check_round(n - 1, under_way)  # waits for it: round n is under way meanwhile
            losses.append(metrics.loss)
            under_way = metrics
            bars.update(bar, description=f"{tuning.data.task.name} {name}", completed=n)
            epoch = tuning.epochs(n + 1)
            if int(epoch) > int(tuning.epochs(n)) or n + 1 == tuning.rounds:
                tuning.check_round(n, metrics)
                tuning.check_state(n + 1, state)
                mean = np.mean([np.asarray(x, np.float64) for x in losses], axis=0)
                losses, under_way = [], None
                scores = tuning.scores(state)
                log.append({"round": n + 1, "epoch": epoch, "train_loss": mean, "scores": scores})
                if n + 1 < tuning.rounds:
                    checkpoints.save(n + 1, state, stamp | {"losses": []})
    checkpoints.close()
    return state, scores


def _name(seeds: Sequence[int]) -> str:
    return f"seed-{seeds[0]}" if len(seeds) == 1 else f"seeds-{seeds[0]}-{seeds[-1]}"


def _read_results(root: Path) -> dict[str, Any]:
    path = root / "results.json"
    try:
        results = json.loads(path.read_text()) if path.is_file() else {"seeds": {}}
        if not isinstance(results, dict) or not isinstance(results.get("seeds"), dict):
            raise ValueError("it has no seeds")
        return results
    except ValueError as e:
        raise UserError(f"{path} is damaged ({e}); delete it to fine-tune again what it told of.") from e


def _write_results(root: Path, results: dict[str, Any]) -> None:
    write_atomically(root / "results.json", to_json(results, indent=2) + "\n")


def _show(scores: dict[str, dict[str, float]]) -> str:
    return "; ".join(
        (f"{split}: " if [*scores] != ["dev"] else "") + ", ".join(f"{k} {100 * v:.1f}" for k, v in found.items())
        for split, found in scores.items()
    )

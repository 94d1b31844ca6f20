"""Fine-tuning on GLUE: the same three segments with a classifier for a head, by any strategy that ends in one model."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from fedbert_jax import config as config_lib
from fedbert_jax import disk
from fedbert_jax.config import Config
from fedbert_jax.console.output import make_console, shown
from fedbert_jax.devices import platforms
from fedbert_jax.devices.interrupts import Interrupts
from fedbert_jax.devices.mesh import make_mesh
from fedbert_jax.devices.tuning import seeds_at_once
from fedbert_jax.errors import DivergedError
from fedbert_jax.federated import optim
from fedbert_jax.federated.state import Pair, State
from fedbert_jax.glue import files, tasks
from fedbert_jax.glue.card import classifier_card
from fedbert_jax.glue.examples import read_task
from fedbert_jax.glue.job import group_name, train_group
from fedbert_jax.glue.results import Scores, read_results, show, summarise, write_results
from fedbert_jax.glue.simulation import Finetuning
from fedbert_jax.glue.start import Checkpoint, resolve, tokenizer_of
from fedbert_jax.glue.submissions import submission_name, write_submission
from fedbert_jax.models import huggingface
from fedbert_jax.workdir import resume
from fedbert_jax.workdir.paths import Workdir, check_inputs, check_same, fingerprint, open_workdir

TRIAL = 2**30  # XORed with a seed, gives one that is not among those reported, however many there are


def finetune(config: Config, root: Path, console: Console | None = None) -> int:
    """Fine-tunes on a task in a workdir, going on from what is there; writes metrics, results and the model.

    A finished workdir can be given more seeds, and be asked for predictions.

    Args:
      config: validated, with task='finetune'.
      root: the workdir.
      console: where messages go; the terminal by default.

    Returns:
      The exit code: 0, or 128 + the signal that interrupted it.

    Raises:
      UserError: for an error that the user can mend.
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
    at_once = seeds_at_once(config.finetune.seeds_at_once, len(all_seeds))
    results = read_results(workdir.root)
    judges = ", ".join(f"{len(examples):,} of the split {split}" for split, examples in data.dev.items())
    console.print(
        f"{data.task.name}: {len(data.train):,} training examples, judged by {judges}; "
        f"{config.federated.title}, {len(all_seeds)} seed{'s' * (len(all_seeds) > 1)}"
    )
    if str(config.seed) not in results["seeds"]:
        huggingface.check_target(workdir.hf)  # now, not after hours of training
    tuning = Finetuning(config, data, start, all_seeds[:at_once])
    workdir.write_config(config)  # now that all checks have passed
    workdir.write_facts({"inputs": inputs, "config": resume.stamp(config)})
    with Interrupts() as interrupts:
        while pending := [seed for seed in all_seeds if str(seed) not in results["seeds"]]:
            group = _next_group(pending, at_once, workdir)
            tuning = tuning.for_seeds(group)
            trained = train_group(tuning, workdir, interrupts, console)
            if trained is None:
                console.print("stopped; the same command goes on from there")
                return interrupts.exit_code
            state, scores_of_all = trained
            if config.seed in group:
                with disk.writing(workdir.hf):
                    export(tuning, state, tokenizer, workdir.hf, scores_of_all[group.index(config.seed)])
                for split in tasks.test_splits(data.task):  # predictions of an earlier model, if there are any
                    (workdir.root / "predictions" / submission_name(data.task, split)).unlink(missing_ok=True)
            results = {"seeds": results["seeds"]}  # without the summary over fewer seeds
            for seed, scores in zip(group, scores_of_all, strict=True):
                results["seeds"][str(seed)] = scores
                console.print(f"  seed {seed}: {show(scores)}")
            write_results(workdir.root, results)
            shutil.rmtree(workdir.checkpoints / group_name(group), ignore_errors=True)  # its results are saved
            if interrupts.received:  # in the group's last round, or after it
                console.print("stopped; the same command goes on from there")
                return interrupts.exit_code
        trained_now = "values" not in results
        results |= summarise(data.task, {seed: results["seeds"][seed] for seed in map(str, all_seeds)})
        write_results(workdir.root, results)
        if trained_now and workdir.hf.is_dir():
            card = classifier_card(config, data.task, results["seeds"][str(config.seed)], results)
            disk.write_atomically(workdir.root / "README.md", card)  # not in hf/, which holds an export and nothing else
            os.replace(workdir.root / "README.md", workdir.hf / "README.md")
        _predict(tuning, workdir)
    median, mean, std = (100 * results[k] for k in ("median", "mean", "std"))
    on = "" if data.dev.keys() == set(files.dev_splits(data.task)) else f", on {', '.join(data.dev)}"
    numbers = f"median {median:.1f}, mean {mean:.1f} ± {std:.1f}" if len(all_seeds) > 1 else f"{mean:.1f}, of one seed"
    console.print(f"{numbers} (last epoch{on})")
    console.print(f"model    {shown(workdir.hf)} (of seed {all_seeds[0]})\nresults  {shown(workdir.root / 'results.json')}")
    return interrupts.exit_code if interrupts.received else 0


def _next_group(pending: Sequence[int], at_once: int, workdir: Workdir) -> tuple[int, ...]:
    """Returns the seeds to train next: those of an interrupted group, however many it has, or the next `at_once`."""

    def begun(group: Sequence[int]) -> bool:
        folder = workdir.checkpoints / group_name(group)
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
    """Tries learning rates, the same for both segments, judged by a tenth of the training examples, held out for this.

    Neither the dev set nor a seed that is reported has a part in the choice.

    Args:
      config: the task's config, with the seeds to report.
      rates: to choose from, each tried with one seed; a single rate is not tried.
      root: the directory of the workdirs, one per rate.
      console: where messages go.

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
        scores[rate] = read_results(folder)["median"]
        huggingface.remove(folder / "hf")  # of no use
    if len(rates) > 1 and not scores:
        raise DivergedError(f"none of the learning rates {', '.join(f'{r:g}' for r in rates)} trains; give lower ones.")
    return max(scores, key=lambda rate: scores[rate], default=rates[0]), 0


def with_rate(config: Config, rate: float) -> Config:
    """Returns the config with this learning rate in both segments' optimizers."""
    client, server = (dataclasses.replace(o, learning_rate=rate) for o in (config.client_optimizer, config.server_optimizer))
    return dataclasses.replace(config, client_optimizer=client, server_optimizer=server)


def export(tuning: Finetuning, state: State, tokenizer: Any, directory: Path, scores: Scores | None = None) -> None:
    """Writes the model of the first seed as a directory that `AutoModelForSequenceClassification` loads.

    Args:
      tuning: the fine-tuning of these seeds.
      state: its state, [S, ...].
      tokenizer: the run's.
      directory: a new or empty one, or an earlier export, which is replaced.
      scores: that model's scores, for its card.
    """
    client, server = jax.device_get(jax.tree.map(lambda x: x[0], state.model))
    task, config = tuning.data.task, tuning.config
    huggingface.save(
        directory,
        client,
        server,
        config.model,
        tokenizer,
        classifier_card(config, task, scores or {}),
        labels=task.labels or (huggingface.SCORE,),
        regression=task.regression,
        export=config.export,
    )

"""A GLUE task as fine-tuning sees it: its splits, tokenised."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedbert_jax.config import Config
from fedbert_jax.data.streams import Stream, generator, seeds_of
from fedbert_jax.errors import ConfigError, UserError, about
from fedbert_jax.glue import files, tasks
from fedbert_jax.glue.sequences import Sequences, encode


@dataclass(frozen=True)
class TaskData:
    """A GLUE task, tokenised."""

    task: tasks.Task
    train: Sequences
    dev: dict[str, Sequences]  # the splits to evaluate on: `files.dev_splits`, or "holdout" with `finetune.holdout`
    test: dict[str, Sequences]  # empty unless predictions are asked for
    test_ids: dict[str, list[str]]


def task_of(config: Config) -> tasks.Task:
    """Returns the task that `data.source` names; raises UserError if there is none of that name."""
    with about("config key data.source"):
        return tasks.find_task(config.data.source.removeprefix("glue:").partition("@")[0])


def read_task(config: Config, tokenizer: Any) -> TaskData:
    """Reads and tokenises the task that `data.source` names: `glue:TASK` from the hub or `glue:TASK@DIR`.

    With `finetune.holdout`, that share of the training examples is held out to evaluate on, and the dev files are not read.

    Raises:
      UserError: for a wrong task, file, line or label.
    """
    task, directory = task_of(config), config.data.source.partition("@")[2]
    holdout, folder = config.finetune.holdout, Path(directory).expanduser() if directory else None
    with about("config key data.source"):
        dev = () if holdout else files.dev_splits(task, folder)
        test = tasks.test_splits(task) if config.finetune.predict else ()
        found = files.load(task, folder, ("train", *dev, *test))

    def tokens(split: str) -> Sequences:
        e = found[split]
        return encode(tokenizer, e.first, e.second, e.labels, config.data.seq_len)

    train, judges = tokens("train"), {s: tokens(s) for s in dev}
    if holdout:
        if len(train) < 2:
            raise UserError(f"{task.name} has {len(train)} training example; finetune.holdout needs at least 2.")
        order = generator(seeds_of(config), Stream.TASK_HOLD_OUT).permutation(len(train))
        kept = min(max(round(holdout * len(train)), 1), len(train) - 1)
        train, judges = train.take(order[kept:]), {"holdout": train.take(order[:kept])}
    return TaskData(task, train, judges, {s: tokens(s) for s in test}, {s: found[s].ids for s in test})


def check_pairs(config: Config, data: TaskData) -> None:
    """Raises ConfigError if examples are sentence pairs and the model, whose sizes are known, can't tell the two apart."""
    if data.train.token_types.any() and config.model.type_vocab_size == 1:
        raise ConfigError(
            f"config key model.type_vocab_size=1: accepted: at least 2, since {data.task.name} has sentence pairs."
        )

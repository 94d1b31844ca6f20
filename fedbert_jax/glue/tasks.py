"""The nine GLUE tasks: their labels and metrics, and how their official files are laid out."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fedbert_jax.errors import UserError

MAX_SCORE = 5.0  # STS-B's scores are from 0 to this
# MRPC as Microsoft publishes it. GLUE's dev set is a list of ids from the first file, and comes with neither. The second has
# labels, and the task's own paper evaluates on it (Dolan and Brockett, 2005, https://aclanthology.org/I05-5002).
MSR_TRAIN, MSR_TEST = "msr_paraphrase_train", "msr_paraphrase_test"


@dataclass(frozen=True)
class Task:
    """A GLUE task (Wang et al., 2019, https://arxiv.org/abs/1804.07461) and how its official files are laid out."""

    name: str  # as the official folder is named
    labels: tuple[str, ...]  # the meaning of each output of the head, in the order of the hub's dataset; () for a regression
    columns: tuple[str, ...]  # headers of the sentence, or of the two sentences
    metrics: tuple[str, ...]  # GLUE's number for the task is their mean
    label_column: str = "label"
    text_labels: bool = False  # whether files spell out the labels; if not, they hold 0 and 1
    index_column: str = "index"
    headerless: tuple[str, ...] = ()  # the columns of train and dev if those have no header line
    parts: tuple[str, ...] = ("",)  # the suffixes of `dev` and `test`
    hub_columns: tuple[str, ...] = ()  # where the hub's differ from `columns`

    @property
    def pair(self) -> bool:
        """Whether an example is two sentences."""
        return len(self.columns) == 2

    @property
    def regression(self) -> bool:
        """Whether the target is a number, not a class."""
        return not self.labels

    @property
    def num_outputs(self) -> int:
        """The number of outputs of the task's head."""
        return len(self.labels) or 1

    @property
    def label_values(self) -> tuple[str, ...]:
        """How files and submissions write each of `labels`."""
        return self.labels if self.text_labels else tuple(str(i) for i in range(len(self.labels)))


class Examples(NamedTuple):
    """The N examples of a split, in its order."""

    first: list[str]
    second: list[str] | None  # None for tasks of one sentence
    labels: np.ndarray | None  # int32 [N] ids into `Task.labels`, or float32 [N] scores; None if they are secret
    ids: list[str]  # by which a submission names them


_F1 = ("f1", "accuracy")
_ACCURACY = ("accuracy",)
_SENTENCES = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")
TASKS = {
    task.name: task
    for task in (
        Task(
            "CoLA",
            ("unacceptable", "acceptable"),
            ("sentence",),
            ("matthews",),
            headerless=("source", "label", "mark", "sentence"),
        ),
        Task("SST-2", ("negative", "positive"), ("sentence",), _ACCURACY),
        Task(
            "MRPC",
            ("not_equivalent", "equivalent"),
            ("#1 String", "#2 String"),
            _F1,
            label_column="Quality",
            hub_columns=_SENTENCES,
        ),
        Task("STS-B", (), _SENTENCES, ("pearson", "spearman"), label_column="score"),
        Task(
            "QQP",
            ("not_duplicate", "duplicate"),
            ("question1", "question2"),
            _F1,
            label_column="is_duplicate",
            index_column="id",
        ),
        Task(
            "MNLI",
            ("entailment", "neutral", "contradiction"),
            _SENTENCES,
            _ACCURACY,
            label_column="gold_label",
            text_labels=True,
            parts=("_matched", "_mismatched"),
            hub_columns=("premise", "hypothesis"),
        ),
        Task("QNLI", _ENTAILMENT, ("question", "sentence"), _ACCURACY, text_labels=True),
        Task("RTE", _ENTAILMENT, _SENTENCES, _ACCURACY, text_labels=True),
        Task("WNLI", _ENTAILMENT[::-1], _SENTENCES, _ACCURACY),  # the only one in which 1 means entailment
    )
}


def find_task(name: str) -> Task:
    """Returns the task of that name, in any case and with or without its hyphen.

    Raises:
      UserError: if there is none, naming the nearest.
    """
    by_key = {key(task.name): task for task in TASKS.values()}
    if key(name) not in by_key:
        near = by_key[difflib.get_close_matches(key(name), by_key, n=1, cutoff=0.0)[0]]
        accepted = ", ".join(TASKS)
        raise UserError(f"{name!r} is no GLUE task (the nearest is {near.name}); accepted: {accepted}, in any case.")
    return by_key[key(name)]


def key(name: str) -> str:
    """Returns a task's name without case and hyphens."""
    return name.lower().replace("-", "").replace("_", "")


def test_splits(task: Task) -> tuple[str, ...]:
    """Returns the names of the splits without labels: MNLI has two."""
    return tuple(f"test{part}" for part in task.parts)

"""Predictions for a GLUE task's test files, in gluebenchmark.com's format."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedbert_jax.glue.tasks import MAX_SCORE, Task


def submission_name(task: Task, split: str) -> str:
    """Returns the file name that gluebenchmark.com expects for the split's predictions."""
    suffix = {"_matched": "-m", "_mismatched": "-mm"}.get(split.removeprefix("test"), "")
    return f"{task.name}{suffix}.tsv"


def write_submission(path: Path, task: Task, split: str, ids: Sequence[str], predictions: np.ndarray) -> None:
    """Writes predictions in gluebenchmark.com's format, whole or not at all.

    Args:
      path: the file, or a directory in which the file is named by `submission_name`.
      task: the task predicted.
      split: the split predicted.
      ids: N, from `Examples.ids`.
      predictions: class ids [N], or for a regression scores [N], which are clipped to the range of the labels.
    """
    if task.regression:
        answers = [f"{p:.3f}" for p in np.clip(np.asarray(predictions, np.float64), 0.0, MAX_SCORE)]
    else:
        answers = [task.label_values[int(p)] for p in predictions]
    rows = [f"{i}\t{answer}\n" for i, answer in zip(ids, answers, strict=True)]
    if path.is_dir():
        path = path / submission_name(task, split)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(["index\tprediction\n", *rows])
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)

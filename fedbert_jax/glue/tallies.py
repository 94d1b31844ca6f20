"""GLUE's metrics from numbers that add up, which clients send in place of their answers and labels.

Accuracy, F1, the Matthews correlation and Pearson's are exactly those of all clients' examples together. Spearman's needs
everybody's answers in one order, so it is left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedbert_jax.glue.tasks import Task

SUMMABLE = ("accuracy", "f1", "matthews", "pearson")


def size_of(task: Task) -> int:
    """Returns how many numbers a tally has."""
    return 7 if task.regression else 6 if _by_class(task) else 3


def tally(task: Task, outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns what a client says of a split's examples.

    Args:
      task: the task.
      outputs: the model's, float [n, outputs].
      labels: [n], class ids, or float scores of a regression.

    Returns:
      float32 [k]. Of classes: n, the summed cross-entropy, right answers; where F1 or a correlation asks for it, also how
      often class 1 was guessed, how often it is the label, and how often both. Of a regression: n, the summed squared
      error, and the means of outputs and labels, their variances and their covariance.
    """
    x, count = np.asarray(outputs, np.float64), len(labels)
    if not count:
        return np.zeros(size_of(task), np.float32)
    if task.regression:
        a, b = x[:, 0], np.asarray(labels, np.float64)
        moments = [a.mean(), b.mean(), a.var(), b.var(), np.mean((a - a.mean()) * (b - b.mean()))]
        return np.array([count, np.sum((a - b) ** 2), *moments], np.float32)
    y, top = np.asarray(labels, np.int64), x.max(-1)
    nll = top + np.log(np.exp(x - top[:, None]).sum(-1)) - x[np.arange(count), y]
    guesses = x.argmax(-1)
    found = [count, nll.sum(), np.sum(guesses == y)]
    if _by_class(task):
        found += [np.sum(guesses == 1), np.sum(y == 1), np.sum((guesses == 1) & (y == 1))]
    return np.array(found, np.float32)


def metrics_of(task: Task, tallies: Sequence[np.ndarray]) -> dict[str, float]:
    """Returns the mean loss and the task's metrics (`SUMMABLE`) of all clients' examples together; {} if there are none.

    Args:
      task: the task.
      tallies: the clients', [k] each.
    """
    each = np.array([t for t in np.asarray(tallies, np.float64).reshape(-1, size_of(task)) if t[0] > 0])
    if not len(each):
        return {}
    count = each[:, 0].sum()
    found = {"loss": float(each[:, 1].sum() / count)}
    if task.regression:
        found["pearson"] = _pearson(each)
    else:
        _, _, right, *by_class = each.sum(axis=0)
        found["accuracy"] = float(right / count)
        if by_class:
            guessed, true, both = by_class
            found["f1"] = float(2 * both / (guessed + true)) if guessed + true > 0 else 0.0
            spread = guessed * (count - guessed) * true * (count - true)
            found["matthews"] = float((count * both - guessed * true) / np.sqrt(spread)) if spread > 0 else 0.0
    return {name: value for name, value in found.items() if name == "loss" or name in task.metrics}


def _by_class(task: Task) -> bool:
    return not {"f1", "matthews"}.isdisjoint(task.metrics)


def _pearson(each: np.ndarray) -> float:
    """Returns the correlation over clients' moments [C, 7]; 0 if it is undefined because one side is constant."""
    share = each[:, 0] / each[:, 0].sum()
    a, b, var_a, var_b, cov = each[:, 2:].T
    off_a, off_b = a - share @ a, b - share @ b
    spread = (share @ (var_a + off_a**2)) * (share @ (var_b + off_b**2))
    return float(share @ (cov + off_a * off_b) / np.sqrt(spread)) if spread > 0 else 0.0

"""GLUE's metrics, as the benchmark defines them (Wang et al., 2019, table 1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from scipy import stats
from sklearn import metrics

from fedbert_jax.glue.tasks import Task


def _correlation(function: Callable[..., tuple[float, float]], predictions: np.ndarray, labels: np.ndarray) -> float:
    """Returns the correlation; 0 if it is undefined because one side is constant, as a collapsed model's scores are."""
    x, y = np.asarray(predictions, np.float64), np.asarray(labels, np.float64)
    return 0.0 if np.ptp(x) == 0.0 or np.ptp(y) == 0.0 else function(x, y)[0]


_METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": lambda p, y: metrics.accuracy_score(y, p),
    "f1": lambda p, y: metrics.f1_score(y, p, zero_division=0.0),  # of class 1: equivalent, duplicate
    "matthews": lambda p, y: metrics.matthews_corrcoef(y, p),
    "pearson": lambda p, y: _correlation(stats.pearsonr, p, y),
    "spearman": lambda p, y: _correlation(stats.spearmanr, p, y),
}


def score(task: Task, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Returns the task's metrics by name, each at most 1.

    Args:
      task: its `metrics` says what is computed.
      predictions: class ids [N], or float scores [N] for a regression.
      labels: [N] of the same kind.
    """
    return {name: float(_METRICS[name](predictions, labels)) for name in task.metrics}


def summary(task: Task, scores: Mapping[str, float]) -> float:
    """Returns GLUE's number for the task: the mean of the metrics that `score` returned."""
    return float(np.mean([scores[name] for name in task.metrics]))

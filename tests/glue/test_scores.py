"""GLUE's metrics agree with their definitions, counted by hand."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator

import numpy as np
import pytest

from fedbert_jax.glue.scores import score, summary
from fedbert_jax.glue.tasks import TASKS

# 10 examples: 3 true positives, 1 false positive, 2 false negatives, 4 true negatives.
LABELS = np.array([1, 1, 1, 1, 1, 0, 0, 0, 0, 0], np.int32)
PREDICTIONS = np.array([1, 1, 1, 0, 0, 1, 0, 0, 0, 0], np.int32)
TP, FP, FN, TN = 3, 1, 2, 4


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings(action="error"):
        yield


def test_each_task_has_the_benchmark_s_metrics() -> None:
    found = {name: list(score(task, PREDICTIONS, LABELS)) for name, task in TASKS.items()}
    assert found == {
        "CoLA": ["matthews"],
        "SST-2": ["accuracy"],
        "MRPC": ["f1", "accuracy"],
        "STS-B": ["pearson", "spearman"],
        "QQP": ["f1", "accuracy"],
        "MNLI": ["accuracy"],
        "QNLI": ["accuracy"],
        "RTE": ["accuracy"],
        "WNLI": ["accuracy"],
    }


def test_matthews_is_its_formula() -> None:
    expected = (TP * TN - FP * FN) / math.sqrt((TP + FP) * (TP + FN) * (TN + FP) * (TN + FN))
    assert score(TASKS["CoLA"], PREDICTIONS, LABELS) == {"matthews": pytest.approx(expected, abs=1e-12)}
    assert score(TASKS["CoLA"], LABELS, LABELS)["matthews"] == pytest.approx(1.0)
    assert score(TASKS["CoLA"], 1 - LABELS, LABELS)["matthews"] == pytest.approx(-1.0)


@pytest.mark.parametrize("name", ["MRPC", "QQP"])
def test_f1_is_of_class_1(name: str) -> None:
    found = score(TASKS[name], PREDICTIONS, LABELS)
    assert found == {"f1": pytest.approx(2 * TP / (2 * TP + FP + FN)), "accuracy": pytest.approx(0.7)}
    assert found["f1"] != pytest.approx(2 * TN / (2 * TN + FP + FN))  # which is that of class 0
    assert summary(TASKS[name], found) == pytest.approx((6 / 9 + 0.7) / 2)


def test_accuracy_of_three_classes() -> None:
    found = score(TASKS["MNLI"], np.array([0, 1, 2, 2]), np.array([0, 1, 1, 2]))
    assert found == {"accuracy": 0.75} and summary(TASKS["MNLI"], found) == 0.75


def test_correlations_are_numpy_s() -> None:
    rng = np.random.default_rng(0)
    labels = rng.uniform(0, 5, 50).astype(np.float32)
    predictions = (labels + rng.normal(size=50)).astype(np.float32)
    found = score(TASKS["STS-B"], predictions, labels)
    assert found["pearson"] == pytest.approx(np.corrcoef(predictions, labels)[0, 1], abs=1e-6)
    ranks = [np.argsort(np.argsort(x)) for x in (predictions, labels)]  # no ties among draws
    assert found["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-6)
    assert summary(TASKS["STS-B"], found) == pytest.approx((found["pearson"] + found["spearman"]) / 2)


def test_spearman_sees_order_alone_and_pearson_the_distances() -> None:
    labels = np.array([0, 1, 2, 3, 4], np.float32)
    found = score(TASKS["STS-B"], np.exp(labels), labels)
    assert found["spearman"] == pytest.approx(1.0) and found["pearson"] < 0.95


def test_ties_share_their_rank() -> None:
    """Labels of STS-B are full of ties: 1, 2.5, 2.5, 4 are the ranks of 1, 2, 2, 3."""
    found = score(TASKS["STS-B"], np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 2.0, 2.0, 3.0]))
    assert found["spearman"] == pytest.approx(np.corrcoef([1, 2, 3, 4], [1, 2.5, 2.5, 4])[0, 1])


@pytest.mark.parametrize("constant", [2.5, 0.1])
def test_a_collapsed_model_scores_0_without_a_warning(constant: float) -> None:
    labels = np.linspace(0, 5, 9).astype(np.float32)
    assert score(TASKS["STS-B"], np.full(9, constant, np.float32), labels) == {"pearson": 0.0, "spearman": 0.0}
    assert score(TASKS["CoLA"], np.ones(10, np.int32), LABELS) == {"matthews": 0.0}
    assert score(TASKS["MRPC"], np.zeros(10, np.int32), LABELS) == {"f1": 0.0, "accuracy": 0.5}
    assert score(TASKS["MRPC"], np.zeros(4, np.int32), np.zeros(4, np.int32)) == {"f1": 0.0, "accuracy": 1.0}


def test_scores_are_plain_numbers() -> None:
    """They go to a JSON file."""
    assert all(type(value) is float for task in TASKS.values() for value in score(task, PREDICTIONS, LABELS).values())

"""What clients say of their own examples adds up to the metrics of all examples together."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import log_softmax

from fedbert_jax.glue.scores import score
from fedbert_jax.glue.tallies import metrics_of, size_of, tally
from fedbert_jax.glue.tasks import TASKS


@pytest.mark.parametrize("name", TASKS)
def test_tallies_of_parts_give_the_metrics_of_the_whole(name: str) -> None:
    task, rng = TASKS[name], np.random.default_rng(0)
    outputs = rng.normal(size=(40, task.num_outputs)).astype(np.float32)
    labels = rng.integers(task.num_outputs, size=40)
    if task.regression:
        labels = (outputs[:, 0] + rng.normal(size=40) + 3).astype(np.float32)
    parts = np.split(np.arange(40), [3, 3, 24])  # one has a few examples, one none
    tallies = [tally(task, outputs[part], labels[part]) for part in parts]
    assert {t.shape for t in tallies} == {(size_of(task),)} and {t.dtype for t in tallies} == {np.dtype(np.float32)}
    found = metrics_of(task, tallies)
    if task.regression:
        loss = np.mean((outputs[:, 0] - labels) ** 2)
    else:
        loss = -np.mean(log_softmax(outputs, axis=1)[np.arange(40), labels])
    assert found.pop("loss") == pytest.approx(loss, rel=1e-5)
    expected = score(task, outputs[:, 0] if task.regression else outputs.argmax(1), labels)
    expected.pop("spearman", None)  # which needs all answers in one order
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6) and expected


def test_pearsons_of_answers_that_hardly_differ() -> None:
    """The variance of such answers would drown in the rounding of a sum of squares."""
    rng = np.random.default_rng(1)
    labels = rng.uniform(0, 5, 3000).astype(np.float32)
    outputs = (4.0 + 1e-3 * (labels + rng.normal(size=3000)))[:, None].astype(np.float32)
    found = metrics_of(TASKS["STS-B"], [tally(TASKS["STS-B"], outputs[n::7], labels[n::7]) for n in range(7)])
    assert found["pearson"] == pytest.approx(score(TASKS["STS-B"], outputs[:, 0], labels)["pearson"], rel=1e-4)


@pytest.mark.parametrize("name", ["CoLA", "MRPC", "STS-B"])
def test_what_is_undefined_is_0(name: str) -> None:
    task = TASKS[name]
    outputs, labels = np.zeros((4, task.num_outputs)), np.zeros(4)
    found = metrics_of(task, [tally(task, outputs, labels)])
    assert {found[metric] for metric in task.metrics if metric in found} <= {0.0, 1.0} and np.isfinite(
        [*found.values()]
    ).all()
    assert metrics_of(task, []) == metrics_of(task, [np.zeros(size_of(task))]) == {}

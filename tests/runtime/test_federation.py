"""A federation trains what the simulation trains: the same halves, with messages between them."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from federation import NAMES, Federation
from tiny import assert_trees_close, tiny_config

from fedbert_jax.runtime.agreement import agreed


def simulated(federation: Federation) -> tuple[Any, list[Any]]:
    simulation = federation.simulation
    state, metrics = simulation.init_state(), []
    for n in range(federation.config.federated.rounds):
        state, m = simulation.run_round(state, n)
        metrics.append(jax.device_get(m))
    return state, metrics


CASES = [
    pytest.param(dict(), dict(model=dict(num_layers=2)), 1, marks=pytest.mark.slow),
    pytest.param(dict(), {}, 2, marks=pytest.mark.slow),
    (dict(local_steps=1, client_optimizer_state="keep", weighting="uniform"), {}, 1),
    (dict(average="gradients"), {}, 1),
    (dict(local_steps=1, average="gradients"), dict(wire=dict(gradient_codec="bfloat16")), 1),
    (dict(), dict(precision=dict(compute_dtype="bfloat16")), 1),
    pytest.param(dict(body="merged"), {}, 1, marks=pytest.mark.slow),
    (dict(local_steps=1, body="merged", client_optimizer_state="reset"), {}, 1),
    (dict(local_steps=1, average="gradients"), dict(privacy=dict(averaging="blinded")), 1),
    (
        dict(local_steps=1, client_optimizer_state="reset"),
        dict(privacy=dict(averaging="blinded"), aggregator=dict(name="adam", learning_rate=1e-2, eps=1e-3)),
        2,
    ),
    (dict(strategy="sequential"), {}, 1),
    (dict(local_steps=1), dict(aggregator=dict(name="sgd", learning_rate=0.7, momentum=0.9)), 1),
    pytest.param(
        dict(local_steps=1),
        dict(model=dict(num_layers=2, hidden_dropout=0.1, attention_dropout=0.1, client_layers=1)),
        1,
        marks=pytest.mark.slow,
    ),
    (dict(local_steps=1), dict(wire=dict(codec="bfloat16", downlink="all")), 1),
    (dict(local_steps=1), dict(wire=dict(clip=3.0, noise=0.5, gradient_clip=0.05, gradient_noise=0.01)), 1),
]


@pytest.mark.parametrize("federated, others, parts", CASES)
def test_a_federation_equals_the_simulation(federated, others, parts):
    evaluates = others.keys() <= {"model", "precision"} and "local_steps" not in federated
    config = tiny_config(federated=dict(rounds=2) | federated, **others)
    federation = Federation(config, parts=parts, evaluates=evaluates)
    clients = federation.run()
    state, metrics = simulated(federation)
    work = federation.engine.state
    assert work is not None
    rough = "wire" in others or "precision" in others  # bfloat16 rounds otherwise where clients are stacked otherwise
    loose = dict(rtol=2e-2, atol=2e-3) if rough else dict(rtol=1e-4, atol=2e-6)
    assert_trees_close(jax.device_get(work.body), jax.device_get(state.model.server), **loose)
    if "privacy" not in others:
        assert_trees_close(jax.device_get(work.segment), jax.device_get(state.model.client), **loose)
    for name in NAMES:
        held = clients[name].held
        assert held is not None and held.round == 2
        if "privacy" in others:
            np.testing.assert_array_equal(held.averaging.ranges, state.averaging.ranges.client)
        if federated.get("strategy") != "sequential":
            assert_trees_close(jax.device_get(held.segment), jax.device_get(state.model.client), **loose)
    close = dict(rtol=1e-3 if rough else 1e-5)
    found = lambda name: [numbers[name] for _, numbers in federation.rounds]  # noqa: E731
    np.testing.assert_allclose(found("train_loss"), [float(m.loss) for m in metrics], **close)
    close = dict(rtol=2e-2 if rough else 1e-3)
    np.testing.assert_allclose(found("grad_norm_server"), [float(m[2]) for m in metrics], **close)
    if federated.get("average") == "gradients" and "privacy" in others:  # nobody who writes them down knows the mean
        assert not any("grad_norm_client" in numbers for _, numbers in federation.rounds)
    else:
        np.testing.assert_allclose(found("grad_norm_client"), [float(m[1]) for m in metrics], **close)
    if evaluates:
        sums = federation.rounds[-1][1]["scores"]
        scored = federation.simulation.evaluate(state).clients
        for n, name in enumerate(NAMES):
            np.testing.assert_allclose(sums[name][:2] / sums[name][2], scored[n], rtol=1e-3 if rough else 1e-5, err_msg=name)


def test_parties_that_would_compute_in_other_types_are_told_before_training(monkeypatch):
    kind = lambda **precision: agreed(tiny_config(precision=precision))["precision.compute_dtype"]  # noqa: E731
    assert kind() == kind(compute_dtype="float32") == "float32"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert kind() == kind(compute_dtype="bfloat16") == "bfloat16" and kind(compute_dtype="float32") == "float32"

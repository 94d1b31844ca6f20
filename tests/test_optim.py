"""Optimizers against optax's own with the schedule inside, and schedules at their corners."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import assert_trees_close

from fedbert_jax.config import AggregatorConfig, OptimizerConfig
from fedbert_jax.optim import decays, make_aggregator, make_optimizer, make_schedule

PARAMS = {
    "dense": {"kernel": jnp.linspace(-1.0, 1.0, 12).reshape(3, 4), "bias": jnp.linspace(0.5, 1.0, 4)},
    "norm": {"scale": jnp.ones(4), "bias": jnp.full(4, 0.3)},
}


def grads(n):
    keys = iter(jax.random.split(jax.random.key(n), 4))
    return jax.tree.map(lambda p: 3 * jax.random.normal(next(keys), p.shape), PARAMS)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "lamb", "lion", "adagrad", "nadamw", "yogi"])
def test_equals_optax_with_the_schedule_inside(name):
    extra = dict(weight_decay=0.1) if name in ("adamw", "lamb", "lion", "nadamw") else {}
    extra |= dict(momentum=0.9, nesterov=True) if name == "sgd" else {}
    config = OptimizerConfig(name=name, learning_rate=0.1, warmup_steps=2, decay_steps=6, clip_norm=1.0, **extra)
    ours = make_optimizer(config, "client_optimizer", 99)
    schedule = make_schedule(config, 99)
    masked = dict(mask=decays) if extra and "weight_decay" in extra else {}
    tx = optax.chain(optax.clip_by_global_norm(1.0), getattr(optax, name)(schedule, **extra, **masked))
    params, state = PARAMS, ours.init(PARAMS)
    theirs, their_state = PARAMS, tx.init(PARAMS)
    for n in range(5):
        params, state, norm = ours.update(grads(n), state, params, jnp.int32(n))
        np.testing.assert_allclose(norm, optax.tree.norm(grads(n)), rtol=1e-6)
        updates, their_state = tx.update(grads(n), their_state, theirs)
        theirs = optax.apply_updates(theirs, updates)
    assert_trees_close(params, theirs, rtol=2e-6, atol=1e-6)


def test_weight_decay_spares_biases_and_norms():
    assert decays(PARAMS) == {"dense": {"kernel": True, "bias": False}, "norm": {"scale": False, "bias": False}}
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    config = OptimizerConfig(weight_decay=0.5, warmup_steps=0, schedule="constant", learning_rate=0.1)
    tx = make_optimizer(config, "client_optimizer", 10)
    after, _, _ = tx.update(zero, tx.init(PARAMS), PARAMS, jnp.int32(0))
    np.testing.assert_allclose(after["dense"]["kernel"], 0.95 * PARAMS["dense"]["kernel"], rtol=1e-6)
    assert jnp.array_equal(after["norm"]["scale"], PARAMS["norm"]["scale"])
    assert jnp.array_equal(after["dense"]["bias"], PARAMS["dense"]["bias"])


@pytest.mark.parametrize(
    "kind, power, middle", [("linear", 1.0, 0.55), ("constant", 1.0, 1.0), ("polynomial", 2.0, 0.325), ("cosine", 1.0, 0.55)]
)
def test_schedules_at_their_corners(kind, power, middle):
    end = 1.0 if kind == "constant" else 0.1
    config = OptimizerConfig(schedule=kind, learning_rate=1.0, warmup_steps=4, end_learning_rate=0.1, power=power)
    schedule = make_schedule(config, total_steps=104)
    np.testing.assert_allclose([schedule(n) for n in (0, 1, 3, 4)], [0.25, 0.5, 1.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose([schedule(54), schedule(104), schedule(500)], [middle, end, end], rtol=1e-5)


def test_plain_fedavg_is_recognised():
    assert make_aggregator(AggregatorConfig()) is None
    assert make_aggregator(AggregatorConfig(momentum=0.9)) is not None
    assert make_aggregator(AggregatorConfig(learning_rate=0.5)) is not None

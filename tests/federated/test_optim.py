"""Optimizers against optax's own with the schedule inside, and schedules at their corners."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import assert_trees_close

from fedbert_jax.config import AggregatorConfig, OptimizerConfig
from fedbert_jax.federated.optim import decays, make_aggregator, make_optimizer, make_schedule
from fedbert_jax.models.huggingface import to_tensors

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


def test_lamb_trusts_every_matrix_of_every_layer_by_itself(segments):
    """Against optax's LAMB on the tensors as Hugging Face names them, where no two matrices share an array."""
    keys = jax.random.split(jax.random.key(0))
    start = jax.jit(segments.init)(*keys)
    # Layers and matrices of unlike sizes, so that one ratio for several of them would differ.
    sizes = jnp.array([1.0, 30.0])
    stack = jax.tree.map(lambda x: x * sizes.reshape(2, *(1,) * (x.ndim - 1)) + 0.01, start[1])
    qkv = stack["layers"]["attention"]["qkv"]
    qkv["kernel"] = qkv["kernel"] * jnp.array([1.0, 9.0, 0.2])[None, None, :, None]
    params = (start[0], stack)
    as_tensors = lambda tree: {k: jnp.asarray(v) for k, v in to_tensors(*tree).items()}  # noqa: E731
    config = OptimizerConfig(
        name="lamb", learning_rate=0.1, warmup_steps=0, schedule="constant", clip_norm=None, weight_decay=0.1
    )
    ours = [make_optimizer(config, "client_optimizer", 9) for _ in range(2)]
    states = [tx.init(part) for tx, part in zip(ours, params, strict=True)]
    reference = optax.lamb(0.1, weight_decay=0.1, mask=lambda tree: jax.tree.map(lambda x: x.ndim == 2, tree))
    theirs = as_tensors(params)
    their_state = reference.init(theirs)
    update = [jax.jit(tx.update) for tx in ours]
    for n in range(2):
        rng = np.random.default_rng(n)
        given = jax.tree.map(lambda p, rng=rng: rng.standard_normal(p.shape, np.float32), params)
        moved = [f(g, s, p, jnp.int32(n)) for f, g, s, p in zip(update, given, states, params, strict=True)]
        params, states = tuple(m[0] for m in moved), [m[1] for m in moved]
        updates, their_state = jax.jit(reference.update)(as_tensors(given), their_state, theirs)
        theirs = optax.apply_updates(theirs, updates)
    assert_trees_close(as_tensors(params), theirs, rtol=1e-5, atol=1e-6)


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

"""The loss in chunks against the loss at once: values, every gradient, memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import assert_trees_close, make_strategy, random_blocks, tiny_config

from fedbert_jax.config import WireConfig
from fedbert_jax.federated.split import split_step
from fedbert_jax.federated.state import Cohort
from fedbert_jax.federated.wire import make_cut
from fedbert_jax.models.bert import make_segments
from fedbert_jax.models.losses import chunked_cross_entropy, cross_entropy

ROWS, SIZE, VOCAB = 10, 8, 23


def at_once(x, table, bias, labels, weights):
    """The same loss, written as it is defined."""
    return cross_entropy((x @ table.T + bias[None])[None], labels[None], weights[None])


def random_head():
    rng = np.random.default_rng(0)
    x, table, bias = (rng.normal(size=s).astype(np.float32) for s in ((ROWS, SIZE), (VOCAB, SIZE), (VOCAB,)))
    weights = np.where(np.arange(ROWS) % 4 == 3, 0, 1).astype(np.float32)
    return x, table, bias, rng.integers(0, VOCAB, ROWS).astype(np.int32), weights


@pytest.mark.parametrize("size", [1, 3, 4, 10, 64])
def test_chunks_have_the_loss_and_the_gradients_of_the_whole(size):
    """The whole is computed in float64."""
    head = random_head()
    chunks = jax.jit(jax.value_and_grad(lambda *a: chunked_cross_entropy(*a, size), (0, 1, 2)))(*head)
    with jax.enable_x64(True):
        double = [a.astype(np.float64) if a.dtype == np.float32 else a for a in head]
        whole = jax.device_get(jax.value_and_grad(at_once, (0, 1, 2))(*double))
    assert_trees_close(chunks, whole, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(chunked_cross_entropy(*head, size), chunks[0], rtol=1e-6)  # without gradients


def test_a_loss_that_is_scaled_and_a_batch_without_masked_tokens():
    x, table, bias, labels, weights = random_head()
    grads = lambda fn, w: jax.grad(lambda x: 3.0 * fn(x, table, bias, labels, w))(x)  # noqa: E731
    chunked = lambda *a: chunked_cross_entropy(*a, 4)  # noqa: E731
    np.testing.assert_allclose(grads(chunked, weights), grads(at_once, weights), rtol=1e-5, atol=1e-7)
    assert not np.any(grads(chunked, np.zeros(ROWS, np.float32)))


def test_bfloat16_features_and_float32_sums():
    x, table, bias, labels, weights = random_head()
    x = jnp.asarray(x, jnp.bfloat16)
    loss, (dx, dtable) = jax.value_and_grad(chunked_cross_entropy, (0, 1))(x, table, bias, labels, weights, 4)
    assert (loss.dtype, dx.dtype, dtable.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    expected, (ex, etable) = jax.value_and_grad(at_once, (0, 1))(x.astype(jnp.float32), table, bias, labels, weights)
    np.testing.assert_allclose(loss, expected, rtol=1e-2)
    np.testing.assert_allclose(dx.astype(jnp.float32), ex, rtol=2e-2, atol=4e-3)  # 8 bits
    np.testing.assert_allclose(dtable, etable, rtol=2e-2, atol=4e-3)


def test_memory_is_that_of_a_chunk():
    """According to the compiled program: 512 rows of 4,000 float32 logits are 8 MB."""
    shapes = [
        jax.ShapeDtypeStruct(s, t)
        for s, t in (
            ((512, 16), jnp.float32),
            ((4000, 16), jnp.float32),
            ((4000,), jnp.float32),
            ((512,), jnp.int32),
            ((512,), jnp.float32),
        )
    ]

    def bytes_needed(fn) -> int:
        return jax.jit(jax.value_and_grad(fn, (0, 1, 2))).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    whole, chunk = 512 * 4000 * 4, 32 * 4000 * 4
    assert bytes_needed(at_once) > whole
    assert bytes_needed(lambda *a: chunked_cross_entropy(*a, 32)) < 4 * chunk < whole / 2


@pytest.mark.parametrize("shared", [True, False])
def test_a_split_step_in_chunks(batch, shared):
    """Three clients of 6 masked positions each, 4 of them at a time: 2 chunks."""
    chunked, whole = (make_segments(tiny_config(model=dict(logits_at_once=n)).model) for n in (4, None))
    init = jax.jit(whole.init)
    inits = [init(*jax.random.split(jax.random.key(0 if shared else n))) for n in range(3)]
    clients = inits[0][0] if shared else jax.tree.map(lambda *x: jnp.stack(x), *[c for c, _ in inits])
    weights = jnp.array([0.5, 0.2, 0.3])
    step = jax.jit(split_step, static_argnums=0, static_argnames="shared_client")
    cuts = [make_cut(s, WireConfig()) for s in (chunked, whole)]
    steps = [step(cut, clients, inits[0][1], batch, weights, shared_client=shared) for cut in cuts]
    assert_trees_close(steps[0][:3], steps[1][:3])

    def traced(cut) -> str:
        return str(jax.make_jaxpr(split_step, static_argnums=0)(cut, *copies, batch, weights))

    copies = jax.tree.map(lambda x: jnp.stack([x] * 3), inits[0][0]), inits[0][1]
    every = "f32[3,2,3,61]"  # all logits of a step: clients, sequences, positions, tokens
    assert every in traced(cuts[1]) and every not in traced(cuts[0])


@pytest.mark.parametrize("strategy", ["parallel", "centralized"])
def test_a_round_in_chunks(strategy):
    cohort = Cohort(random_blocks(0, 1, 3, 2), jnp.arange(3), jnp.array([0.5, 0.2, 0.3]), jnp.int32(0))
    results = []
    for size in (None, 4):
        config = tiny_config(federated=dict(strategy=strategy, local_steps=1), model=dict(logits_at_once=size))
        _, chosen, state = make_strategy(config)
        results.append(jax.jit(chosen.round)(state, cohort))
    assert_trees_close(results[1], results[0], rtol=1e-4, atol=1e-5)

"""Losses: cross-entropy of logits, cross-entropy that never holds all logits, squared error."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


def cross_entropy(logits: jax.Array, labels: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns the mean cross-entropy in nats over positions of weight 1.

    Args:
      logits: float32 [B, M, V], V classes (for masked language modelling, tokens).
      labels: int32 [B, M].
      weights: float32 [B, M]; 0 marks a position that only pads the block to M.
    """
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    nll = jax.nn.logsumexp(logits, axis=-1) - chosen
    return jnp.sum(nll * weights) / jnp.maximum(jnp.sum(weights), 1.0)


def squared_error(outputs: jax.Array, labels: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns the mean squared error of outputs [B, M, 1] against float32 labels [B, M] over positions of weight 1."""
    return jnp.sum((outputs[..., 0] - labels) ** 2 * weights) / jnp.maximum(jnp.sum(weights), 1.0)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def chunked_cross_entropy(
    x: jax.Array, table: jax.Array, bias: jax.Array, labels: jax.Array, weights: jax.Array, at_once: int
) -> jax.Array:
    """Returns `cross_entropy` of the logits x table^T + bias, of which no more than `at_once` rows exist at a time.

    Gradients are computed chunk by chunk along with the loss, so that no logits are kept or computed again. They enter the
    products in the compute dtype and are summed in float32. The gradient with respect to `weights` is taken to be 0.

    Args:
      x: [R, D] features, in the compute dtype.
      table: float32 [V, D], the decoder.
      bias: float32 [V].
      labels: int32 [R].
      weights: float32 [R].
      at_once: the most rows in a chunk; R is cut into as few equal chunks as possible.
    """
    return _by_chunks(x, table, bias, labels, weights, at_once, with_grads=False)[0]


def _forward(
    x: jax.Array, table: jax.Array, bias: jax.Array, labels: jax.Array, weights: jax.Array, at_once: int
) -> tuple[jax.Array, Any]:
    return _by_chunks(x, table, bias, labels, weights, at_once, with_grads=True)


def _backward(at_once: int, grads: Any, g: jax.Array) -> tuple[Any, ...]:
    dx, dtable, dbias = grads
    return (g * dx).astype(dx.dtype), g * dtable, g * dbias, None, None


chunked_cross_entropy.defvjp(_forward, _backward)


def _by_chunks(
    x: jax.Array, table: jax.Array, bias: jax.Array, labels: jax.Array, weights: jax.Array, at_once: int, with_grads: bool
) -> tuple[jax.Array, Any]:
    """Returns the loss, and its gradients with respect to x, table and bias, or None."""
    rows, vocab = x.shape[0], table.shape[0]
    count = -(-rows // at_once)
    size = -(-rows // count)
    # Rows that pad the last chunk have weight 0.
    chunks = [jnp.pad(a, [(0, count * size - rows)] + [(0, 0)] * (a.ndim - 1)) for a in (x, labels, weights)]
    # A chunk takes every count-th row, so that each device over which the rows are spread has some of them.
    chunks = [jnp.swapaxes(a.reshape(size, count, *a.shape[1:]), 0, 1) for a in chunks]
    decoder, total = table.astype(x.dtype), jnp.maximum(jnp.sum(weights), 1.0)
    dot = partial(jax.lax.dot_general, preferred_element_type=jnp.float32)

    def chunk(sums: Any, part: Any) -> Any:
        x, labels, weights = part
        loss, dtable, dbias = sums
        logits = dot(x, decoder, (((1,), (1,)), ((), ()))) + bias[None]  # [n, V]
        normalizer = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        chosen = jnp.take_along_axis(logits, labels[:, None], axis=-1)
        share = weights[:, None] / total
        loss = loss + jnp.sum((normalizer - chosen) * share)
        if not with_grads:
            return (loss, dtable, dbias), None
        one_hot = labels[:, None] == jnp.arange(vocab, dtype=labels.dtype)[None]
        dlogits = share * (jnp.exp(logits - normalizer) - one_hot)
        dlogits = dlogits.astype(x.dtype)
        # The bias is the weight of a feature that is always 1, so the same product sums over rows, without a slow pass.
        features = jnp.concatenate([x, jnp.ones((size, 1), x.dtype)], axis=1)
        both = dot(dlogits, features, (((0,), (0,)), ((), ())))  # [V, D + 1]
        dtable, dbias = dtable + both[:, :-1], dbias + both[:, -1]
        return (loss, dtable, dbias), dot(dlogits, decoder, (((1,), (0,)), ((), ()))).astype(x.dtype)

    zeros = (jnp.zeros_like(table), jnp.zeros_like(bias)) if with_grads else (None, None)
    (loss, dtable, dbias), dx = jax.lax.scan(chunk, (jnp.zeros((), jnp.float32), *zeros), chunks)
    if not with_grads:
        return loss, None
    return loss, (jnp.swapaxes(dx, 0, 1).reshape(-1, x.shape[1])[:rows], dtable, dbias)

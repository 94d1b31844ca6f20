"""Averaging over clients, and the outer update on the average (FedAvg, FedAvgM, FedAdam)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedbert_jax.data.masking import MaskedBatch
from fedbert_jax.devices import tuning
from fedbert_jax.federated.wire import Channel, Payload
from fedbert_jax.models.bert import Params


def replicate(tree: Any, clients: int) -> Any:
    """Gives every array a leading client axis [C, ...] of equal copies."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (clients, *x.shape)), tree)


@jax.named_scope("aggregate")
def weighted_average(stacked: Any, weights: jax.Array) -> Any:
    """Averages parameters or optimizer states over clients.

    Args:
      stacked: pytree of arrays [C, ...]. Integers (step counters, equal for all) are taken from the first client.
      weights: float32 [C], summing to 1. A client of weight 0 changes nothing, even if its numbers are not finite.
    """

    def average(x: jax.Array) -> jax.Array:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x[0]
        return weighted_sum(weights, x).astype(x.dtype)

    return jax.tree.map(average, stacked)


def weighted_sum(weights: jax.Array, x: jax.Array) -> jax.Array:
    """Returns the sum over clients of weights [C] times x [C, ...]; a client of weight 0 is left out, finite or not."""
    if tuning.adds_clients_up_in_one_pass(len(weights)):
        parts = [jnp.where(weights[n] > 0, weights[n] * x[n], 0.0) for n in range(x.shape[0])]
        return functools.reduce(jnp.add, parts)
    there = (weights > 0).reshape(-1, *(1,) * (x.ndim - 1))
    return jnp.einsum("c,c...->...", weights, jnp.where(there, x, 0.0), precision="highest")


@jax.named_scope("aggregate")
def add_up(channel: Channel | None, stacked: Params, weights: jax.Array) -> Params:
    """Returns the sum, over clients, of their weighted parts as the server receives them.

    Args:
      channel: what each part is sent through; None: unchanged. Sums over slices of a cohort add up, before `channel.total`.
      stacked: each client's parameters, moves or gradients, float32 [C, ...].
      weights: float32 [C]; a client of weight 0 is left out, finite or not.
    """
    if channel is None:
        return weighted_average(stacked, weights)
    part = lambda x, w: channel.receive(channel.send(weighted(channel.bounded(x), w), None))  # noqa: E731
    received = jax.vmap(part)(stacked, weights)
    return jax.tree.map(lambda x: jnp.sum(x, axis=0, dtype=x.dtype), received)


def add_up_with_feedback(channel: Channel | None, grads: Params, weights: jax.Array, unsent: Any) -> tuple[Params, Any]:
    """Returns `add_up` of gradients through a lossy codec, and what the codec has lost of each client's, [C, ...].

    What was lost is added to what the client sends next (Seide et al. 2014; Karimireddy et al. 2019), so that nothing is
    lost for good. If `unsent` is (), it is.
    """
    if channel is None or not jax.tree.leaves(unsent):
        return add_up(channel, grads, weights), unsent
    send = functools.partial(send_with_feedback, channel)
    payload, lost = jax.vmap(send)(jax.vmap(weighted)(grads, weights), unsent)
    there = lambda x: (weights > 0).reshape(-1, *(1,) * (x.ndim - 1))  # noqa: E731
    total = lambda x: jnp.sum(jnp.where(there(x), x, 0.0), axis=0)  # noqa: E731
    received = jax.tree.map(total, jax.vmap(channel.receive)(payload))
    return received, jax.tree.map(lambda new, old: jnp.where(there(new), new, old), lost, unsent)


def send_with_feedback(channel: Channel, part: Params, unsent: Any) -> tuple[Payload, Any]:
    """Returns what crosses of one client's part and of what it has yet to send, and what is lost; `unsent` may be ()."""
    if not jax.tree.leaves(unsent):
        return channel.send(part, None), unsent
    wanted = jax.tree.map(jnp.add, part, unsent)
    payload = channel.send(wanted, None)
    return payload, jax.tree.map(jnp.subtract, wanted, channel.receive(payload))


def pool(batch: MaskedBatch, weights: jax.Array) -> MaskedBatch:
    """Pools C clients' batches into one client's, [1, C*B, ...], whose loss is the weighted mean of theirs.

    A client of weight 0 becomes padding throughout: nothing it had enters any number.
    """
    counts = jnp.maximum(jnp.sum(batch.weights, axis=(1, 2), keepdims=True), 1.0)
    there = weights[:, None, None] > 0
    shares = jnp.where(there, batch.weights * (weights[:, None, None] / counts), 0.0)
    padded = {
        name: jnp.where(there, x, 0)
        for name, x in batch._asdict().items()
        if x is not None and name not in ("weights", "lengths")
    }
    return jax.tree.map(lambda x: x.reshape(1, -1, *x.shape[2:]), batch._replace(weights=shares, **padded))


def weighted(tree: Params, weight: jax.Array) -> Params:
    """Returns a client's part of a weighted sum; with weight 0 it is 0, even if the client's numbers are not finite."""
    return jax.tree.map(lambda x: jnp.where(weight > 0, weight * x, 0.0), tree)


@jax.named_scope("aggregate")
def outer_update(tx: optax.GradientTransformation | None, params: Params, average: Params, state: Any) -> tuple[Params, Any]:
    """Moves the global parameters towards the clients' average by an optax transform (Reddi et al. 2021, algorithm 2).

    Args:
      tx: from `optim.make_aggregator`; None is FedAvg: the average is the new parameters.
      params: the global parameters the round began with.
      average: of the clients' parameters; with a `tx`, of their moves away from `params`. The average of C equal numbers
        equals that number only up to rounding, and Adam would turn the rounding error into full steps: it would move
        parameters that no client has trained (positions beyond the blocks' length). The average of moves of 0 is 0.
      state: the transform's state.
    """
    if tx is None:
        return average, state
    updates, state = tx.update(jax.tree.map(jnp.negative, average), state, params)
    return optax.apply_updates(params, updates), state

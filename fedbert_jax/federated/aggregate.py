"""Averaging over clients, and the outer update on the average (FedAvg, FedAvgM, FedAdam)."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedbert_jax.models.bert import Params


def replicate(tree: Any, clients: int) -> Any:
    """Gives every array a leading client axis [C, ...] of equal copies."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (clients, *x.shape)), tree)


@jax.named_scope("aggregate")
def weighted_average(stacked: Any, weights: jax.Array) -> Any:
    """Averages parameters or optimizer states over clients.

    Args:
      stacked: pytree of arrays [C, ...]. Integers (step counters, equal for all) are the first client's.
      weights: float32 [C], summing to 1. A client of weight 0 changes nothing, even if its numbers are not finite.
    """

    def average(x: jax.Array) -> jax.Array:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return x[0]
        return weighted_sum(weights, x).astype(x.dtype)

    return jax.tree.map(average, stacked)


def weighted_sum(weights: jax.Array, x: jax.Array) -> jax.Array:
    """Returns the sum over clients of weights [C] times x [C, ...]; a weight of 0 leaves its client out, finite or not."""
    if jax.default_backend() == "cpu" and len(jax.devices()) == 1:
        # One fused pass: three times as fast here as a contraction, which is right where C is spread on devices.
        parts = [jnp.where(weights[n] > 0, weights[n] * x[n], 0.0) for n in range(x.shape[0])]
        return functools.reduce(jnp.add, parts)
    there = (weights > 0).reshape(-1, *(1,) * (x.ndim - 1))
    return jnp.einsum("c,c...->...", weights, jnp.where(there, x, 0.0), precision="highest")


@jax.named_scope("aggregate")
def client_average(
    tx: optax.GradientTransformation | None, stacked: Params, weights: jax.Array, params: Params
) -> Params:
    """Averages clients' parameters [C, ...] for `outer_update`: as they are, or, for an outer optimizer, as moves.

    The average of C equal numbers is that number but for rounding, of which Adam would make full steps: it would move
    what no client has trained (positions beyond the blocks' length). The average of moves of 0 is 0.

    Args:
      tx: from `optim.make_aggregator`.
      stacked: each client's parameters at the end of the round.
      weights: float32 [C]; of a slice of the cohort, its part of the average, which adds up over slices.
      params: the global parameters the round began with.

    Returns:
      The average, or with an outer optimizer the average move.
    """
    if tx is None:
        return weighted_average(stacked, weights)
    return weighted_average(jax.tree.map(lambda x, start: x - start[None], stacked, params), weights)


@jax.named_scope("aggregate")
def outer_update(
    tx: optax.GradientTransformation | None, params: Params, average: Params, state: Any
) -> tuple[Params, Any]:
    """Moves the global parameters towards the clients' average by an optax transform (Reddi et al. 2021, algorithm 2).

    Args:
      tx: from `optim.make_aggregator`; None is FedAvg: the average is the new parameters.
      params: the global parameters the round began with.
      average: `client_average`'s, of the whole cohort.
      state: the transform's.
    """
    if tx is None:
        return average, state
    updates, state = tx.update(jax.tree.map(jnp.negative, average), state, params)
    return optax.apply_updates(params, updates), state

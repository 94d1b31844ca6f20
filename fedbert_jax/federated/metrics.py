"""The metrics of a round: per step, per client, and as a whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedbert_jax.federated.average import weighted_sum

Metric = Any  # an array: a scalar for a round, [K] for its steps, [C, K] for clients' steps


class RoundMetrics(NamedTuple):
    """Means over a round's steps (and over clients, by weight), and which clients failed."""

    loss: Metric
    client_norm: Metric  # of the gradient, before clipping
    server_norm: Metric
    failed: jax.Array  # int32 [C], number of steps in which a client's loss, gradient or (`blame`) message was not finite
    seen: Any = ()  # what a `Recorder` keeps of the steps, [K, C, ...] or, where clients train one by one, [C, K, ...]
    ended: Any = ()  # what it keeps of each client's end, [C, ...]


class Recorder(NamedTuple):
    """What is kept of a round beside its result, for an audit. Both functions return pytrees with a leading client axis."""

    step: Callable[[Any, Any], Any]  # (the clients' `MaskedBatch` [C, ...], their `StepResult`)
    end: Callable[[Any, Any], Any]  # (the client segments with which a round or a turn ends, their optimizers' states)


NOTHING = Recorder(lambda batch, result: (), lambda client, opt: ())


def not_finite(loss: jax.Array, norm: jax.Array) -> jax.Array:
    """Returns 1 where a client's loss or gradient norm is not finite, 0 elsewhere; int32, in their shape."""
    return (~(jnp.isfinite(loss) & jnp.isfinite(norm))).astype(jnp.int32)


def lost(received: jax.Array, clients: int) -> jax.Array:
    """Returns 1 for each client in whose part of what was received a number is not finite: int32 [C].

    Args:
      received: [C, B, ...] or, where clients are treated as one, [1, C * B, ...].
      clients: C.
    """
    return jnp.any(~jnp.isfinite(received.reshape(clients, -1)), axis=1).astype(jnp.int32)


def blame(failed: jax.Array, lost: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns whose failure each step of all clients is, int32 [K, C]: theirs of whom a number isn't finite, or everybody's.

    Args:
      failed: int32 [K], 1 if the step failed, 0 if not.
      lost: int32 [K, C], from the function of that name.
      weights: float32 [C]; absent clients, of weight 0, are not to blame.
    """
    whose = lost * (weights > 0)[None]
    return failed[:, None] * jnp.where(jnp.any(whose > 0, axis=1, keepdims=True), whose, 1)


def of_steps(metrics: RoundMetrics) -> RoundMetrics:
    """Turns the metrics of a cohort's steps [K] into the round's."""
    means = jax.tree.map(jnp.mean, metrics._replace(seen=(), ended=()))
    return means._replace(failed=jnp.sum(metrics.failed, axis=0), seen=metrics.seen, ended=metrics.ended)


def of_turns(metrics: RoundMetrics, weights: jax.Array) -> RoundMetrics:
    """Turns the metrics of clients' steps [C, K] into the round's."""
    means = jax.tree.map(lambda m: jnp.mean(weighted_sum(weights, m)), metrics._replace(seen=(), ended=()))
    return means._replace(failed=jnp.sum(metrics.failed, axis=1), seen=metrics.seen, ended=metrics.ended)

"""The metrics of a round: per step, per client, and as a whole."""

from __future__ import annotations

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
    failed: jax.Array  # int32 [C], number of steps in which a client's loss or its segment's gradient was not finite


def not_finite(loss: jax.Array, norm: jax.Array) -> jax.Array:
    """Returns 1 where a client's loss or gradient norm is not finite, 0 elsewhere; int32, in their shape."""
    return (~(jnp.isfinite(loss) & jnp.isfinite(norm))).astype(jnp.int32)


def of_steps(metrics: RoundMetrics) -> RoundMetrics:
    """Turns the metrics of a cohort's steps [K] into the round's."""
    return jax.tree.map(jnp.mean, metrics)._replace(failed=jnp.sum(metrics.failed, axis=0))


def of_turns(metrics: RoundMetrics, weights: jax.Array) -> RoundMetrics:
    """Turns the metrics of clients' steps [C, K] into the round's."""
    means = jax.tree.map(lambda m: jnp.mean(weighted_sum(weights, m)), metrics)
    return means._replace(failed=jnp.sum(metrics.failed, axis=1))

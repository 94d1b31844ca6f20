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
    failed: jax.Array  # int32 [C], number of steps in which a client's loss or its segment's gradient was not finite
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


def of_steps(metrics: RoundMetrics) -> RoundMetrics:
    """Turns the metrics of a cohort's steps [K] into the round's."""
    means = jax.tree.map(jnp.mean, metrics._replace(seen=(), ended=()))
    return means._replace(failed=jnp.sum(metrics.failed, axis=0), seen=metrics.seen, ended=metrics.ended)


def of_turns(metrics: RoundMetrics, weights: jax.Array) -> RoundMetrics:
    """Turns the metrics of clients' steps [C, K] into the round's."""
    means = jax.tree.map(lambda m: jnp.mean(weighted_sum(weights, m)), metrics._replace(seen=(), ended=()))
    return means._replace(failed=jnp.sum(metrics.failed, axis=1), seen=metrics.seen, ended=metrics.ended)

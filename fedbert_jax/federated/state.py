"""The state that changes from round to round, and a round's data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedbert_jax.federated.metrics import RoundMetrics

Rows = Any  # what a batch is made from: token blocks to be masked in the step, or a ready `MaskedBatch`


class Pair(NamedTuple):
    """A value for the client segment and the same for the server body: parameters, gradients, optimizer states.

    Attributes:
      client: of the segment: `embeddings`, `head` and, with `model.client_layers`, `layers`.
      server: of the body: `layers`, each array [L, ...].
    """

    client: Any
    server: Any


class Averaging(NamedTuple):
    """What averaging carries on from round to round, or from step to step if gradients are averaged; () for what it doesn't.

    Attributes:
      outer: the state of the optimizer that takes averages (`aggregator`).
      unsent: what the codec of gradients has yet to send: of each client's, [N, ...]; in a round, of the cohort's, [C, ...];
        at a client, of its own.
      ranges: with which numbers are sent in fixed point, int32 [L] for L tensors: a `Pair`, or at a client, the segment's.
    """

    outer: Any = ()
    unsent: Any = ()
    ranges: Any = ()


class State(NamedTuple):
    """Everything that changes from round to round. Parts that each client has of its own have a leading axis [N]."""

    model: Pair
    opt: Pair
    averaging: Averaging


class Cohort(NamedTuple):
    """One round's data for C clients. If all text is pooled, it counts as one client's."""

    rows: Rows  # [K, C, B, ...]; K is `federated.local_steps`, or fewer in a run's last round
    clients: jax.Array  # int32 [C]
    weights: jax.Array  # float32 [C], summing to 1; 0 for a client that pads the cohort
    round: jax.Array  # int32, from 0


class Strategy(NamedTuple):
    """The program that `rounds.make_strategy` builds from a setting."""

    init: Callable[[Pair], State]  # from a fresh model
    round: Callable[[State, Cohort], tuple[State, RoundMetrics]]
    model_of: Callable[[State, jax.Array], Pair]  # (state, client id) -> the model that client would use
    steps_per_round: int  # global steps by which the schedules advance in a round


def num_steps(rows: Rows) -> int:
    """Returns K, the number of steps in a round's data [K, ...]."""
    return int(jax.tree.leaves(rows)[0].shape[0])


def clients_first(rows: Rows) -> Rows:
    """Turns a round's data [K, C, ...] into [C, K, ...]."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), rows)


def pick(stacked: Any, index: jax.Array | int) -> Any:
    """Returns client `index`'s part of a pytree of arrays [N, ...]."""
    return jax.tree.map(lambda x: x[index], stacked)

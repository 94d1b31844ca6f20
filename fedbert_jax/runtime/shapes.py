"""What crosses between one client and the server, and what it carries on, as shapes: from the setting, without computing."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedbert_jax.federated.setting import Setting
from fedbert_jax.federated.split import Up
from fedbert_jax.federated.state import Averaging, Rows
from fedbert_jax.runtime.parties import ClientPrograms, ServerPrograms


class Shapes(NamedTuple):
    """What crosses, as shapes of one client's payloads."""

    masked_only: bool  # whether hidden states come back at the positions asked for only: then they have no length T
    up: Up
    hidden: Any
    gradient: Any  # message 3
    segment: Any
    segment_opt: Any
    contribution: Any
    mean: Any
    averaging: Averaging  # what a client carries on of it


def shapes_of(s: Setting, rows: Rows, parts: int) -> Shapes:
    """Returns what crosses, from shapes alone.

    Args:
      s: the setting.
      rows: the shapes of what one client trains on in one step, [B, ...].
      parts: microbatches of a step.
    """
    programs, server = ClientPrograms(s, 0, parts), ServerPrograms(s, 1)
    zero, weight = jnp.int32(0), jnp.float32(1)
    segment = jax.eval_shape(programs.new_segment)
    opt = jax.eval_shape(programs.new_optimizer, segment)
    drawn = jax.eval_shape(programs.draw, rows, zero, zero)
    up, _ = jax.eval_shape(programs.begin, segment, drawn, zero)
    lifted = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), up)
    body = jax.eval_shape(server.new_body)
    body = jax.eval_shape(server.replicate, body) if server.copies else body
    z, _ = jax.eval_shape(server.forward, body, lifted, jnp.ones(1), zero, zero, jnp.zeros(1, jnp.int32))
    z = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), z)
    _, _, dz = jax.eval_shape(programs.head, segment, drawn, zero, z)
    averaging = jax.eval_shape(programs.new_averaging, segment)
    if s.blinded:
        contribution = jax.eval_shape(programs.whole, segment, averaging.ranges, weight)
        return Shapes(s.cut().masked_only, up, z, dz, segment, opt, contribution, (), averaging)
    contribution, _ = jax.eval_shape(programs.contribution, segment, averaging.unsent, weight)
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape), x.dtype), contribution)
    mean = jax.eval_shape(server.gradient, one, jnp.ones(1)) if s.how.averages_gradients else ()
    return Shapes(s.cut().masked_only, up, z, dz, segment, opt, contribution, mean, averaging)

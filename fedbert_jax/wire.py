"""The wire between client and server: what crosses it, how it is encoded, and how many bytes that is."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedbert_jax.config import WireConfig


class Messages(NamedTuple):
    """Everything that crosses in one step of C clients, as encoded. Tokens and labels have no field here.

    The two `up` rows go from each client to the server, the two `down` rows back. `positions_up` names the masked
    positions, so that the server returns hidden states there alone (`wire.downlink=masked`). They are random draws among
    those that hold no special token, so they tell a little of where documents end, and with `mlm.whole_word` of where
    long words are. With `all` it is None, and z and dL/dz have T in place of M, as published.
    """

    activations_up: jax.Array  # h [C, B, T, D]
    positions_up: jax.Array | None  # uint16 [C, B, M]
    hidden_states_down: jax.Array  # z [C, B, M, D]
    head_gradient_up: jax.Array  # dL/dz [C, B, M, D]
    input_gradient_down: jax.Array  # dL/dh [C, B, T, D]
    lengths_up: jax.Array | None = None  # uint16 [C, B], where sequences are padded: what attention must leave out


class Traffic(NamedTuple):
    """Bytes over a stretch of training, by direction."""

    uplink: int
    downlink: int

    def __add__(self, other: Traffic) -> Traffic:  # type: ignore[override]
        return Traffic(self.uplink + other.uplink, self.downlink + other.downlink)

    def __mul__(self, times: int) -> Traffic:  # type: ignore[override]
        return Traffic(self.uplink * times, self.downlink * times)


def encode(x: jax.Array, config: WireConfig) -> jax.Array:
    """Returns x [...] as it crosses the wire."""
    return x.astype(jnp.bfloat16 if config.codec == "bfloat16" else jnp.float32)


def decode(x: jax.Array, like: jax.Array) -> jax.Array:
    """Returns what the other side computes with: x in the type of `like`."""
    return x.astype(like.dtype)


def num_bytes(tree: Any) -> int:
    """Returns the bytes of a pytree of arrays (or of their shapes)."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def message_bytes(messages: Messages) -> dict[str, int]:
    """Returns the bytes of each message that crosses, by name."""
    return {name: num_bytes(m) for name, m in messages._asdict().items() if m is not None}


def traffic(messages: Messages) -> Traffic:
    """Returns the bytes of a step's messages; `messages` may be shapes from `jax.eval_shape`."""
    sizes = message_bytes(messages)
    return Traffic(
        uplink=sum(n for name, n in sizes.items() if name.endswith("_up")),
        downlink=sum(n for name, n in sizes.items() if name.endswith("_down")),
    )

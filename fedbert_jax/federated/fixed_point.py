"""Averages in fixed point: whole numbers modulo 2**32, whose sum one-time pads hide without changing it.

A number is sent in units of 2**-31 of its tensor's range. The first range is wide; from then on it follows from the tensor's
last average, which the clients know and the server doesn't, so that small gradients keep their digits. Ranges are worked
out from whole numbers alone, and so are the same at every client, whatever it computes on.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fedbert_jax.federated.wire import Channel

FIRST = 7  # the range before there is an average: numbers within ±2**7
WIDEST, NARROWEST = 24, -64
HEADROOM = 6  # a range reaches 2**6 times the largest number of the last average, or further
MARGIN = 2.0**-10  # of a range, left for what rounding adds to a sum


def first_ranges(like: Any) -> jax.Array:
    """Returns the ranges with which the tensors of a pytree are first sent, int32 [L]."""
    return jnp.full(len(jax.tree.leaves(like)), FIRST, jnp.int32)


def next_ranges(ranges: jax.Array, total: Any) -> jax.Array:
    """Returns the ranges after an average.

    Args:
      ranges: with which it was sent, int32 [L].
      total: the sum of what the clients sent. A tensor whose sum is 0 throughout, or not finite, keeps its range.
    """
    found = []
    for n, payload in enumerate(jax.tree.leaves(total, is_leaf=_is_payload)):
        largest = jnp.max(jnp.abs(payload["int32"].astype(jnp.int32)).astype(jnp.uint32), initial=0)
        bits = 32 - jax.lax.clz(largest).astype(jnp.int32)  # largest < 2**bits
        known = (largest > 0) & jnp.isfinite(payload["finite"])
        found.append(jnp.where(known, jnp.clip(ranges[n] - 31 + bits + HEADROOM, NARROWEST, WIDEST), ranges[n]))
    return jnp.stack(found)


def fixed_point(ranges: jax.Array) -> Channel:
    """Returns the channel of whole numbers modulo 2**32, in units of 2**-31 of each tensor's range.

    Sums over senders are exact, in any order, and remain so if terms are added that sum to 0 modulo 2**32. Before it is
    weighted, a number beyond its range is clipped to it; weights that sum to at most 1 then keep every sum within the range.
    A number that is not finite has no whole number: each tensor carries a 0 beside its integers, or a NaN if it holds such
    a number, which makes the sum NaN.

    Args:
      ranges: int32 [L], the exponents of the ranges, for the L tensors of what is sent, in their order.
    """

    def each(fn: Any, tree: Any) -> Any:
        leaves, treedef = jax.tree.flatten(tree, is_leaf=_is_payload)
        return jax.tree.unflatten(treedef, [fn(x, ranges[n]) for n, x in enumerate(leaves)])

    def bounded(x: jax.Array, range: jax.Array) -> jax.Array:
        most = jnp.ldexp(jnp.float32(1.0 - MARGIN), range)
        return jnp.where(jnp.isfinite(x), jnp.clip(x, -most, most), x)

    def send(x: jax.Array, range: jax.Array) -> Any:
        whole = jnp.round(jnp.ldexp(x.astype(jnp.float32), 31 - range))
        whole = jnp.clip(whole, -(2.0**31) + 128, 2.0**31 - 128)  # float32's neighbours of ±2**31
        return {"int32": whole.astype(jnp.int32), "finite": jnp.where(jnp.all(jnp.isfinite(x)), 0.0, jnp.nan)}

    def total(payload: Any, range: jax.Array) -> jax.Array:
        return jnp.ldexp(payload["int32"].astype(jnp.float32), range - 31) + payload["finite"]

    return Channel(lambda x, _: each(send, x), lambda payload: payload, lambda x: each(total, x), lambda x: each(bounded, x))


def _is_payload(x: Any) -> bool:
    return isinstance(x, dict) and "int32" in x

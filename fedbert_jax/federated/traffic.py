"""Bytes that a round moves between clients and server, by message of `wire.MESSAGES`, computed from shapes alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from fedbert_jax.federated.fixed_point import first_ranges, fixed_point
from fedbert_jax.federated.setting import Setting
from fedbert_jax.federated.split import split_step
from fedbert_jax.federated.state import Rows
from fedbert_jax.federated.wire import num_bytes


def round_traffic(s: Setting, rows: Rows) -> dict[str, int]:
    """Returns the bytes of a round's messages, for the whole cohort.

    Args:
      s: the setting.
      rows: the shapes of the data that one client trains on in one step, [B, ...].
    """
    how, f = s.how, s.config.federated
    model = jax.eval_shape(s.fresh)
    opt = jax.eval_shape(s.init_opt, model)
    sizes: dict[str, int] = {}
    cut, zero = s.cut(), jnp.int32(0)
    through = lambda channel, tree: jax.eval_shape(lambda x: channel.send(x, None) if channel else x, tree)  # noqa: E731
    blind = lambda like: fixed_point(first_ranges(like))  # noqa: E731
    if how.cut:
        steps = s.cohort * f.local_steps

        def messages(rows: Rows) -> dict[str, object]:
            batch, keys = s.draw(jax.tree.map(lambda x: x[None], rows), zero, zero, zero[None])
            return split_step(cut, *s.fresh(), batch, jnp.ones(1), keys, shared_client=True).messages

        sizes |= {name: num_bytes(shape) * steps for name, shape in jax.eval_shape(messages, rows).items()}
        if how.averages_gradients:
            names, gradient, mean = ("segment_gradient", "mean_gradient"), cut.channels.gradient, cut.channels.mean
            if s.blinded:
                names, gradient, mean = ("padded", "padded_sum"), blind(model.client), blind(model.client)
            crossing = through(gradient, model.client), through(mean, model.client)
            sizes |= {name: num_bytes(shape) * steps for name, shape in zip(names, crossing, strict=True)}

    def travels(name: str, params: object, state: object, back: bool = True) -> None:
        if s.blinded and back:  # every client makes the average of the sum, and needs nothing else if it was there
            size = num_bytes(through(blind(params), params)) * s.cohort
            sizes.update({part: sizes.get(part, 0) + size for part in ("padded", "padded_sum")})
            if s.cohort == s.num_clients:
                return
        parts = [(name, params)] + ([(f"{name}_optimizer", state)] if f.client_optimizer_state == "average" else [])
        for part, tree in parts:
            sizes[part] = num_bytes(tree) * s.cohort
            if back and not s.blinded:
                sizes[f"trained_{part}"] = sizes[part]

    if how.client == "copies" or (how.clients == "in turn" and how.client == "one"):
        travels("segment", model.client, opt.client)
    if how.averages_gradients and s.cohort < s.num_clients:  # absent clients have to be sent what they missed
        travels("segment", model.client, opt.client, back=False)
    if s.blinded and how.cut:
        outer = jax.eval_shape(s.outer.init, model.client) if s.outer else ()
        sizes["snapshot"] = num_bytes((model.client, opt.client if how.averages_gradients else (), outer))
    if how.body == "copies" and not how.cut:  # with a cut, the bodies stay on the server
        travels("body", model.server, opt.server)
    return sizes

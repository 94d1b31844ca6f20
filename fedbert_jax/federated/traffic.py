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
            gradient, mean = cut.channels.gradient, cut.channels.mean
            if s.blinded:
                gradient = mean = blind(model.client)
            up, down = through(gradient, model.client), through(mean, model.client)
            sizes |= {"segment_gradient": num_bytes(up) * steps, "mean_gradient": num_bytes(down) * steps}

    def travels(name: str, params: object, state: object, back: bool = True) -> None:
        averaged = blind(params) if s.blinded else None
        parts = [(name, params, averaged)]
        if f.client_optimizer_state == "average":
            parts.append((f"{name}_optimizer", state, None))
        for part, tree, channel in parts:
            sizes[part] = num_bytes(tree) * s.cohort
            if back:
                sizes[f"trained_{part}"] = num_bytes(through(channel, tree)) * s.cohort

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

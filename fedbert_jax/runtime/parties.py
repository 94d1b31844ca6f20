"""What each party of a federation computes: the halves of a step and what follows them, each a compiled program.

`ClientPrograms` is one client's, `ServerPrograms` the server's for C clients at a time. Both are made of the same setting
as the simulation's round and of the same halves (`federated/split.py`), so nothing has to be kept in step by hand. A
message, or the end of a step, lies between any two programs. They are the same in one process and over a network.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedbert_jax.data.masking import MaskedBatch
from fedbert_jax.data.streams import Stream
from fedbert_jax.federated import holding as hold
from fedbert_jax.federated.average import outer_update, send_with_feedback, weighted_average, weighted_sum
from fedbert_jax.federated.fixed_point import NARROWEST, WIDEST, first_ranges, fixed_point, next_ranges
from fedbert_jax.federated.setting import Setting
from fedbert_jax.federated.split import Up, client_begin, client_finish, client_head, server_backward, server_forward
from fedbert_jax.federated.state import Averaging, Rows, pick
from fedbert_jax.federated.wire import StepKeys

Params = Any


class Drawn(NamedTuple):
    """One client's batch of a step, and its keys [1]."""

    batch: MaskedBatch  # [B, ...]
    keys: StepKeys


class ClientPrograms:
    """One client's programs.

    Args:
      s: the setting; its `num_clients` and its schedules are the federation's.
      index: the client's place in the roster.
      parts: microbatches of a step.
    """

    def __init__(self, s: Setting, index: int, parts: int = 1):
        cut, self.index = s.cut(), index
        share = s.config.federated.batch_size // parts

        def draw(index: jax.Array, rows: Rows, round: jax.Array, step: jax.Array) -> Drawn:
            batch, keys = s.draw(jax.tree.map(lambda x: x[None], rows), round, step, index[None])
            return Drawn(pick(batch, 0), keys._replace(server=None))

        def part_of(drawn: Drawn, part: jax.Array) -> MaskedBatch:
            """Returns some rows of a batch."""
            cut_out = lambda x: jax.lax.dynamic_slice_in_dim(x, part * share, share)  # noqa: E731
            return jax.tree.map(cut_out, drawn.batch)

        def begin(params: Params, drawn: Drawn, part: jax.Array) -> tuple[Up, Any]:
            return client_begin(cut, params, part_of(drawn, part), drawn.keys)

        def head(params: Params, drawn: Drawn, part: jax.Array, z: Any) -> tuple[jax.Array, Params, Any]:
            mine = part_of(drawn, part)
            loss, grads, dz = client_head(cut, params, mine, z, drawn.keys)
            if parts == 1:
                return loss, grads, dz
            scale = jnp.sum(mine.weights) / jnp.maximum(jnp.sum(drawn.batch.weights), 1.0)
            return jax.tree.map(lambda x: (x * scale).astype(x.dtype), (loss, grads, dz))

        def finish(kept: Any, dh: Any, head_grads: Params) -> Params:
            return client_finish(cut, kept, dh, head_grads)

        def update(grads: Params, opt: Any, params: Params, step: jax.Array) -> tuple[Params, Any, jax.Array]:
            return s.client_tx.update(grads, opt, params, step)

        def contribution(grads: Params, unsent: Any, weight: jax.Array) -> tuple[Any, Any]:
            """Returns what crosses of a step's weighted gradient, and what the codec has lost of it."""
            channel, mine = cut.channels.gradient, jax.tree.map(lambda g: weight * g, grads)
            return (mine, unsent) if channel is None else send_with_feedback(channel, mine, unsent)

        def mean_gradient(payload: Any) -> Params:
            return payload if cut.channels.mean is None else cut.channels.mean.receive(payload)

        def upload(params: Params, begun: Params) -> Params:
            """Returns what of a trained segment is averaged: the segment, or its move."""
            return jax.tree.map(jnp.subtract, params, begun) if s.outer else params

        def whole(numbers: Params, ranges: jax.Array, weight: jax.Array) -> Any:
            """Returns a client's weighted part of a sum, in whole numbers."""
            channel = fixed_point(ranges)
            return channel.send(jax.tree.map(lambda x: weight * x, channel.bounded(numbers)), None)

        def mean_of(total: Any, ranges: jax.Array, share: jax.Array) -> tuple[Params, jax.Array]:
            """Returns the mean of clients with this share of all, from their sum in whole numbers, and the next ranges."""
            found = fixed_point(ranges).total(total)
            _, exponent = jnp.frexp(share * 1.001)  # 1 for all the clients together, rounding included
            after = next_ranges(ranges, total) + 1 - exponent  # the mean of some is larger than their sum
            return jax.tree.map(lambda x: x / share, found), jnp.clip(after, NARROWEST, WIDEST)

        def ask(index: Any, params: Params, questions: MaskedBatch, round: Any, batch: Any) -> jax.Array:
            key = s.key(Stream.EVAL_NOISE, round, index, batch)
            return cut.channels.questions.send(s.segments.embed(params, questions), key[None])

        self._ask = jax.jit(ask)
        self._draw, self.begin, self.head = jax.jit(draw), jax.jit(begin), jax.jit(head)
        self.finish, self.update = jax.jit(finish), jax.jit(update)
        self.contribution, self.mean_gradient = jax.jit(contribution), jax.jit(mean_gradient)
        self.upload, self.whole, self.mean_of = jax.jit(upload), jax.jit(whole), jax.jit(mean_of)
        self.moved = jax.jit(lambda begun, mean, outer: outer_update(s.outer, begun, mean, outer))
        self.add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b))
        self.new_segment = jax.jit(lambda: s.segments.init(s.key(Stream.SEGMENT), jax.random.key(0))[0])
        self.new_optimizer = jax.jit(s.client_tx.init)

        def new_averaging(segment: Params) -> Averaging:
            """Returns what a client carries on of the averaging: where the server averages, what a codec has yet to send."""
            if s.blinded:
                return Averaging(outer=s.outer.init(segment) if s.outer else (), ranges=first_ranges(segment))
            coded = s.config.wire.gradient_codec == "int8"
            return Averaging(unsent=jax.tree.map(jnp.zeros_like, segment) if coded else ())

        self.new_averaging = jax.jit(new_averaging)

    def draw(self, rows: Rows, round: Any, step: Any) -> Drawn:
        """Makes this client's batch of a step, and its keys."""
        return self._draw(np.int32(self.index), rows, round, step)

    def ask(self, params: Params, questions: MaskedBatch, round: Any, batch: Any) -> jax.Array:
        """Returns what crosses of a batch of an evaluation, [B, T, D]."""
        return self._ask(np.int32(self.index), params, questions, np.int32(round), np.int32(batch))

    def of(self, index: int) -> ClientPrograms:
        """Returns the same programs, compiled once for both, of the client at another place in the roster."""
        other = copy.copy(self)
        other.index = index
        return other


class ServerPrograms:
    """The server's programs, for C clients at a time; one that isn't there has weight 0 and zeros for a message.

    Args:
      s: the setting.
      slots: C; 1 where clients take turns.
    """

    def __init__(self, s: Setting, slots: int):
        cut, how = s.cut(), s.how
        self.copies = how.body == "copies"
        coded, mean = cut.channels.gradient, cut.channels.mean
        self.resets = hold.holding(how, s.config.federated.client_optimizer_state).opt.server == "none"

        def keys(round: jax.Array, step: jax.Array, clients: jax.Array) -> StepKeys:
            model = s.config.model
            if not (model.hidden_dropout > 0 or model.attention_dropout > 0):
                return StepKeys()
            return StepKeys(server=jax.vmap(lambda c: s.key(Stream.BODY_DROPOUT, round, step, c))(clients))

        one = jnp.ones(1)
        lift = lambda tree: jax.tree.map(lambda x: x[None], tree)  # noqa: E731

        def forward(body: Params, up: Up, weights: jax.Array, round: Any, step: Any, clients: jax.Array) -> Any:
            drawn = keys(round, step, clients)
            if not self.copies:
                return server_forward(cut, body, up, weights, drawn)

            def alone(body: Params, up: Up, key: Any) -> Any:
                z, kept = server_forward(cut, body, lift(up), one, StepKeys(server=None if key is None else key[None]))
                return pick(z, 0), kept

            return jax.vmap(alone)(body, up, drawn.server)

        def backward(kept: Any, dz: Any, weights: jax.Array) -> Any:
            if not self.copies:
                return server_backward(cut, kept, dz, weights)

            def alone(kept: Any, dz: Any) -> Any:
                grads, dh = server_backward(cut, kept, lift(dz), one)
                return grads, pick(dh, 0)

            return jax.vmap(alone)(kept, dz)

        def update(grads: Params, opt: Any, body: Params, step: jax.Array) -> Any:
            if not self.copies:
                return s.server_tx.update(grads, opt, body, step)
            return jax.vmap(s.server_tx.update, (0, 0, 0, None))(grads, opt, body, step)

        def total(parts: Any, weights: jax.Array) -> Any:
            """Returns the sum of the weighted parts [C, ...] of who is there, in their own type."""
            there = lambda x: (weights > 0).reshape(-1, *(1,) * (x.ndim - 1))  # noqa: E731
            return jax.tree.map(lambda x: jnp.sum(jnp.where(there(x), x, 0), axis=0, dtype=x.dtype), parts)

        def gradient(contributions: Any, weights: jax.Array) -> Any:
            """Returns the clients' mean gradient as it crosses back."""
            received = contributions if coded is None else jax.vmap(coded.receive)(contributions)
            average = jax.tree.map(lambda x: x / jnp.sum(weights), total(received, weights))
            return average if mean is None else mean.send(average, None)

        def average(begun: Params, uploads: Any, weights: jax.Array, outer: Any) -> tuple[Params, Any]:
            """Returns the segment after a round, and the outer optimizer's state; `weights` are those of who is there."""
            return outer_update(s.outer, begun, weighted_average(uploads, weights / jnp.sum(weights)), outer)

        self.forward, self.backward, self.update = jax.jit(forward), jax.jit(backward), jax.jit(update)
        self.gradient, self.average, self.total = jax.jit(gradient), jax.jit(average), jax.jit(total)
        self.average_states = jax.jit(lambda stacked, weights: weighted_average(stacked, weights / jnp.sum(weights)))
        self.mean_of = jax.jit(lambda weights, x: weighted_sum(weights / jnp.sum(weights), x))
        self.transform = jax.jit(s.segments.transform)
        self.add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b))
        self.replicate = jax.jit(lambda tree: jax.tree.map(lambda x: jnp.broadcast_to(x, (slots, *x.shape)), tree))
        self.new_body = jax.jit(lambda: s.segments.init(jax.random.key(0), s.key(Stream.BODY))[1])
        self.new_optimizer = jax.jit(s.server_tx.init)


def host(tree: Any) -> Any:
    """Brings a pytree to the host."""
    return jax.tree.map(np.asarray, tree)

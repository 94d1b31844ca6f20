"""The setting that every arrangement's round is built from, and the division of a cohort into slices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from fedbert_jax.config import Arrangement, Config
from fedbert_jax.data import streams
from fedbert_jax.data.masking import MaskedBatch
from fedbert_jax.data.streams import Secrets, Stream, seeds_of
from fedbert_jax.federated.optim import Optimizer, make_aggregator, make_optimizer
from fedbert_jax.federated.state import Pair, Rows, pick
from fedbert_jax.federated.wire import Cut, StepKeys, make_cut
from fedbert_jax.models.bert import Segments


@dataclass(frozen=True)
class Setting:
    """The parts that every arrangement's round is built from."""

    config: Config
    segments: Segments
    prepare: Callable[[jax.Array, Rows], MaskedBatch]  # (key, one client's rows [B, ...]) -> its batch
    client_tx: Optimizer
    server_tx: Optimizer
    outer: optax.GradientTransformation | None  # None: what clients end with is averaged, and not their moves
    num_clients: int  # N
    cohort: int  # C
    secrets: Secrets | None = None  # None: the config's; given where several seeds are trained side by side

    @property
    def how(self) -> Arrangement:
        return self.config.federated.arrangement

    @property
    def blinded(self) -> bool:
        """Whether averages are those of whole numbers, which pads can hide."""
        return self.config.privacy.averaging == "blinded"

    @property
    def guards_gradients(self) -> bool:
        """Whether a client clips its own dL/dz or adds noise; a pooled one, which contains its weight, can't be."""
        return self.config.wire.gradient_clip is not None or self.config.wire.gradient_noise > 0

    @property
    def noised(self) -> bool:
        """Whether the averages of clients' moves are noised."""
        return self.config.privacy.dp != "none"

    def key(self, stream: Stream, *numbers: Any) -> jax.Array:
        """Returns the key of a draw, from its party's secret and the numbers that the stream is a function of."""
        return streams.key(self.secrets or streams.secrets(seeds_of(self.config)), stream, *numbers)

    def cut(self) -> Cut:
        """Returns what clients and server agree on."""
        return make_cut(self.segments, self.config.wire)

    @jax.named_scope("mask")
    def draw(self, rows: Rows, round: jax.Array, step: jax.Array, clients: jax.Array) -> tuple[MaskedBatch, StepKeys]:
        """Makes the batches [C, B, ...] of clients [C] and their keys: functions of (secrets, round, step, client) alone."""
        draws = lambda stream: jax.vmap(lambda c: self.key(stream, round, step, c))(clients)  # noqa: E731
        model, wire = self.config.model, self.config.wire
        keys = StepKeys()
        if model.hidden_dropout > 0 or model.attention_dropout > 0:
            keys = keys._replace(client=draws(Stream.SEGMENT_DROPOUT), server=draws(Stream.BODY_DROPOUT))
        if wire.noise or wire.gradient_noise:
            keys = keys._replace(noise=draws(Stream.NOISE))
        return jax.vmap(self.prepare)(draws(Stream.MASK), rows), keys

    def fresh(self) -> Pair:
        """Returns a new model: its client segment is drawn with the clients' secret, its body with the server's."""
        return Pair(*self.segments.init(self.key(Stream.SEGMENT), self.key(Stream.BODY)))

    def init_opt(self, model: Pair) -> Pair:
        return Pair(self.client_tx.init(model.client), self.server_tx.init(model.server))

    def update(self, model: Pair, opt: Pair, grads: Pair, step: jax.Array) -> tuple[Pair, Pair, Pair]:
        """Steps both segments' optimizers; returns model, optimizer states and gradient norms."""
        client, client_opt, client_norm = self.client_tx.update(grads.client, opt.client, model.client, step)
        server, server_opt, server_norm = self.server_tx.update(grads.server, opt.server, model.server, step)
        return Pair(client, server), Pair(client_opt, server_opt), Pair(client_norm, server_norm)


def make_setting(
    config: Config,
    segments: Segments,
    prepare: Callable[[jax.Array, Rows], MaskedBatch],
    num_clients: int,
    cohort: int,
    span: tuple[int, int],
) -> Setting:
    """Returns the setting of a config: its optimizers and averaging, with the given parts that depend on the text.

    Args:
      config: with `model` resolved.
      segments: of that model.
      prepare: see `Setting`.
      num_clients: N.
      cohort: C.
      span: how many steps the optimizers' schedules last, and at which step they begin (`optim.schedule_span`).
    """
    client_tx = make_optimizer(config.client_optimizer, "client_optimizer", *span)
    server_tx = make_optimizer(config.server_optimizer, "server_optimizer", *span)
    averages_moves = config.privacy.dp != "none" or (
        config.privacy.averaging == "blinded" and config.federated.arrangement.averages  # moves are small: they keep digits
    )
    outer = make_aggregator(config.aggregator, of_moves=averages_moves)
    return Setting(config, segments, prepare, client_tx, server_tx, outer, num_clients, cohort)


def slices(cohort: int, at_once: int | None, devices: int) -> tuple[int, int]:
    """Returns how many slices a cohort is divided into, and their size, which is a multiple of `devices`.

    Their product is the size that the cohort is padded to; for a cohort already padded, it is the cohort's own size.
    """
    up = lambda n: n + -n % devices  # noqa: E731
    count = -(-cohort // up(at_once or cohort))
    return count, up(-(-cohort // count))


def over_slices(s: Setting, fn: Callable[[Any], tuple[Any, Any]], per_client: Any) -> tuple[Any, Any]:
    """Runs `fn` on the whole cohort, or slice by slice, with `clients_at_once` clients or a few more in each.

    Args:
      s: the setting.
      fn: takes a slice of `per_client`; returns (each client's own results [c, ...], results to sum over clients). A scalar
        integer among the latter is a step counter, the same for all clients, and is not summed.
      per_client: pytree of arrays [C, ...].

    Returns:
      The same pair for the whole cohort.
    """
    cohort, mesh = jax.tree.leaves(per_client)[0].shape[0], jax.sharding.get_abstract_mesh()
    count, size = slices(cohort, s.config.federated.clients_at_once, 1 if mesh.empty else mesh.shape["data"])
    if count == 1:
        return fn(per_client)
    # A slice takes every count-th client, so that each device over which the cohort is spread has some of them.
    apart = lambda x: jnp.swapaxes(x.reshape(size, count, *x.shape[1:]), 0, 1)  # noqa: E731
    together = lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])  # noqa: E731
    counter = lambda x: x.ndim == 0 and not jnp.issubdtype(x.dtype, jnp.floating)  # noqa: E731
    join = lambda a, b: b if counter(a) else a + b  # noqa: E731

    def add(total: Any, one_slice: Any) -> tuple[Any, Any]:
        own, part = fn(one_slice)
        return jax.tree.map(join, total, part), own

    xs = jax.tree.map(apart, per_client)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(fn, pick(xs, 0))[1])
    total, own = jax.lax.scan(add, zero, xs)
    return jax.tree.map(together, own), total

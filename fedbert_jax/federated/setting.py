"""What strategies are made of: a run's setting, the state that changes, one client's turn, and the bytes it costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedbert_jax import streams
from fedbert_jax.config import Config
from fedbert_jax.data.masking import MaskedBatch, MaskSpec, mask_blocks
from fedbert_jax.federated.aggregate import client_average, replicate, weighted_average, weighted_sum
from fedbert_jax.federated.split import DropoutKeys, joined_loss, split_step
from fedbert_jax.models.bert import Params, Segments
from fedbert_jax.optim import Optimizer
from fedbert_jax.sharding import constrain, constrain_clients
from fedbert_jax.streams import Secrets, Stream, seeds_of
from fedbert_jax.wire import message_bytes, num_bytes


class Pair(NamedTuple):
    """Something of the client segment and the same of the server body: parameters, gradients, optimizer states."""

    client: Any
    server: Any


class State(NamedTuple):
    """All that changes from round to round. A part that each client has of its own has a leading axis [N]."""

    model: Pair
    opt: Pair
    outer: Any  # the aggregator's


class RoundInputs(NamedTuple):
    """One round's data, C clients. `centralized` gets C * B sequences of the pooled text as one client."""

    tokens: Any  # integers [K, C, B, T], blocks to be masked; or a `MaskedBatch` [K, C, B, ...] that is ready
    # K is `federated.local_steps`; a run's last round may have fewer.
    client_ids: jax.Array  # int32 [C]
    weights: jax.Array  # float32 [C], summing to 1; 0 for a client that pads the cohort
    round: jax.Array  # int32, from 0


class RoundMetrics(NamedTuple):
    """Means over a round's steps (and clients, by weight); and who failed."""

    loss: jax.Array
    client_norm: jax.Array  # of the gradient, before clipping
    server_norm: jax.Array
    failed: jax.Array  # int32 [C], in how many steps a client's loss or its segment's gradient was not finite


class Strategy(NamedTuple):
    """What `Setting -> Strategy` returns."""

    init: Callable[[Pair], State]  # from a fresh model
    round: Callable[[State, RoundInputs], tuple[State, RoundMetrics]]
    model_of: Callable[[State, jax.Array], Pair]  # (state, client id) -> the model that client would use
    steps_per_round: int  # global steps: how far the schedules move in a round
    traffic: dict[str, int]  # bytes a round, by message; names end in _up or _down


@dataclass(frozen=True)
class Setting:
    """What every strategy is made from."""

    config: Config
    segments: Segments
    mask: MaskSpec | None  # None: the batches come ready
    client_tx: Optimizer
    server_tx: Optimizer
    outer: optax.GradientTransformation | None
    num_clients: int  # N
    cohort: int  # C
    secrets: Secrets | None = None  # where they aren't the config's: several seeds are trained side by side

    @jax.named_scope("mask")
    def draw(
        self, blocks: Any, round: jax.Array, step: jax.Array, client: jax.Array
    ) -> tuple[MaskedBatch, DropoutKeys | None]:
        """Masks blocks [B, T] and gives the dropout keys: both functions of (secrets, round, step, client) alone."""
        of = streams.secrets(seeds_of(self.config)) if self.secrets is None else self.secrets
        draws = lambda stream: streams.key(of, stream, round, step, client)  # noqa: E731
        batch = blocks if self.mask is None else mask_blocks(draws(Stream.MASK), blocks, self.mask)
        model = self.config.model
        if not (model.hidden_dropout > 0 or model.attention_dropout > 0):
            return batch, None
        return batch, DropoutKeys(draws(Stream.SEGMENT_DROPOUT), draws(Stream.BODY_DROPOUT))

    def fresh(self) -> Pair:
        """Returns the model's initial values: the client segment's by the clients' secret, the body's by the server's."""
        of = streams.secrets(seeds_of(self.config)) if self.secrets is None else self.secrets
        return Pair(*self.segments.init(streams.key(of, Stream.SEGMENT), streams.key(of, Stream.BODY)))

    def init_opt(self, model: Pair) -> Pair:
        return Pair(self.client_tx.init(model.client), self.server_tx.init(model.server))

    def update(
        self, model: Pair, opt: Pair, grads: Pair, step: jax.Array
    ) -> tuple[Pair, Pair, tuple[jax.Array, jax.Array]]:
        """Steps both segments' optimizers."""
        client, client_opt, client_norm = self.client_tx.update(grads.client, opt.client, model.client, step)
        server, server_opt, server_norm = self.server_tx.update(grads.server, opt.server, model.server, step)
        return Pair(client, server), Pair(client_opt, server_opt), (client_norm, server_norm)


GradFn = Callable[[Pair, MaskedBatch, DropoutKeys | None], tuple[jax.Array, Pair]]


def joined_grads(s: Setting) -> GradFn:
    """Gradients of the uncut model."""

    def grads(model: Pair, batch: MaskedBatch, key: DropoutKeys | None) -> tuple[jax.Array, Pair]:
        loss = lambda m: joined_loss(s.segments, m.client, m.server, batch, key)  # noqa: E731
        return jax.value_and_grad(loss)(model)

    return grads


def split_grads(s: Setting) -> GradFn:
    """Gradients across the cut, one client."""

    def grads(model: Pair, batch: MaskedBatch, key: DropoutKeys | None) -> tuple[jax.Array, Pair]:
        one, keys = jax.tree.map(lambda x: x[None], (batch, key))
        out = split_step(
            s.segments, s.config.wire, model.client, model.server, one, jnp.ones(1), keys, shared_client=True
        )
        return out.loss[0], Pair(jax.tree.map(lambda x: x[0], out.client_grads), out.server_grads)

    return grads


def turn(
    s: Setting, grad_fn: GradFn, model: Pair, opt: Pair, tokens: Any, client: jax.Array, round: jax.Array,
    first_step: jax.Array,
) -> tuple[Pair, Pair, RoundMetrics]:  # fmt: skip
    """Trains one model for K steps on one client's blocks [K, B, T]; metrics are [K]."""

    def step(carry: tuple[Pair, Pair], x: tuple[jax.Array, jax.Array]) -> tuple[tuple[Pair, Pair], RoundMetrics]:
        model, opt = carry
        k, blocks = x
        batch, key = s.draw(blocks, round, k, client)
        loss, grads = grad_fn(model, batch, key)
        model, opt, norms = s.update(model, opt, grads, first_step + k)
        return (model, opt), RoundMetrics(loss, *norms, not_finite(loss, norms[0]))

    (model, opt), metrics = jax.lax.scan(step, (model, opt), (jnp.arange(num_steps(tokens)), tokens))
    return model, opt, metrics


def all_turns(
    s: Setting, grad_fn: GradFn, model: Pair, opt: Pair, inputs: RoundInputs
) -> tuple[Pair, Pair, RoundMetrics]:
    """Every client of the cohort trains a model of its own [C, ...] side by side; metrics are the round's."""
    first = inputs.round * s.config.federated.local_steps
    model, opt, tokens = constrain_clients(model), constrain_clients(opt), clients_first(inputs.tokens)

    def one_turn(model: Pair, opt: Pair, tokens: Any, client: jax.Array) -> tuple[Pair, Pair, RoundMetrics]:
        return turn(s, grad_fn, model, opt, tokens, client, inputs.round, first)

    model, opt, metrics = jax.vmap(one_turn)(model, opt, constrain(tokens, "data"), inputs.client_ids)
    return model, opt, of_turns(metrics, inputs.weights)


def not_finite(loss: jax.Array, norm: jax.Array) -> jax.Array:
    """Returns 1 where a client's loss or gradient norm is not finite, 0 elsewhere; int32 like them."""
    return (~(jnp.isfinite(loss) & jnp.isfinite(norm))).astype(jnp.int32)


def of_turns(metrics: RoundMetrics, weights: jax.Array) -> RoundMetrics:
    """Turns the metrics of clients' steps [C, K] into the round's."""
    means = jax.tree.map(lambda m: jnp.mean(weighted_sum(weights, m)), metrics)
    return means._replace(failed=jnp.sum(metrics.failed, axis=1))


def slices(cohort: int, at_once: int | None, devices: int) -> tuple[int, int]:
    """Returns into how many slices a cohort is divided, and their size, which the devices divide.

    Their product is what the cohort is padded to; of a cohort padded already it is the cohort.
    """
    up = lambda n: n + -n % devices  # noqa: E731
    count = -(-cohort // up(at_once or cohort))
    return count, up(-(-cohort // count))


def over_slices(s: Setting, fn: Callable[[Any], tuple[Any, Any]], per_client: Any) -> tuple[Any, Any]:
    """Runs `fn` on the whole cohort, or on one slice after another, of `clients_at_once` clients or a few more.

    Args:
      s: the setting.
      fn: takes a slice of `per_client`; returns (what each client of it has, [c, ...]; what adds up over clients). Integers
        in the latter are step counters, everybody's: they don't add up.
      per_client: pytree of arrays [C, ...].

    Returns:
      The same pair for the whole cohort.
    """
    cohort, mesh = jax.tree.leaves(per_client)[0].shape[0], jax.sharding.get_abstract_mesh()
    count, size = slices(cohort, s.config.federated.clients_at_once, 1 if mesh.empty else mesh.shape["data"])
    if count == 1:
        return fn(per_client)
    # A slice is every count-th client, so that each of the devices that share the cohort out has some.
    apart = lambda x: jnp.swapaxes(x.reshape(size, count, *x.shape[1:]), 0, 1)  # noqa: E731
    together = lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])  # noqa: E731
    join = lambda a, b: a + b if jnp.issubdtype(a.dtype, jnp.floating) else b  # noqa: E731

    def add(total: Any, one_slice: Any) -> tuple[Any, Any]:
        own, part = fn(one_slice)
        return jax.tree.map(join, total, part), own

    xs = jax.tree.map(apart, per_client)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(fn, pick(xs, 0))[1])
    total, own = jax.lax.scan(add, zero, xs)
    return jax.tree.map(together, own), total


def averaged_turns(
    s: Setting, grad_fn: GradFn, start: tuple[Pair, Pair], inputs: RoundInputs
) -> tuple[tuple[Pair, Pair], RoundMetrics]:
    """The cohort trains copies of `start`; returns `client_average`, that of the optimizers, and the round's metrics.

    Only the copies of a slice of the cohort exist at a time.
    """

    def train(part: Any) -> tuple[Any, Any]:
        tokens, clients, weights = part
        given = RoundInputs(clients_first(tokens), clients, weights, inputs.round)
        model, opt = replicate(start, clients.shape[0])
        model, opt, metrics = all_turns(s, grad_fn, model, opt, given)
        average = client_average(s.outer, model, weights, start[0])
        return metrics.failed, (average, weighted_average(opt, weights), metrics)

    per_client = (clients_first(inputs.tokens), inputs.client_ids, inputs.weights)
    failed, (model, opt, metrics) = over_slices(s, train, per_client)
    return (model, opt), metrics._replace(failed=failed)


def opt_at_rest(mode: str, opt: Any, weights: jax.Array) -> Any:
    """What stays of the clients' optimizer states [C, ...] between rounds."""
    if mode == "reset":
        return ()
    return opt if mode == "keep" else weighted_average(opt, weights)


def num_steps(tokens: Any) -> int:
    """Returns K of a round's data [K, ...]."""
    return int(jax.tree.leaves(tokens)[0].shape[0])


def clients_first(tokens: Any) -> Any:
    """Turns a round's data [K, C, ...] into [C, K, ...]."""
    return jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), tokens)


def pick(stacked: Any, index: jax.Array | int) -> Any:
    """Returns client `index`'s part of a pytree of arrays [N, ...]."""
    return jax.tree.map(lambda x: x[index], stacked)


def step_traffic(s: Setting) -> dict[str, int]:
    """Bytes of the cohort's split steps in a round, from the shapes and types that `split_step` hands to the wire.

    Nothing where batches come ready (fine-tuning): their lengths, and so their bytes, differ from round to round.
    """
    if s.mask is None:
        return {}
    mask = s.mask
    f, length = s.config.federated, s.config.data.seq_len
    blocks = jax.ShapeDtypeStruct((f.batch_size, length), jnp.int32)

    def messages(key: jax.Array, blocks: jax.Array) -> Any:
        client, server = s.fresh()
        batch = jax.tree.map(lambda x: x[None], mask_blocks(key, blocks, mask))
        return split_step(
            s.segments, s.config.wire, client, server, batch, jnp.ones(1), None, shared_client=True
        ).messages

    shapes = jax.eval_shape(messages, jax.eval_shape(lambda: jax.random.key(0)), blocks)
    return {name: n * f.local_steps * s.cohort for name, n in message_bytes(shapes).items()}


def segment_traffic(s: Setting, trips: int, side: str) -> dict[str, int]:
    """Bytes of fetching a segment and handing it back, with its optimizer state where that travels, `trips` times."""

    def shapes() -> tuple[Params, Any]:
        model = s.fresh()
        return getattr(model, side), getattr(s.init_opt(model), side)

    params, opt = jax.eval_shape(shapes)
    sizes = {f"{side}_segment": num_bytes(params) * trips}
    if s.config.federated.client_optimizer_state == "average":
        sizes[f"{side}_optimizer"] = num_bytes(opt) * trips
    return {f"{name}_{way}": n for name, n in sizes.items() for way in ("up", "down")}

"""The strategies: what happens in a round, one function each.

A strategy is a function `Setting -> Strategy`; adding one means writing it and entering it in `STRATEGIES`. All take the
same `RoundInputs` and keep the same `State`, so the loop, the checkpoints and the evaluation don't know which one runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedbert_jax.config import Config
from fedbert_jax.data.masking import MaskedBatch, MaskSpec, mask_blocks
from fedbert_jax.federated.aggregate import outer_update, replicate, weighted_average
from fedbert_jax.federated.split import joined_loss, split_step
from fedbert_jax.models.bert import Params, Segments
from fedbert_jax.optim import Optimizer
from fedbert_jax.sharding import constrain, constrain_clients
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

    tokens: jax.Array  # integers [K, C, B, T]
    client_ids: jax.Array  # int32 [C]
    weights: jax.Array  # float32 [C], summing to 1; 0 for a client that pads the cohort
    round: jax.Array  # int32, from 0


class RoundMetrics(NamedTuple):
    """Means over a round's steps (and clients, by weight)."""

    loss: jax.Array
    client_norm: jax.Array  # of the gradient, before clipping
    server_norm: jax.Array


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
    mask: MaskSpec
    client_tx: Optimizer
    server_tx: Optimizer
    outer: optax.GradientTransformation | None
    num_clients: int  # N
    cohort: int  # C

    def draw(
        self, blocks: jax.Array, round: jax.Array, step: jax.Array, client: jax.Array
    ) -> tuple[MaskedBatch, jax.Array | None]:
        """Masks blocks [B, T] and gives the dropout key: both functions of (seed, round, step, client) alone."""
        key = jax.random.key(self.config.seed)
        for part in (round, step, client):
            key = jax.random.fold_in(key, part)
        mask_key, dropout_key = jax.random.split(key)
        model = self.config.model
        drops = model.hidden_dropout > 0 or model.attention_dropout > 0
        return mask_blocks(mask_key, blocks, self.mask), dropout_key if drops else None

    def init_opt(self, model: Pair) -> Pair:
        return Pair(self.client_tx.init(model.client), self.server_tx.init(model.server))

    def update(
        self, model: Pair, opt: Pair, grads: Pair, step: jax.Array
    ) -> tuple[Pair, Pair, tuple[jax.Array, jax.Array]]:
        """Steps both segments' optimizers."""
        client, client_opt, client_norm = self.client_tx.update(grads.client, opt.client, model.client, step)
        server, server_opt, server_norm = self.server_tx.update(grads.server, opt.server, model.server, step)
        return Pair(client, server), Pair(client_opt, server_opt), (client_norm, server_norm)


GradFn = Callable[[Pair, MaskedBatch, jax.Array | None], tuple[jax.Array, Pair]]


def parallel(s: Setting) -> Strategy:
    """FedBERT's parallel training: the cohort steps side by side against the server, then client segments are averaged.

    With the body `pooled`, each step runs all clients' activations as one batch and updates one body once.
    """
    if s.config.federated.body != "pooled":
        return _parallel_copies(s, private=s.config.federated.body == "private")
    local_steps, mode = s.config.federated.local_steps, s.config.federated.client_optimizer_state

    def init(model: Pair) -> State:
        opt = s.init_opt(model)
        at_rest = {"average": opt.client, "reset": (), "keep": replicate(opt.client, s.num_clients)}[mode]
        return State(model, Pair(at_rest, opt.server), s.outer.init(model.client) if s.outer else ())

    def round(state: State, inputs: RoundInputs) -> tuple[State, RoundMetrics]:
        cohort = inputs.client_ids.shape[0]
        opt0 = s.client_tx.init(state.model.client) if mode == "reset" else state.opt.client

        def step(carry: Any, x: Any, shared: bool) -> Any:
            clients, server, client_opt, server_opt = carry
            k, tokens = x
            tokens = constrain(tokens, "data")
            batch, keys = jax.vmap(s.draw, (0, None, None, 0))(tokens, inputs.round, k, inputs.client_ids)
            out = split_step(
                s.segments, s.config.wire, clients, server, batch, inputs.weights, keys, shared_client=shared
            )
            now = inputs.round * local_steps + k
            axes = (0, None if shared and mode != "keep" else 0, None if shared else 0, None)
            clients, client_opt, norms = jax.vmap(s.client_tx.update, axes)(out.client_grads, client_opt, clients, now)
            server, server_opt, server_norm = s.server_tx.update(out.server_grads, server_opt, server, now)
            metrics = RoundMetrics(out.loss @ inputs.weights, norms @ inputs.weights, server_norm)
            return (clients, server, client_opt, server_opt), metrics

        if local_steps == 1:  # every client still holds the global segment: no copies of it are made
            carry = (state.model.client, state.model.server, opt0, state.opt.server)
            carry, metrics = step(carry, (jnp.int32(0), inputs.tokens[0]), True)
        else:
            clients = constrain_clients(replicate(state.model.client, cohort))
            client_opt = constrain_clients(opt0 if mode == "keep" else replicate(opt0, cohort))
            carry = (clients, state.model.server, client_opt, state.opt.server)
            xs = (jnp.arange(local_steps), inputs.tokens)
            carry, metrics = jax.lax.scan(lambda c, x: step(c, x, False), carry, xs)
        clients, server, client_opt, server_opt = carry

        average = weighted_average(clients, inputs.weights)
        client, outer = outer_update(s.outer, state.model.client, average, state.outer)
        at_rest = _opt_at_rest(mode, client_opt, inputs.weights)
        state = State(Pair(client, server), Pair(at_rest, server_opt), outer)
        return state, jax.tree.map(jnp.mean, metrics)

    traffic = _step_traffic(s) | _segment_traffic(s, s.cohort, "client")
    return Strategy(init, round, lambda state, _: state.model, local_steps, traffic)


def _parallel_copies(s: Setting, private: bool) -> Strategy:
    """Parallel with a body a client: averaged at the end of the round (SplitFed V1), or, if `private`, never."""
    mode = s.config.federated.client_optimizer_state

    def init(model: Pair) -> State:
        opt = s.init_opt(model)
        averaged = model.client if private else model
        outer = s.outer.init(averaged) if s.outer else ()
        at_rest = {"average": opt.client, "reset": (), "keep": replicate(opt.client, s.num_clients)}[mode]
        if private:
            copies = replicate(Pair(model.server, opt.server), s.num_clients)
            return State(Pair(model.client, copies.client), Pair(at_rest, copies.server), outer)
        kept = {"average": opt.server, "reset": (), "keep": replicate(opt.server, s.num_clients)}[mode]
        return State(model, Pair(at_rest, kept), outer)

    def round(state: State, inputs: RoundInputs) -> tuple[State, RoundMetrics]:
        cohort = inputs.client_ids.shape[0]

        def start(at_rest: Any, fresh: Any) -> Any:
            if mode == "keep":
                return at_rest
            return replicate(fresh() if mode == "reset" else at_rest, cohort)

        client_opt = start(state.opt.client, lambda: s.client_tx.init(state.model.client))
        if private:
            server, server_opt = state.model.server, state.opt.server
        else:
            server = replicate(state.model.server, cohort)
            server_opt = start(state.opt.server, lambda: s.server_tx.init(state.model.server))
        model, opt = Pair(replicate(state.model.client, cohort), server), Pair(client_opt, server_opt)
        model, opt, metrics = _all_turns(s, _split_grads(s), model, opt, inputs)

        w = inputs.weights
        client_rest = _opt_at_rest(mode, opt.client, w)
        if private:
            average = weighted_average(model.client, w)
            client, outer = outer_update(s.outer, state.model.client, average, state.outer)
            return State(Pair(client, model.server), Pair(client_rest, opt.server), outer), metrics
        merged, outer = outer_update(s.outer, state.model, weighted_average(model, w), state.outer)
        return State(merged, Pair(client_rest, _opt_at_rest(mode, opt.server, w)), outer), metrics

    def model_of(state: State, client: jax.Array) -> Pair:
        return Pair(state.model.client, _pick(state.model.server, client)) if private else state.model

    traffic = _step_traffic(s) | _segment_traffic(s, s.cohort, "client")
    return Strategy(init, round, model_of, s.config.federated.local_steps, traffic)


def sequential(s: Setting) -> Strategy:
    """FedBERT's sequential training: clients take turns, and hand the client segment on to the next."""
    local_steps, mode = s.config.federated.local_steps, s.config.federated.client_optimizer_state

    def init(model: Pair) -> State:
        opt = s.init_opt(model)
        at_rest = {"average": opt.client, "reset": (), "keep": replicate(opt.client, s.num_clients)}[mode]
        return State(model, Pair(at_rest, opt.server), ())

    def round(state: State, inputs: RoundInputs) -> tuple[State, RoundMetrics]:
        cohort = inputs.client_ids.shape[0]

        def turn(carry: Any, x: Any) -> Any:
            model, client_opt, server_opt = carry
            n, client, tokens = x
            if mode == "reset":
                mine = s.client_tx.init(model.client)
            else:  # handed on with the segment, or the client's own
                mine = _pick(client_opt, client) if mode == "keep" else client_opt
            first = (inputs.round * cohort + n) * local_steps
            model, opt, metrics = _turn(
                s, _split_grads(s), model, Pair(mine, server_opt), tokens, client, inputs.round, first
            )
            if mode == "keep":
                client_opt = jax.tree.map(lambda all_, one: all_.at[client].set(one), client_opt, opt.client)
            elif mode == "average":
                client_opt = opt.client
            return (model, client_opt, opt.server), metrics

        tokens = constrain(jnp.swapaxes(inputs.tokens, 0, 1), None, None, "data")  # [C, K, B, T]
        xs = (jnp.arange(cohort), inputs.client_ids, tokens)
        (model, client_opt, server_opt), metrics = jax.lax.scan(turn, (state.model, *state.opt), xs)
        return State(model, Pair(client_opt, server_opt), ()), jax.tree.map(jnp.mean, metrics)

    traffic = _step_traffic(s) | _segment_traffic(s, s.cohort, "client")
    return Strategy(init, round, lambda state, _: state.model, local_steps * s.cohort, traffic)


def centralized(s: Setting) -> Strategy:
    """All text pooled, no cut, no federation: the upper bound."""

    def round(state: State, inputs: RoundInputs) -> tuple[State, RoundMetrics]:
        local_steps = inputs.tokens.shape[0]
        tokens = constrain(inputs.tokens[:, 0], None, "data")
        model, opt, metrics = _turn(
            s, _joined_grads(s), state.model, state.opt, tokens, inputs.client_ids[0], inputs.round,
            inputs.round * local_steps,
        )  # fmt: skip
        return State(model, opt, ()), jax.tree.map(jnp.mean, metrics)

    def init(model: Pair) -> State:
        return State(model, s.init_opt(model), ())

    return Strategy(init, round, lambda state, _: state.model, s.config.federated.local_steps, {})


def local(s: Setting) -> Strategy:
    """A whole model for each client, trained on its own text alone, never mixed: the lower bound."""

    def init(model: Pair) -> State:
        model, opt = replicate((model, s.init_opt(model)), s.num_clients)
        return State(model, opt, ())

    def round(state: State, inputs: RoundInputs) -> tuple[State, RoundMetrics]:
        model, opt, metrics = _all_turns(s, _joined_grads(s), state.model, state.opt, inputs)
        return State(model, opt, ()), metrics

    return Strategy(init, round, lambda state, c: _pick(state.model, c), s.config.federated.local_steps, {})


def fedavg(s: Setting) -> Strategy:
    """The whole model on each client, averaged every round (McMahan et al. 2017): federation without a cut."""
    mode = s.config.federated.client_optimizer_state

    def init(model: Pair) -> State:
        opt = s.init_opt(model) if mode == "average" else Pair((), ())
        return State(model, opt, s.outer.init(model) if s.outer else ())

    def round(state: State, inputs: RoundInputs) -> tuple[State, RoundMetrics]:
        cohort = inputs.client_ids.shape[0]
        opt = state.opt if mode == "average" else s.init_opt(state.model)
        model, opt = replicate((state.model, opt), cohort)
        model, opt, metrics = _all_turns(s, _joined_grads(s), model, opt, inputs)
        merged, outer = outer_update(s.outer, state.model, weighted_average(model, inputs.weights), state.outer)
        at_rest = Pair(*(_opt_at_rest(mode, o, inputs.weights) for o in opt))
        return State(merged, at_rest, outer), metrics

    traffic = _segment_traffic(s, s.cohort, "client") | _segment_traffic(s, s.cohort, "server")
    return Strategy(init, round, lambda state, _: state.model, s.config.federated.local_steps, traffic)


STRATEGIES: dict[str, Callable[[Setting], Strategy]] = {
    "parallel": parallel,
    "sequential": sequential,
    "centralized": centralized,
    "local": local,
    "fedavg": fedavg,
}


# --- what strategies are made of -------------------------------------------------------------------------------------


def _joined_grads(s: Setting) -> GradFn:
    """Gradients of the uncut model."""

    def grads(model: Pair, batch: MaskedBatch, key: jax.Array | None) -> tuple[jax.Array, Pair]:
        loss = lambda m: joined_loss(s.segments, m.client, m.server, batch, key)  # noqa: E731
        return jax.value_and_grad(loss)(model)

    return grads


def _split_grads(s: Setting) -> GradFn:
    """Gradients across the cut, one client."""

    def grads(model: Pair, batch: MaskedBatch, key: jax.Array | None) -> tuple[jax.Array, Pair]:
        one = jax.tree.map(lambda x: x[None], batch)
        keys = None if key is None else key[None]
        out = split_step(
            s.segments, s.config.wire, model.client, model.server, one, jnp.ones(1), keys, shared_client=True
        )
        return out.loss[0], Pair(jax.tree.map(lambda x: x[0], out.client_grads), out.server_grads)

    return grads


def _turn(
    s: Setting, grad_fn: GradFn, model: Pair, opt: Pair, tokens: jax.Array, client: jax.Array, round: jax.Array,
    first_step: jax.Array,
) -> tuple[Pair, Pair, RoundMetrics]:  # fmt: skip
    """Trains one model for K steps on one client's blocks [K, B, T]; metrics are [K]."""

    def step(carry: tuple[Pair, Pair], x: tuple[jax.Array, jax.Array]) -> tuple[tuple[Pair, Pair], RoundMetrics]:
        model, opt = carry
        k, blocks = x
        batch, key = s.draw(blocks, round, k, client)
        loss, grads = grad_fn(model, batch, key)
        model, opt, norms = s.update(model, opt, grads, first_step + k)
        return (model, opt), RoundMetrics(loss, *norms)

    (model, opt), metrics = jax.lax.scan(step, (model, opt), (jnp.arange(tokens.shape[0]), tokens))
    return model, opt, metrics


def _all_turns(
    s: Setting, grad_fn: GradFn, model: Pair, opt: Pair, inputs: RoundInputs
) -> tuple[Pair, Pair, RoundMetrics]:
    """Every client of the cohort trains a model of its own [C, ...] side by side; metrics are the round's."""
    first = inputs.round * inputs.tokens.shape[0]
    model, opt, tokens = constrain_clients(model), constrain_clients(opt), jnp.swapaxes(inputs.tokens, 0, 1)

    def turn(model: Pair, opt: Pair, tokens: jax.Array, client: jax.Array) -> tuple[Pair, Pair, RoundMetrics]:
        return _turn(s, grad_fn, model, opt, tokens, client, inputs.round, first)

    model, opt, metrics = jax.vmap(turn)(model, opt, constrain(tokens, "data"), inputs.client_ids)
    return model, opt, jax.tree.map(lambda m: jnp.mean(inputs.weights @ m), metrics)


def _opt_at_rest(mode: str, opt: Any, weights: jax.Array) -> Any:
    """What stays of the clients' optimizer states [C, ...] between rounds."""
    if mode == "reset":
        return ()
    return opt if mode == "keep" else weighted_average(opt, weights)


def _pick(stacked: Any, index: jax.Array) -> Any:
    """Returns client `index`'s part of a pytree of arrays [N, ...]."""
    return jax.tree.map(lambda x: x[index], stacked)


def _step_traffic(s: Setting) -> dict[str, int]:
    """Bytes of the cohort's split steps in a round, from the shapes and types that `split_step` hands to the wire."""
    f, length = s.config.federated, s.config.data.seq_len
    blocks = jax.ShapeDtypeStruct((f.batch_size, length), jnp.int32)

    def messages(key: jax.Array, blocks: jax.Array) -> Any:
        client, server = s.segments.init(key)
        batch = jax.tree.map(lambda x: x[None], mask_blocks(key, blocks, s.mask))
        return split_step(
            s.segments, s.config.wire, client, server, batch, jnp.ones(1), None, shared_client=True
        ).messages

    shapes = jax.eval_shape(messages, jax.eval_shape(lambda: jax.random.key(0)), blocks)
    return {name: n * f.local_steps * s.cohort for name, n in message_bytes(shapes).items()}


def _segment_traffic(s: Setting, trips: int, side: str) -> dict[str, int]:
    """Bytes of fetching a segment and handing it back, with its optimizer state where that travels, `trips` times."""

    def shapes(key: jax.Array) -> tuple[Params, Any]:
        model = Pair(*s.segments.init(key))
        return getattr(model, side), getattr(s.init_opt(model), side)

    params, opt = jax.eval_shape(shapes, jax.eval_shape(lambda: jax.random.key(0)))
    sizes = {f"{side}_segment": num_bytes(params) * trips}
    if s.config.federated.client_optimizer_state == "average":
        sizes[f"{side}_optimizer"] = num_bytes(opt) * trips
    return {f"{name}_{way}": n for name, n in sizes.items() for way in ("up", "down")}

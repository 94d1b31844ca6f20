"""The strategies: what happens in a round, one function each.

A strategy is a function `Setting -> Strategy`. Adding one means writing it, entering it in `STRATEGIES`, naming it in
`config.StrategyName`, and saying in `config.ARRANGEMENTS` how its clients train. All take the same `RoundInputs` and keep
the same `State`: the loop, the checkpoints and the evaluation don't know which one runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedbert_jax.federated.aggregate import client_average, outer_update, replicate, weighted_sum
from fedbert_jax.federated.setting import (
    GradFn,
    Pair,
    RoundInputs,
    RoundMetrics,
    Setting,
    State,
    Strategy,
    all_turns,
    averaged_turns,
    clients_first,
    joined_grads,
    not_finite,
    num_steps,
    of_turns,
    opt_at_rest,
    over_slices,
    pick,
    segment_traffic,
    split_grads,
    step_traffic,
    turn,
)
from fedbert_jax.federated.split import split_step
from fedbert_jax.sharding import constrain, constrain_clients


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
        opt0 = s.client_tx.init(state.model.client) if mode == "reset" else state.opt.client

        def step(carry: Any, x: Any, shared: bool) -> Any:
            clients, server, client_opt, server_opt = carry
            k, tokens = x
            now = inputs.round * local_steps + k

            def client_side(part: Any) -> Any:
                """Some clients' step, up to what the server adds up."""
                tokens, ids, weights, *own = part
                params, opt = own or (clients, client_opt)
                tokens = constrain(tokens, "data")
                batch, keys = jax.vmap(s.draw, (0, None, None, 0))(tokens, inputs.round, k, ids)
                out = split_step(s.segments, s.config.wire, params, server, batch, weights, keys, shared_client=shared)
                axes = (0, None if shared and mode != "keep" else 0, None if shared else 0, None)
                params, opt, norms = jax.vmap(s.client_tx.update, axes)(out.client_grads, opt, params, now)
                sums = (out.server_grads, weighted_sum(weights, out.loss), weighted_sum(weights, norms))
                return (constrain_clients(params), constrain_clients(opt), not_finite(out.loss, norms)), sums

            per_client = (tokens, inputs.client_ids, inputs.weights) + (() if shared else (clients, client_opt))
            (clients, client_opt, failed), (grads, loss, norm) = over_slices(s, client_side, per_client)
            server, server_opt, server_norm = s.server_tx.update(grads, server_opt, server, now)
            return (clients, server, client_opt, server_opt), RoundMetrics(loss, norm, server_norm, failed)

        # In the first step all clients hold the global segment, so no copies are made of it: they come to be by updating.
        carry = (state.model.client, state.model.server, opt0, state.opt.server)
        carry, first = step(carry, (jnp.int32(0), pick(inputs.tokens, 0)), True)
        xs = (jnp.arange(1, num_steps(inputs.tokens)), jax.tree.map(lambda x: x[1:], inputs.tokens))
        carry, rest = jax.lax.scan(lambda c, x: step(c, x, False), carry, xs)
        metrics = jax.tree.map(lambda a, b: jnp.concatenate([b, a[None]]), first, rest)  # [K], of `failed` [K, C]
        clients, server, client_opt, server_opt = carry

        average = client_average(s.outer, clients, inputs.weights, state.model.client)
        client, outer = outer_update(s.outer, state.model.client, average, state.outer)
        at_rest = opt_at_rest(mode, client_opt, inputs.weights)
        state = State(Pair(client, server), Pair(at_rest, server_opt), outer)
        return state, jax.tree.map(jnp.mean, metrics)._replace(failed=jnp.sum(metrics.failed, axis=0))

    traffic = step_traffic(s) | segment_traffic(s, s.cohort, "client")
    return Strategy(init, round, lambda state, _: state.model, local_steps, traffic)


def _parallel_copies(s: Setting, private: bool) -> Strategy:
    """Parallel with a body a client: averaged at the end of the round (SplitFed V1), or, if `private`, never."""
    mode = s.config.federated.client_optimizer_state
    traffic = step_traffic(s) | segment_traffic(s, s.cohort, "client")
    if not private and mode != "keep":
        return _averaging(s, split_grads(s), traffic)

    def init(model: Pair) -> State:
        opt = s.init_opt(model)
        outer = s.outer.init(model.client if private else model) if s.outer else ()
        at_rest = {"average": opt.client, "reset": (), "keep": replicate(opt.client, s.num_clients)}[mode]
        servers = replicate(Pair(model.server, opt.server), s.num_clients)  # the server's parameters, and its optimizer
        return State(Pair(model.client, servers.client if private else model.server), Pair(at_rest, servers.server), outer)

    def round(state: State, inputs: RoundInputs) -> tuple[State, RoundMetrics]:
        cohort, w = inputs.client_ids.shape[0], inputs.weights
        if mode == "keep":
            client_opt = state.opt.client
        else:
            fresh = s.client_tx.init(state.model.client)
            client_opt = replicate(fresh if mode == "reset" else state.opt.client, cohort)
        server = state.model.server if private else replicate(state.model.server, cohort)
        model, opt = Pair(replicate(state.model.client, cohort), server), Pair(client_opt, state.opt.server)
        model, opt, metrics = all_turns(s, split_grads(s), model, opt, inputs)

        opt = Pair(opt_at_rest(mode, opt.client, w), opt.server)
        if private:
            average = client_average(s.outer, model.client, w, state.model.client)
            client, outer = outer_update(s.outer, state.model.client, average, state.outer)
            return State(Pair(client, model.server), opt, outer), metrics
        average = client_average(s.outer, model, w, state.model)
        merged, outer = outer_update(s.outer, state.model, average, state.outer)
        return State(merged, opt, outer), metrics

    def model_of(state: State, client: jax.Array) -> Pair:
        return Pair(state.model.client, pick(state.model.server, client)) if private else state.model

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

        def one_turn(carry: Any, x: Any) -> Any:
            model, client_opt, server_opt = carry
            n, client, tokens = x
            if mode == "reset":
                mine = s.client_tx.init(model.client)
            else:  # handed on with the segment, or the client's own
                mine = pick(client_opt, client) if mode == "keep" else client_opt
            first = inputs.round * cohort * local_steps + n * num_steps(inputs.tokens)
            model, opt, metrics = turn(
                s, split_grads(s), model, Pair(mine, server_opt), tokens, client, inputs.round, first
            )
            if mode == "keep":
                client_opt = jax.tree.map(lambda all_, one: all_.at[client].set(one), client_opt, opt.client)
            elif mode == "average":
                client_opt = opt.client
            return (model, client_opt, opt.server), metrics

        tokens = constrain(clients_first(inputs.tokens), None, None, "data")  # [C, K, B, T]
        xs = (jnp.arange(cohort), inputs.client_ids, tokens)
        (model, client_opt, server_opt), metrics = jax.lax.scan(one_turn, (state.model, *state.opt), xs)
        return State(model, Pair(client_opt, server_opt), ()), of_turns(metrics, inputs.weights)

    traffic = step_traffic(s) | segment_traffic(s, s.cohort, "client")
    return Strategy(init, round, lambda state, _: state.model, local_steps * s.cohort, traffic)


def centralized(s: Setting) -> Strategy:
    """All text pooled, no cut, no federation: the upper bound."""

    def round(state: State, inputs: RoundInputs) -> tuple[State, RoundMetrics]:
        tokens = constrain(jax.tree.map(lambda x: x[:, 0], inputs.tokens), None, "data")
        model, opt, metrics = turn(
            s, joined_grads(s), state.model, state.opt, tokens, inputs.client_ids[0], inputs.round,
            inputs.round * s.config.federated.local_steps,
        )  # fmt: skip
        failed = jnp.sum(metrics.failed, keepdims=True)  # C is 1
        return State(model, opt, ()), jax.tree.map(jnp.mean, metrics)._replace(failed=failed)

    def init(model: Pair) -> State:
        return State(model, s.init_opt(model), ())

    return Strategy(init, round, lambda state, _: state.model, s.config.federated.local_steps, {})


def local(s: Setting) -> Strategy:
    """A whole model for each client, trained on its own text alone, never mixed: the lower bound."""

    def init(model: Pair) -> State:
        model, opt = replicate((model, s.init_opt(model)), s.num_clients)
        return State(model, opt, ())

    def round(state: State, inputs: RoundInputs) -> tuple[State, RoundMetrics]:
        model, opt, metrics = all_turns(s, joined_grads(s), state.model, state.opt, inputs)
        return State(model, opt, ()), metrics

    return Strategy(init, round, lambda state, c: pick(state.model, c), s.config.federated.local_steps, {})


def fedavg(s: Setting) -> Strategy:
    """The whole model on each client, averaged every round (McMahan et al. 2017): federation without a cut."""
    traffic = segment_traffic(s, s.cohort, "client") | segment_traffic(s, s.cohort, "server")
    return _averaging(s, joined_grads(s), traffic)


def _averaging(s: Setting, grad_fn: GradFn, traffic: dict[str, int]) -> Strategy:
    """Each client trains a copy of everything, and everything is averaged at the end of the round."""
    mode = s.config.federated.client_optimizer_state

    def init(model: Pair) -> State:
        opt = s.init_opt(model) if mode == "average" else Pair((), ())
        return State(model, opt, s.outer.init(model) if s.outer else ())

    def round(state: State, inputs: RoundInputs) -> tuple[State, RoundMetrics]:
        opt = state.opt if mode == "average" else s.init_opt(state.model)
        (average, opt), metrics = averaged_turns(s, grad_fn, (state.model, opt), inputs)
        model, outer = outer_update(s.outer, state.model, average, state.outer)
        return State(model, opt if mode == "average" else Pair((), ()), outer), metrics

    return Strategy(init, round, lambda state, _: state.model, s.config.federated.local_steps, traffic)


STRATEGIES: dict[str, Callable[[Setting], Strategy]] = {
    "parallel": parallel,
    "sequential": sequential,
    "centralized": centralized,
    "local": local,
    "fedavg": fedavg,
}

"""One round of training, for every arrangement: who steps with whom, and what is averaged at its end.

A strategy is a row of `config/arrangement.py`; `make_strategy` turns any row into a program. A round follows the data: each
step draws its batches, takes them across the cut, and updates; at the end of the round, copies are averaged.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fedbert_jax.devices.mesh import constrain, constrain_clients
from fedbert_jax.federated import holding as hold
from fedbert_jax.federated.average import add_up_with_feedback, pool, weighted_sum
from fedbert_jax.federated.ending import average, gradient_channel, mean_gradient, settle
from fedbert_jax.federated.joined import joined_loss
from fedbert_jax.federated.metrics import NOTHING, Recorder, RoundMetrics, blame, lost, not_finite, of_steps, of_turns
from fedbert_jax.federated.setting import Setting, over_slices
from fedbert_jax.federated.split import split_step
from fedbert_jax.federated.state import Averaging, Cohort, Pair, Rows, State, Strategy, clients_first, num_steps, pick

Trained = tuple[Pair, Pair, RoundMetrics]  # model, optimizer states and metrics after some steps


def make_strategy(s: Setting, recorder: Recorder = NOTHING) -> Strategy:
    """Returns the program of a setting's arrangement, with metrics that hold what `recorder` keeps."""
    how, cut = s.how, s.cut()
    each_sends = how.averages_gradients and (cut.channels.gradient is not None or s.blinded)  # a gradient of its own
    own_gradients = each_sends or s.guards_gradients or recorder is not NOTHING
    held = hold.holding(how, s.config.federated.client_optimizer_state)

    def train_together(model: Pair, opt: Pair, cohort: Cohort, first: jax.Array) -> Trained:
        """C clients step side by side against one body; their segments and optimizers end as [C, ...]. Metrics are [K]."""

        def step(carry: tuple[Pair, Pair], x: tuple[jax.Array, Rows], own_params: bool, own_opt: bool) -> Any:
            (model, opt), (k, rows) = carry, x

            def clients(part: Any) -> Any:
                rows, ids, weights, params, opt_c = part
                params, opt_c = params if own_params else model.client, opt_c if own_opt else opt.client
                batch, keys = s.draw(constrain(rows, "data"), cohort.round, k, ids)
                out = split_step(cut, params, model.server, batch, weights, keys, shared_client=not own_params)
                axes = (0, 0 if own_opt else None, 0 if own_params else None, None)
                params, opt_c, norm = jax.vmap(s.client_tx.update, axes)(out.client_grads, opt_c, params, first + k)
                sums = (out.server_grads, weighted_sum(weights, out.loss), weighted_sum(weights, norm))
                seen = recorder.step(batch, out)
                return (constrain_clients(params), constrain_clients(opt_c), not_finite(out.loss, norm), seen), sums

            mine = (model.client if own_params else (), opt.client if own_opt else ())
            (client, opt_c, failed, seen), (grads, loss, norm) = over_slices(s, clients, (rows, *cohort[1:3], *mine))
            server, opt_s, server_norm = s.server_tx.update(grads, opt.server, model.server, first + k)
            return (Pair(client, server), Pair(opt_c, opt_s)), RoundMetrics(loss, norm, server_norm, failed, seen)

        # In the first step all clients hold the global segment, so it is not copied: the update makes the copies.
        own = (held.model.client == "own", held.opt.client == "own")
        carry, head = step((model, opt), (jnp.int32(0), pick(cohort.rows, 0)), *own)
        later = (jnp.arange(1, num_steps(cohort.rows)), jax.tree.map(lambda x: x[1:], cohort.rows))
        (model, opt), tail = jax.lax.scan(lambda c, x: step(c, x, True, True), carry, later)
        return model, opt, jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), head, tail)

    def train_one(
        model: Pair, opt: Pair, cohort: Cohort, first: jax.Array, averaging: Averaging
    ) -> tuple[*Trained, Averaging]:
        """All clients train one model: each step updates it with the weighted mean of their gradients. Metrics are [K]."""

        def step(carry: tuple[Pair, Pair, Averaging], x: tuple[jax.Array, Rows]) -> Any:
            (model, opt, averaging), (k, rows) = carry, x
            channel = gradient_channel(s, averaging) if each_sends else None

            def gradients(part: Any) -> Any:
                rows, ids, weights, unsent = part
                batch, keys = s.draw(rows, cohort.round, k, ids)
                if not how.cut:
                    loss, grads = jax.value_and_grad(joined_loss, (1, 2))(s.segments, *model, pick(batch, 0), keys)
                    return (unsent, jnp.zeros(len(ids), jnp.int32), ()), (loss, Pair(*grads))
                as_one = (len(cohort.weights) == 1 and not each_sends) or not own_gradients
                if as_one and len(cohort.weights) > 1:  # only the sum is needed, so none has a gradient of its own
                    batch, weights = pool(batch, weights), jnp.ones(1)
                out = split_step(cut, model.client, model.server, batch, weights, keys, shared_client=True)
                dz = cut.channels.head_gradient.receive(out.messages["head_gradient"])
                seen = (lost(dz, len(ids)), recorder.step(batch, out))
                if as_one:
                    return (unsent, *seen), (out.loss[0], Pair(pick(out.client_grads, 0), out.server_grads))
                client, unsent = add_up_with_feedback(channel, out.client_grads, weights, unsent)
                return (unsent, *seen), (weighted_sum(weights, out.loss), Pair(client, out.server_grads))

            if len(cohort.weights) > 1:
                rows = constrain(rows, "data")
            (unsent, whose, seen), (loss, grads) = over_slices(s, gradients, (rows, *cohort[1:3], averaging.unsent))
            averaging = averaging._replace(unsent=unsent)
            grads, averaging = mean_gradient(s, channel, grads, averaging)
            model, opt, norms = s.update(model, opt, grads, first + k)
            return (model, opt, averaging), (RoundMetrics(loss, *norms, not_finite(loss, norms.client), seen), whose)

        steps = (jnp.arange(num_steps(cohort.rows)), cohort.rows)
        (model, opt, averaging), (metrics, whose) = jax.lax.scan(step, (model, opt, averaging), steps)
        return model, opt, metrics._replace(failed=blame(metrics.failed, whose, cohort.weights)), averaging

    def train_alone(model: Pair, opt: Pair, rows: Rows, client: jax.Array, round: jax.Array, first: jax.Array) -> Trained:
        """One client trains a model on its own rows [K, B, ...]: a cohort of one."""
        alone = Cohort(jax.tree.map(lambda x: x[:, None], rows), client[None], jnp.ones(1), round)
        model, opt, metrics, _ = train_one(model, opt, alone, first, Averaging())
        own = jax.tree.map(lambda x: x[:, 0], (metrics.failed, metrics.seen))
        return model, opt, metrics._replace(failed=own[0], seen=own[1], ended=recorder.end(model.client, opt.client))

    def together(state: State, cohort: Cohort, first: jax.Array) -> tuple[State, RoundMetrics]:
        model, opt, metrics = train_together(state.model, hold.begun(s, held, state), cohort, first)
        kept, sums = settle(s, held, state, model, opt, cohort.weights)
        metrics = metrics._replace(ended=recorder.end(model.client, opt.client))
        return average(s, held, state, kept, sums, cohort.round), of_steps(metrics)

    def pooled(state: State, cohort: Cohort, first: jax.Array) -> tuple[State, RoundMetrics]:
        if how.pools_text:
            cohort = Cohort(jax.tree.map(lambda x: x[:, :1], cohort.rows), cohort.clients[:1], jnp.ones(1), cohort.round)
        if len(cohort.weights) == 1:
            cohort = cohort._replace(rows=constrain(cohort.rows, None, None, "data"))
        theirs = state.averaging._replace(unsent=pick(state.averaging.unsent, cohort.clients))
        model, opt, metrics, ended = train_one(state.model, state.opt, cohort, first, theirs)
        there = jnp.where(cohort.weights > 0, cohort.clients, s.num_clients)  # absent clients keep theirs
        put = lambda all_, x: all_.at[there].set(x, mode="drop")  # noqa: E731
        unsent = jax.tree.map(put, state.averaging.unsent, ended.unsent)
        return State(model, opt, ended._replace(unsent=unsent)), of_steps(metrics)

    def apart(state: State, cohort: Cohort, first: jax.Array) -> tuple[State, RoundMetrics]:
        def train(part: Any) -> Any:
            rows, ids, weights = part
            model = hold.spread(held.model, state.model, len(ids))
            opt = hold.spread(held.opt, hold.begun(s, held, state), len(ids))
            each = jax.vmap(train_alone, (0, 0, 0, 0, None, None))
            model, opt, metrics = each(model, opt, constrain(rows, "data"), ids, cohort.round, first)
            kept, sums = settle(s, held, state, model, opt, weights)
            metrics = of_turns(metrics, weights)
            return (kept, metrics[3:]), (sums, metrics[:3])

        (kept, own), (sums, means) = over_slices(s, train, (clients_first(cohort.rows), *cohort[1:3]))
        return average(s, held, state, kept, sums, cohort.round), RoundMetrics(*means, *own)

    def in_turn(state: State, cohort: Cohort, first: jax.Array) -> tuple[State, RoundMetrics]:
        def turn(carry: tuple[Pair, Pair], x: Any) -> tuple[tuple[Pair, Pair], RoundMetrics]:
            (model, opt), (n, client, rows) = carry, x
            mine = State(hold.take(held.model, model, client), hold.take(held.opt, opt, client), Averaging())
            then = first + n * num_steps(cohort.rows)
            end, end_opt, metrics = train_alone(mine.model, hold.begun(s, held, mine), rows, client, cohort.round, then)
            return (hold.put(held.model, model, client, end), hold.put(held.opt, opt, client, end_opt)), metrics

        rows = constrain(clients_first(cohort.rows), None, None, "data")  # [C, K, B, ...]
        turns = (jnp.arange(len(cohort.clients)), cohort.clients, rows)
        (model, opt), metrics = jax.lax.scan(turn, (state.model, state.opt), turns)
        return State(model, opt, state.averaging), of_turns(metrics, cohort.weights)

    rounds = {"together": together, "pooled": pooled, "apart": apart, "in turn": in_turn}
    steps = s.config.federated.steps_per_round(s.cohort)
    round = lambda state, cohort: rounds[how.clients](state, cohort, cohort.round * steps)  # noqa: E731
    init = lambda model: hold.first_state(s, held, model)  # noqa: E731
    return Strategy(init, round, lambda state, client: hold.take(held.model, state.model, client), steps)

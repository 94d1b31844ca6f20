"""Each strategy's round against what it should equal (invariants 2, 3 and 4)."""

from __future__ import annotations

import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import assert_trees_close, make_strategy, mask_spec, random_blocks, tiny_config

from fedbert_jax.config import ARRANGEMENTS, StrategyName
from fedbert_jax.data.masking import mask_blocks
from fedbert_jax.federated.setting import RoundInputs, split_grads
from fedbert_jax.federated.split import joined_loss, split_step
from fedbert_jax.federated.strategies import STRATEGIES

SGD = dict(name="sgd", learning_rate=0.5, warmup_steps=0, schedule="constant", clip_norm=None, eps=None)
THREE = jnp.array([0.5, 0.2, 0.3])


def inputs(config, clients=3, weights=THREE, round=0, seed=0, batch=None):
    f = config.federated
    tokens = random_blocks(seed, f.local_steps, clients, batch or f.batch_size)
    return RoundInputs(tokens, jnp.arange(clients), jnp.asarray(weights, jnp.float32), jnp.int32(round))


def run(config, rounds=1, **kwargs):
    """The state after some rounds, and the last round's metrics."""
    setting, strategy, state = make_strategy(config)
    step = jax.jit(strategy.round)
    for n in range(rounds):
        state, metrics = step(state, inputs(config, round=n, seed=n, **kwargs))
    return setting, strategy, state, metrics


def tiny(strategy="parallel", sgd=False, **federated):
    optimizers = dict(client_optimizer=SGD, server_optimizer=SGD) if sgd else {}
    return tiny_config(federated=dict(strategy=strategy, **federated), **optimizers)


def test_every_strategy_is_entered_everywhere():
    assert set(STRATEGIES) == set(ARRANGEMENTS) == set(get_args(StrategyName))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_parallel_with_one_client_is_centralized(dropout):
    """Invariant 2, with Adam, warm-up, clipping and several rounds."""
    models = []
    for strategy in ("parallel", "centralized"):
        config = tiny_config(
            federated=dict(strategy=strategy, num_clients=1), model=dict(hidden_dropout=dropout)
        )
        models.append(run(config, rounds=3, clients=1, weights=[1.0])[2].model)
    assert_trees_close(models[0], models[1])


@pytest.mark.parametrize("strategy", ["sequential", "fedavg"])
def test_others_with_one_client_are_centralized(strategy):
    """One client's turn, or its whole model averaged with nobody's, is ordinary training."""
    models = [
        run(tiny(name, num_clients=1), rounds=3, clients=1, weights=[1.0])[2].model for name in (strategy, "centralized")
    ]
    assert_trees_close(models[0], models[1])


@pytest.mark.parametrize("weights", [[1 / 3] * 3, [0.5, 0.2, 0.3]])
def test_parallel_of_one_sgd_step_is_centralized_sgd(weights):
    """Invariant 3: unequal weights included. The reference is `jax.grad` of the weighted pooled loss."""
    config = tiny(sgd=True, local_steps=1)
    data = inputs(config, weights=weights)
    setting, strategy, state = make_strategy(config)
    new, _ = jax.jit(strategy.round)(state, data)

    def pooled_loss(model):
        losses = []
        for c in range(3):
            batch, _ = setting.draw(data.tokens[0, c], jnp.int32(0), jnp.int32(0), jnp.int32(c))
            losses.append(joined_loss(setting.segments, model.client, model.server, batch))
        return jnp.stack(losses) @ jnp.asarray(weights)

    grads = jax.jit(jax.grad(pooled_loss))(state.model)
    assert_trees_close(new.model, jax.tree.map(lambda p, g: p - 0.5 * g, state.model, grads))


def test_one_local_step_without_copies_equals_many():
    """The shortcut for local_steps=1 (no copies of the client segment) changes nothing, Adam's state included."""
    config = tiny(local_steps=2)
    data = inputs(config)
    once = RoundInputs(data.tokens[:1], *data[1:])
    setting, strategy, state = make_strategy(tiny(local_steps=1))
    short, _ = jax.jit(strategy.round)(state, once)
    # The general way, with copies: a round of the scan over one step.
    copies = jax.tree.map(lambda x: jnp.stack([x] * 3), (state.model.client, state.opt.client))
    batch, keys = jax.vmap(setting.draw, (0, None, None, 0))(
        once.tokens[0], jnp.int32(0), jnp.int32(0), once.client_ids
    )
    out = split_step(
        setting.segments, setting.config.wire, copies[0], state.model.server, batch, once.weights, keys
    )
    update = jax.vmap(setting.client_tx.update, (0, 0, 0, None))
    clients, opts, _ = update(out.client_grads, copies[1], copies[0], jnp.int32(0))
    mean = lambda tree: jax.tree.map(lambda x: jnp.einsum("c,c...->...", THREE, x), tree)  # noqa: E731
    assert_trees_close(short.model.client, mean(clients))
    assert_trees_close(short.opt.client[0].mu, mean(opts[0].mu))


@pytest.mark.parametrize("body", ["pooled", "merged"])
def test_order_of_clients_does_not_matter(body):
    """Invariant 4."""
    config = tiny(body=body)
    data = inputs(config)
    _, strategy, state = make_strategy(config)
    step = jax.jit(strategy.round)
    order = jnp.array([2, 0, 1])
    shuffled = RoundInputs(data.tokens[:, order], data.client_ids[order], data.weights[order], data.round)
    assert_trees_close(step(state, data)[0], step(state, shuffled)[0])


@pytest.mark.parametrize("strategy, body", [("parallel", "pooled"), ("parallel", "merged"), ("fedavg", "pooled")])
def test_an_absent_client_changes_nothing(strategy, body):
    """Invariant 4: a padded cohort is the cohort."""
    config = tiny(strategy, body=body)
    _, rule, state = make_strategy(config)
    data = inputs(config, weights=[0.6, 0.4, 0.0])
    two = RoundInputs(data.tokens[:, :2], data.client_ids[:2], data.weights[:2], data.round)
    step = jax.jit(rule.round)
    (padded, metrics), (plain, same) = step(state, data), step(state, two)
    assert_trees_close(padded, plain)
    assert_trees_close(metrics[:-1], same[:-1])


def by_hand(setting, model, opt, tokens, client, round, first):
    """One client's K steps, one at a time."""
    grads = jax.jit(split_grads(setting))
    update = jax.jit(setting.update)
    for k in range(tokens.shape[0]):
        batch, key = setting.draw(tokens[k], jnp.int32(round), jnp.int32(k), jnp.int32(client))
        _, g = grads(model, batch, key)
        model, opt, _ = update(model, opt, g, jnp.int32(first + k))
    return model, opt


def test_sequential_hands_the_client_segment_on():
    config = tiny("sequential")
    setting, strategy, state = make_strategy(config)
    data = inputs(config)
    order = jnp.array([1, 2, 0])
    data = RoundInputs(data.tokens[:, order], order, data.weights, data.round)
    new, _ = jax.jit(strategy.round)(state, data)
    model, opt = state.model, state.opt
    for n in range(3):
        model, opt = by_hand(setting, model, opt, data.tokens[:, n], int(order[n]), 0, 2 * n)
    assert_trees_close(new.model, model)
    assert_trees_close(new.opt, opt)
    assert strategy.steps_per_round == 6


@pytest.mark.parametrize("body", ["merged", "private"])
def test_bodies_of_their_own(body):
    """SplitFed V1 averages the bodies at the end of the round; private bodies never meet."""
    config = tiny(body=body)
    setting, strategy, state = make_strategy(config)
    data = inputs(config)
    new, _ = jax.jit(strategy.round)(state, data)
    ends = []
    for c in range(3):
        start = strategy.model_of(state, jnp.int32(c))
        ends.append(by_hand(setting, start, setting.init_opt(start), data.tokens[:, c], c, 0, 0)[0])
    mean = lambda *x: sum(w * leaf for w, leaf in zip(THREE, x, strict=True))  # noqa: E731
    assert_trees_close(new.model.client, jax.tree.map(mean, *[e.client for e in ends]))
    if body == "merged":
        assert_trees_close(new.model.server, jax.tree.map(mean, *[e.server for e in ends]))
    else:
        for c in range(3):
            assert_trees_close(strategy.model_of(new, jnp.int32(c)).server, ends[c].server)


def test_local_models_never_meet():
    config = tiny("local")
    setting, strategy, state = make_strategy(config)
    data = inputs(config)
    new, _ = jax.jit(strategy.round)(state, data)
    for c in range(3):
        start = strategy.model_of(state, jnp.int32(c))
        end, _ = by_hand(setting, start, setting.init_opt(start), data.tokens[:, c], c, 0, 0)
        assert_trees_close(strategy.model_of(new, jnp.int32(c)), end)


@pytest.mark.parametrize("strategy", ["parallel", "fedavg", "sequential"])
def test_optimizer_state_reset_and_keep(strategy):
    """`reset` begins every round with zero moments; `keep` gives each client its own back."""
    reset = run(tiny(strategy, client_optimizer_state="reset"), rounds=2)[2]
    assert reset.opt.client == ()
    average = run(tiny(strategy), rounds=2)[2]
    differs = lambda a, b: not np.allclose(a.model.client["head"]["bias"], b.model.client["head"]["bias"], atol=1e-6)  # noqa: E731
    assert differs(reset, average)
    if strategy != "fedavg":
        keep = run(tiny(strategy, client_optimizer_state="keep"), rounds=2)[2]
        moments = keep.opt.client[0].mu["head"]["bias"]
        assert moments.shape[0] == 3
        assert not np.allclose(moments[0], moments[1])
        assert differs(keep, average)


@pytest.mark.parametrize(
    "aggregator", [dict(name="sgd", learning_rate=0.5), dict(momentum=0.9), dict(name="adam", learning_rate=0.01)]
)
def test_outer_update_against_its_formula(aggregator):
    """FedAvg at half rate, FedAvgM and FedAdam, two rounds, against the formulas in numpy."""
    plain, config = tiny(), tiny_config(federated=dict(strategy="parallel"), aggregator=aggregator)
    _, fedavg, _ = make_strategy(plain)
    _, strategy, state = make_strategy(config)
    one, other = jax.jit(fedavg.round), jax.jit(strategy.round)
    m = v = 0.0
    for n in range(2):
        data = inputs(config, round=n, seed=n)
        x = np.asarray(state.model.client["head"]["dense"]["kernel"])
        average = one(state._replace(outer=()), data)[0].model.client["head"]["dense"]["kernel"]
        delta = x - np.asarray(average)
        if aggregator.get("name") == "adam":
            m, v = 0.9 * m + 0.1 * delta, 0.999 * v + 0.001 * delta**2
            expected = x - 0.01 * (m / (1 - 0.9 ** (n + 1))) / (np.sqrt(v / (1 - 0.999 ** (n + 1))) + 1e-8)
        elif "momentum" in aggregator:
            m = 0.9 * m + delta
            expected = x - m
        else:
            expected = x - 0.5 * delta
        state, _ = other(state, data)
        np.testing.assert_allclose(state.model.client["head"]["dense"]["kernel"], expected, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(
    ("strategy", "body", "at_once"),
    [("parallel", "pooled", None), ("parallel", "private", None), ("fedavg", "pooled", None), ("fedavg", "pooled", 2)],
)
def test_an_outer_adam_leaves_alone_what_nobody_trains(strategy, body, at_once):
    """Positions beyond the blocks' length: averaging copies of them must make no difference, which Adam would scale up."""
    config = tiny_config(
        federated=dict(strategy=strategy, body=body, num_clients=4, clients_at_once=at_once),
        aggregator=dict(name="adam", learning_rate=0.01), client_optimizer=dict(weight_decay=0.0),
    )  # fmt: skip
    states = make_strategy(config)[2], run(config, rounds=2, clients=4, weights=[0.4, 0.1, 0.3, 0.2])[2]
    before, after = (state.model.client["embeddings"]["position"]["embedding"] for state in states)
    length = config.data.seq_len
    assert jnp.array_equal(after[length:], before[length:])
    assert not np.any(np.all(after[:length] == before[:length], axis=1))


def test_schedules_count_global_steps():
    """A client's fresh optimizer state (reset) doesn't set the learning rate back."""
    opt = dict(name="sgd", learning_rate=1.0, warmup_steps=0, schedule="linear", decay_steps=4, clip_norm=None, eps=None)
    config = tiny_config(
        federated=dict(local_steps=2, client_optimizer_state="reset"), client_optimizer=opt, server_optimizer=opt
    )
    _, strategy, state = make_strategy(config)
    moved, _ = jax.jit(strategy.round)(state, inputs(config, round=0))
    stays, _ = jax.jit(strategy.round)(state, inputs(config, round=2))
    assert_trees_close(stays.model, state.model)
    assert not np.allclose(moved.model.client["head"]["bias"], state.model.client["head"]["bias"])


@pytest.mark.parametrize("mode", ["average", "reset"])
@pytest.mark.parametrize("strategy, body", [("parallel", "pooled"), ("parallel", "merged"), ("fedavg", "pooled")])
def test_a_cohort_in_slices_is_the_cohort_at_once(strategy, body, mode):
    """Five clients, two at a time, padded to six by one of weight 0; the momentum of an outer update included."""
    ends = []
    for at_once in (None, 2, 1):
        config = tiny_config(
            federated=dict(
                strategy=strategy, body=body, num_clients=6, clients_at_once=at_once, client_optimizer_state=mode
            ),
            model=dict(hidden_dropout=0.1, num_layers=1), aggregator=dict(momentum=0.9),
        )  # fmt: skip
        end = run(config, rounds=2, clients=6, weights=[0.1, 0.3, 0.2, 0.15, 0.25, 0.0])
        ends.append((end[2], end[3]))
    assert_trees_close(ends[1], ends[0], atol=3e-6)
    assert_trees_close(ends[2], ends[0], atol=3e-6)


@pytest.mark.parametrize(
    "strategy, body",
    [("parallel", "pooled"), ("parallel", "merged")] + [(s, "pooled") for s in ("sequential", "fedavg", "centralized")],
)
def test_a_short_round_is_a_round_of_fewer_steps(strategy, body):
    """The last round of fine-tuning has fewer steps; its schedules go on from where the round before ended."""
    models = []
    for local_steps, round in ((4, 1), (1, 4)):
        config = tiny(strategy, body=body, local_steps=local_steps)
        setting, _, state = make_strategy(config)
        masked = jax.vmap(jax.vmap(lambda b: mask_blocks(jax.random.key(0), b, mask_spec(tiny()))))
        batch = masked(random_blocks(0, 1, 3, 2))
        rule = STRATEGIES[strategy](dataclasses.replace(setting, mask=None))
        models.append(jax.jit(rule.round)(state, RoundInputs(batch, jnp.arange(3), THREE, jnp.int32(round)))[0].model)
    assert_trees_close(*models)


def test_traffic_counts_messages_and_averaging():
    """Bytes are the four messages' of every step, and the segment's (and its moments') there and back."""
    config = tiny()
    setting, strategy, state = make_strategy(config)
    f, size, masked = config.federated, config.model.hidden_size, setting.mask.num_masked
    steps = f.local_steps * 3 * f.batch_size
    assert strategy.traffic["activations_up"] == steps * 12 * size * 4
    assert strategy.traffic["hidden_states_down"] == steps * masked * size * 4
    client = sum(x.nbytes for x in jax.tree.leaves(state.model.client))
    assert strategy.traffic["client_segment_up"] == strategy.traffic["client_segment_down"] == 3 * client
    assert strategy.traffic["client_optimizer_up"] == 3 * (2 * client + 4)
    reset = make_strategy(tiny(client_optimizer_state="reset"))[1].traffic
    assert "client_optimizer_up" not in reset
    assert make_strategy(tiny("centralized"))[1].traffic == {}
    assert "server_segment_up" in make_strategy(tiny("fedavg"))[1].traffic

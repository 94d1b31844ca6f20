"""Each arrangement's round against what it should equal (invariants 2, 3, 4 and 11)."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import assert_trees_close, cohort, make_setting, make_strategy, mask_spec, program, random_blocks, tiny_config

from fedbert_jax.data.masking import mask_blocks
from fedbert_jax.federated.joined import joined_loss
from fedbert_jax.federated.rounds import make_strategy as make
from fedbert_jax.federated.state import Averaging, Cohort
from fedbert_jax.federated.traffic import round_traffic

SGD = dict(name="sgd", learning_rate=0.5, warmup_steps=0, schedule="constant", clip_norm=None, eps=None)
THREE = jnp.array([0.5, 0.2, 0.3])


def run(config, rounds=1, **kwargs):
    """The state after some rounds, and the last round's metrics."""
    _, _, state, round = program(config)
    for n in range(rounds):
        state, metrics = round(state, cohort(config, round=n, seed=n, **kwargs))
    return state, metrics


def tiny(strategy="parallel", sgd=False, model=None, **federated):
    optimizers = dict(client_optimizer=SGD, server_optimizer=SGD) if sgd else {}
    return tiny_config(federated=dict(strategy=strategy, **federated), model=model or {}, **optimizers)


def test_one_client_trains_alike_by_any_strategy():
    """Invariant 2, with Adam, warm-up, clipping, dropout and several rounds: with one client, all are ordinary training."""
    kinds = [
        dict(strategy="centralized"),
        dict(),
        dict(average="gradients"),
        dict(strategy="sequential"),
        dict(strategy="fedavg"),
        dict(body="merged"),
    ]
    models = [
        run(tiny(**kind, num_clients=1, model=dict(hidden_dropout=0.1)), rounds=3, clients=1, weights=[1.0])[0].model
        for kind in kinds
    ]
    for model in models[1:]:
        assert_trees_close(model, models[0])


def pooled_loss(setting, model, rows, weights, round, k):
    """The weighted mean of the uncut model's losses on each client's batch."""
    batch, keys = setting.draw(rows, round, k, jnp.arange(len(weights)))
    losses = []
    for c, weight in enumerate(weights):
        if weight > 0:
            mine, key = jax.tree.map(lambda x, c=c: x[c], batch), jax.tree.map(lambda x, c=c: x[c : c + 1], keys)
            losses.append(weight * joined_loss(setting.segments, model.client, model.server, mine, key))
    return sum(losses)


@pytest.mark.parametrize("weights", [[1 / 3] * 3, [0.5, 0.2, 0.3]])
def test_parallel_of_one_sgd_step_is_centralized_sgd(weights):
    """Invariant 3, also with unequal weights. The reference is `jax.grad` of the weighted pooled loss."""
    config = tiny(sgd=True, local_steps=1)
    data = cohort(config, weights=weights)
    setting, _, state, round = program(config)
    new, _ = round(state, data)
    zero = jnp.int32(0)
    grads = jax.jit(jax.grad(lambda m: pooled_loss(setting, m, data.rows[0], weights, zero, zero)))(state.model)
    assert_trees_close(new.model, jax.tree.map(lambda p, g: p - 0.5 * g, state.model, grads))


OPTIMIZERS = dict(
    adamw=dict(),
    adam=dict(nesterov=True),
    sgd=dict(momentum=0.9, learning_rate=0.5, eps=None),
    lamb=dict(learning_rate=0.01, eps=1e-2),
    lion=dict(eps=None),
    adagrad=dict(learning_rate=0.05),
    nadamw=dict(),
    yogi=dict(learning_rate=0.01),
)


@pytest.mark.parametrize("name", ["adamw", *(pytest.param(n, marks=pytest.mark.slow) for n in list(OPTIMIZERS)[1:])])
def test_averaged_gradients_are_training_on_the_weighted_pooled_batch(name):
    """Invariant 3, with clipping, schedule, dropout, unequal weights, and an absent client whose text is nonsense.

    In float64, where an optimizer that divides by small numbers leaves rounding small: what is left is that attention
    scores are float32 for any rows (`jax.nn.dot_product_attention`). The bias of the keys has no gradient, and lion,
    which takes the sign, moves it by that rounding.
    """
    optimizer = dict(name=name) | OPTIMIZERS[name]
    config = tiny_config(
        federated=dict(average="gradients", num_clients=4),
        model=dict(hidden_dropout=0.1),
        client_optimizer=optimizer,
        server_optimizer=optimizer,
    )
    weights = [0.5, 0.375, 0.125, 0.0]  # float32 holds all of them
    with jax.enable_x64(True):
        setting = make_setting(config, dtype=jnp.float64)
        strategy = make(setting)
        round = jax.jit(strategy.round)
        state = strategy.init(jax.tree.map(lambda x: x.astype(jnp.float64), setting.fresh()))

        @jax.jit
        def step(model, opt, rows, round, k):
            loss, grads = jax.value_and_grad(lambda m: pooled_loss(setting, m, rows, weights, round, k))(model)
            model, opt, norms = setting.update(model, opt, grads, round * config.federated.local_steps + k)
            return model, opt, (loss, *norms)

        model, opt = state.model, setting.init_opt(state.model)
        for n in range(2):
            data = cohort(config, clients=4, weights=weights, round=n, seed=n)
            state, metrics = round(state, data._replace(rows=data.rows.at[:, 3].set(10**6)))
            numbers = []
            for k in range(config.federated.local_steps):
                model, opt, seen = step(model, opt, data.rows[k], jnp.int32(n), jnp.int32(k))
                numbers.append(seen)
            np.testing.assert_allclose(metrics[:3], np.mean(numbers, axis=0), rtol=1e-6)
            assert not metrics.failed.any()
    pairs = zip(jax.tree_util.tree_leaves_with_path((state.model, state.opt)), jax.tree.leaves((model, opt)), strict=True)
    for (path, actual), expected in pairs:
        at = jax.tree_util.keystr(path)
        assert actual.dtype in (jnp.float64, jnp.int32), at
        if name == "lion" and at == "[0].server['layers']['attention']['qkv']['bias']":
            actual, expected = actual[:, ::2], expected[:, ::2]  # of queries and values
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-6 * np.abs(expected).max(), err_msg=at)


def test_averaged_gradients_need_the_memory_and_the_arithmetic_of_centralized_training():
    """No table, gradient or moment exists per client: a large vocabulary times eight clients would show."""
    needed = []
    for kind in (dict(strategy="centralized"), dict(average="gradients"), dict()):
        config = tiny_config(federated=dict(num_clients=8, **kind), model=dict(hidden_size=64, vocab_size=8000))
        setting, strategy, _ = make_strategy(config)
        pooled = config.federated.arrangement.pools_text
        clients, rows = (1, 16) if pooled else (8, 2)
        shape = lambda *n: jax.ShapeDtypeStruct(n, jnp.int32)  # noqa: E731
        data = Cohort(shape(2, clients, rows, 12), shape(clients), jax.ShapeDtypeStruct((clients,), jnp.float32), shape())
        state = jax.eval_shape(lambda setting=setting, strategy=strategy: strategy.init(setting.fresh()))
        compiled = jax.jit(strategy.round, donate_argnums=0).lower(state, data).compile()
        cost = compiled.cost_analysis()
        needed.append((compiled.memory_analysis().temp_size_in_bytes, cost["flops"], cost["bytes accessed"]))
    table = 8000 * 64 * 4
    one, gradients, copies = needed
    assert gradients[0] < one[0] + table / 4
    assert gradients[1] < 1.001 * one[1] and gradients[2] < 1.01 * one[2]  # as XLA counts them, a step's
    assert copies[0] > one[0] + 8 * table and copies[2] > 2 * one[2]  # this is what the test would see


@pytest.mark.parametrize("average", ["parameters", "gradients"])
def test_a_client_with_nothing_to_predict_changes_no_number_of_the_others(average):
    """Whose text is special tokens alone: the server and the others learn what they learn without it."""
    config = tiny(average=average, local_steps=1)
    _, _, state, round = program(config)
    data = cohort(config, weights=THREE)
    data = data._replace(rows=data.rows.at[:, 1].set(3))
    (ended, seen), (without, expected) = round(state, data), round(state, data._replace(weights=THREE.at[1].set(0.0)))
    assert not seen.failed.any() and expected.loss > 0
    np.testing.assert_allclose(seen[:1] + seen[2:3], expected[:1] + expected[2:3], rtol=1e-6)
    shared = (lambda pair: pair) if average == "gradients" else (lambda pair: pair.server)
    for a, b in ((ended.model, without.model), (ended.opt, without.opt)):
        assert_trees_close(shared(a), shared(b), rtol=1e-6)


def test_one_local_step_without_copies_equals_many():
    """Clients begin with the shared segment; if they had copies from the start, these would end the same."""
    config = tiny(local_steps=1, model=dict(hidden_dropout=0.1))
    setting, _, state, round = program(config)
    data = cohort(config)
    short, _ = round(state, data)
    ends = [by_hand(setting, state.model, state.opt, data.rows[:, c], c, 0, 0) for c in range(3)]
    mean = lambda *x: sum(w * leaf for w, leaf in zip(THREE, x, strict=True))  # noqa: E731
    assert_trees_close(short.model.client, jax.tree.map(mean, *[model.client for model, _ in ends]))
    moments = [opt.client[0].mu for _, opt in ends]
    assert_trees_close(short.opt.client[0].mu, jax.tree.map(mean, *moments))


@pytest.mark.parametrize("kind", [dict(), dict(body="merged"), dict(average="gradients")], ids=str)
def test_neither_order_nor_absent_clients_matter(kind):
    """Invariants 4 and 11: another order, or a client of weight 0 whose text is nonsense, changes nothing."""
    config = tiny(**kind)
    data = cohort(config, weights=[0.6, 0.4, 0.0])
    _, _, state, round = program(config)
    order = jnp.array([1, 0, 2])
    shuffled = Cohort(data.rows[:, order], data.clients[order], data.weights[order], data.round)
    absent = data._replace(rows=data.rows.at[:, 2].set(10**6))  # its embedding is NaN
    two = Cohort(data.rows[:, :2], data.clients[:2], data.weights[:2], data.round)
    ends = [round(state, given) for given in (data, shuffled, absent) + ((two,) if not kind else ())]
    for end, metrics in ends[1:]:
        assert_trees_close(end, ends[0][0])
        assert_trees_close(metrics[:3], ends[0][1][:3])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(ends[2]))


def test_an_absent_client_of_fedavg_changes_nothing():
    config = tiny("fedavg")
    data = cohort(config, weights=[0.6, 0.4, 0.0])
    _, _, state, round = program(config)
    two = Cohort(data.rows[:, :2], data.clients[:2], data.weights[:2], data.round)
    (padded, metrics), (plain, same) = round(state, data), round(state, two)
    assert_trees_close(padded, plain)
    assert_trees_close(metrics[:3], same[:3])


@functools.cache
def joined_step(config):
    """One optimizer step of the uncut model on one client's batch, compiled once for all strategies."""
    setting = program(config)[0]

    @jax.jit
    def step(model, opt, rows, client, round, k, now):
        batch, keys = setting.draw(rows[None], round, k, client[None])
        loss = lambda m: joined_loss(setting.segments, m.client, m.server, jax.tree.map(lambda x: x[0], batch), keys)  # noqa: E731
        return setting.update(model, opt, jax.grad(loss)(model), now)[:2]

    return step


def by_hand(setting, model, opt, rows, client, round, first):
    """One client's K steps of ordinary training, one at a time."""
    step = joined_step(dataclasses.replace(setting.config, federated=tiny().federated))
    for k in range(rows.shape[0]):
        model, opt = step(model, opt, rows[k], *map(jnp.int32, (client, round, k, first + k)))
    return model, opt


def test_sequential_hands_the_client_segment_on():
    config = tiny("sequential")
    setting, strategy, state, round = program(config)
    data = cohort(config)
    order = jnp.array([1, 2, 0])
    data = Cohort(data.rows[:, order], order, data.weights, data.round)
    new, _ = round(state, data)
    model, opt = state.model, state.opt
    for n in range(3):
        model, opt = by_hand(setting, model, opt, data.rows[:, n], int(order[n]), 0, 2 * n)
    assert_trees_close(new.model, model)
    assert_trees_close(new.opt, opt)
    assert strategy.steps_per_round == 6


@pytest.mark.parametrize("body", ["merged", "private"])
def test_bodies_of_their_own(body):
    """SplitFed V1 averages the bodies at the end of the round; private bodies never meet."""
    config = tiny(body=body)
    setting, strategy, state, round = program(config)
    data = cohort(config)
    new, _ = round(state, data)
    ends = []
    for c in range(3):
        start = strategy.model_of(state, jnp.int32(c))
        ends.append(by_hand(setting, start, setting.init_opt(start), data.rows[:, c], c, 0, 0)[0])
    mean = lambda *x: sum(w * leaf for w, leaf in zip(THREE, x, strict=True))  # noqa: E731
    assert_trees_close(new.model.client, jax.tree.map(mean, *[e.client for e in ends]))
    if body == "merged":
        assert_trees_close(new.model.server, jax.tree.map(mean, *[e.server for e in ends]))
    else:
        for c in range(3):
            assert_trees_close(strategy.model_of(new, jnp.int32(c)).server, ends[c].server)


def test_local_models_never_meet():
    config = tiny("local")
    setting, strategy, state, round = program(config)
    data = cohort(config)
    new, _ = round(state, data)
    for c in range(3):
        start = strategy.model_of(state, jnp.int32(c))
        end, _ = by_hand(setting, start, setting.init_opt(start), data.rows[:, c], c, 0, 0)
        assert_trees_close(strategy.model_of(new, jnp.int32(c)), end)


@pytest.mark.parametrize(
    "strategy", ["parallel", *(pytest.param(s, marks=pytest.mark.slow) for s in ("fedavg", "sequential"))]
)
def test_optimizer_state_reset_and_keep(strategy):
    """`reset` begins every round with zero moments; `keep` gives each client its own back."""
    trained = lambda mode: run(tiny(strategy, client_optimizer_state=mode, local_steps=1), rounds=2)[0]  # noqa: E731
    reset, average, keep = map(trained, ("reset", "average", "keep"))
    assert reset.opt.client == ()
    differs = lambda a, b: not np.allclose(a.model.client["head"]["bias"], b.model.client["head"]["bias"], atol=1e-6)  # noqa: E731
    assert differs(reset, average)
    moments = keep.opt.client[0].mu["head"]["bias"]
    assert moments.shape[0] == 3
    assert not np.allclose(moments[0], moments[1])
    assert differs(keep, average)


@pytest.mark.parametrize("strategy", ["parallel", "fedavg", "sequential"])
def test_a_reset_optimizer_begins_with_moments_of_zero(strategy):
    """A second round with `reset` is one of handed-on moments, begun with none; in turns, each turn begins so."""
    federated = dict(strategy=strategy, local_steps=1)
    first = run(tiny(**federated, client_optimizer_state="reset"))[0]
    second = run(tiny(**federated, client_optimizer_state="reset"), rounds=2)[0]
    setting, _, _, round = program(tiny(**federated))
    fresh, data = setting.init_opt(first.model), cohort(setting.config, round=1, seed=1)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(fresh))
    if strategy == "sequential":
        model, opt = first.model, first.opt
        for n in range(3):
            model, opt = by_hand(setting, model, opt._replace(client=fresh.client), data.rows[:, n], n, 1, 3 + n)
    else:
        server = fresh.server if strategy == "fedavg" else first.opt.server
        model = round(first._replace(opt=first.opt._replace(client=fresh.client, server=server)), data)[0].model
    assert_trees_close(second.model, model)


@pytest.mark.parametrize(
    "aggregator", [dict(name="sgd", learning_rate=0.5), dict(momentum=0.9), dict(name="adam", learning_rate=0.01)], ids=str
)
def test_outer_update_against_its_formula(aggregator):
    """FedAvg at half rate, FedAvgM and FedAdam, two rounds, against the formulas in numpy."""
    plain = tiny(sgd=True, local_steps=1)
    config = dataclasses.replace(plain, aggregator=dataclasses.replace(plain.aggregator, **aggregator))
    one, (_, _, state, other) = program(plain)[3], program(config)
    m = v = 0.0
    for n in range(2):
        data = cohort(config, round=n, seed=n)
        x = np.asarray(state.model.client["head"]["dense"]["kernel"])
        average = one(state._replace(averaging=Averaging()), data)[0].model.client["head"]["dense"]["kernel"]
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
    [("parallel", "pooled", None), ("parallel", "private", None), ("fedavg", "pooled", 2)],
)
def test_an_outer_adam_leaves_alone_what_nobody_trains(strategy, body, at_once):
    """Averaging copies of positions beyond the blocks' length must not change them: Adam would scale a difference up."""
    config = tiny_config(
        federated=dict(strategy=strategy, body=body, num_clients=4, clients_at_once=at_once, local_steps=1),
        aggregator=dict(name="adam", learning_rate=0.01),
        client_optimizer=dict(weight_decay=0.0),
    )
    states = program(config)[2], run(config, rounds=2, clients=4, weights=[0.4, 0.1, 0.3, 0.2])[0]
    before, after = (state.model.client["embeddings"]["position"]["embedding"] for state in states)
    length = config.data.seq_len
    assert jnp.array_equal(after[length:], before[length:])
    assert not np.any(np.all(after[:length] == before[:length], axis=1))


def test_schedules_count_global_steps():
    """A client's fresh optimizer state (reset) doesn't set the learning rate back."""
    opt = dict(name="sgd", learning_rate=1.0, warmup_steps=0, schedule="linear", decay_steps=4, clip_norm=None, eps=None)
    config = tiny_config(
        federated=dict(local_steps=2, client_optimizer_state="reset"),
        client_optimizer=opt,
        server_optimizer=opt,
    )
    _, _, state, round = program(config)
    moved, _ = round(state, cohort(config, round=0))
    stays, _ = round(state, cohort(config, round=2))
    assert_trees_close(stays.model, state.model)
    assert not np.allclose(moved.model.client["head"]["bias"], state.model.client["head"]["bias"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, codec",
    [
        (dict(), "float32"),
        (dict(body="merged", local_steps=1), "float32"),
        (dict(strategy="fedavg", client_optimizer_state="reset", local_steps=1), "float32"),
        (dict(average="gradients", local_steps=1), "float32"),
        (dict(average="gradients", local_steps=1), "int8"),
    ],
    ids=str,
)
def test_a_cohort_in_slices_is_the_cohort_at_once(kind, codec):
    """Five clients, two (or one) at a time, padded to six by one of weight 0, with the momentum of an outer update.

    Under int8 a number that lies between two may be rounded to the other one: for each client, few do.
    """
    ends = []
    outer = {} if "average" in kind else dict(momentum=0.9)
    for at_once in (None, 1 if "strategy" in kind else 2):
        config = tiny_config(
            federated=dict(num_clients=6, clients_at_once=at_once, **kind),
            model=dict(hidden_dropout=0.1),
            aggregator=outer,
            wire=dict(gradient_codec=codec) if codec == "int8" else {},
        )
        ends.append(run(config, rounds=2, clients=6, weights=[0.1, 0.3, 0.2, 0.15, 0.25, 0.0]))
    if codec == "float32":
        return assert_trees_close(ends[1], ends[0], atol=3e-6)
    (sliced, _), (whole, _) = ends
    assert_trees_close(sliced.model, whole.model, atol=2e-3)
    for a, b in zip(jax.tree.leaves(sliced.averaging.unsent), jax.tree.leaves(whole.averaging.unsent), strict=True):
        assert np.mean(np.isclose(a, b, rtol=1e-3, atol=1e-6), axis=tuple(range(1, a.ndim))).min() > 0.9


@pytest.mark.parametrize("kind", [dict(average="gradients"), dict(strategy="sequential")], ids=str)
def test_a_short_round_is_a_round_of_fewer_steps(kind):
    """The last round of fine-tuning has fewer steps; its schedules go on from where the previous round ended."""
    models = []
    for local_steps, round in ((4, 1), (1, 4)):
        config = tiny(**kind, local_steps=local_steps)
        setting, _, state, _ = program(config)
        masked = jax.vmap(jax.vmap(lambda b: mask_blocks(jax.random.key(0), b, mask_spec(tiny()))))
        batch = masked(random_blocks(0, 1, 3, 2))
        rule = make(dataclasses.replace(setting, prepare=lambda _, batch: batch))
        models.append(jax.jit(rule.round)(state, Cohort(batch, jnp.arange(3), THREE, jnp.int32(round)))[0].model)
    assert_trees_close(*models)


def test_traffic_counts_messages_and_averaging():
    """Bytes are those of the four messages in every step, and of the segment (and its moments) there and back."""
    config = tiny()
    setting, _, state, _ = program(config)
    traffic = lambda config: round_traffic(make_setting(config), jax.ShapeDtypeStruct((2, 12), jnp.int32))  # noqa: E731
    found = traffic(config)
    f, size, masked = config.federated, config.model.hidden_size, mask_spec(config).num_masked
    steps = f.local_steps * 3 * f.batch_size
    assert found["activations"] == found["input_gradient"] == steps * 12 * size * 4
    assert found["hidden_states"] == found["head_gradient"] == steps * masked * size * 4
    client = sum(x.nbytes for x in jax.tree.leaves(state.model.client))
    assert found["segment"] == found["trained_segment"] == 3 * client
    assert found["segment_optimizer"] == found["trained_segment_optimizer"] == 3 * (2 * client + 4)
    assert "trained_segment_optimizer" not in traffic(tiny(client_optimizer_state="reset"))
    assert traffic(tiny("centralized")) == traffic(tiny("local")) == {}
    assert set(traffic(tiny("fedavg"))) == {
        f"{way}{part}{what}" for way in ("", "trained_") for part in ("segment", "body") for what in ("", "_optimizer")
    }
    # A gradient up and the mean down in each step, and no moments; clients that were away are sent what they missed.
    gradients = traffic(tiny(average="gradients"))
    assert set(gradients) - {"activations", "positions", "hidden_states", "head_gradient", "input_gradient"} == {
        "segment_gradient",
        "mean_gradient",
    }
    assert gradients["segment_gradient"] == gradients["mean_gradient"] == f.local_steps * 3 * client
    away = traffic(tiny(average="gradients", clients_per_round=2))
    assert away["segment"] == 2 * client and away["segment_optimizer"] == 2 * (2 * client + 4)
    coded = tiny_config(federated=dict(average="gradients"), wire=dict(gradient_codec="int8"))
    rows = sum(x.size // x.shape[-1] for x in jax.tree.leaves(state.model.client))
    assert traffic(coded)["segment_gradient"] == f.local_steps * 3 * (client // 4 + 4 * rows)
    assert traffic(coded)["mean_gradient"] == f.local_steps * 3 * client // 2
    assert setting.how.averages


@pytest.mark.parametrize("wire", [dict(gradient_clip=0.001), dict(gradient_noise=0.05)], ids=str)
def test_what_a_client_does_to_its_own_gradient_is_the_same_however_gradients_are_averaged(wire):
    """Its weight is applied afterwards: pooled, in bfloat16, and as one step of averaged parameters."""
    norms = []
    gradients = dict(average="gradients")
    for federated, codec in ((gradients, "float32"), (gradients, "bfloat16"), ({}, "float32")):
        config = tiny_config(
            federated=dict(local_steps=1, **federated),
            wire=dict(gradient_codec=codec, **wire),
            client_optimizer=SGD,
            server_optimizer=SGD,
        )
        _, _, state, round = program(config)
        norms.append(float(round(state, cohort(config))[1].server_norm))
    np.testing.assert_allclose(norms, norms[0], rtol=1e-5)
    plain = run(tiny(sgd=True, local_steps=1))[1].server_norm
    assert abs(norms[0] - plain) > 0.1 * plain


def test_what_int8_has_yet_to_send_is_kept_by_client():
    """For a cohort of some clients in any order, padded by one that takes part anyway, and for absent clients."""
    config = tiny_config(
        federated=dict(average="gradients", num_clients=5, clients_per_round=3),
        wire=dict(gradient_codec="int8"),
    )
    _, _, state, round = program(config)
    lost = jax.tree.map(lambda x: x + 1e-4 * (1 + jnp.arange(5.0)).reshape(-1, *(1,) * (x.ndim - 1)), state.averaging)
    state = state._replace(averaging=lost)
    data = cohort(config)._replace(clients=jnp.array([4, 1, 2]))
    first, _ = round(state, data)
    padded = Cohort(
        jnp.concatenate([data.rows, data.rows[:, :1]], axis=1),
        jnp.array([4, 1, 2, 4]),
        jnp.append(data.weights, 0.0),
        data.round,
    )
    again, _ = round(state, padded)
    assert_trees_close(again, first)
    bias = lambda s: np.asarray(s.averaging.unsent["head"]["dense"]["kernel"])  # noqa: E731
    for c in range(5):
        assert np.array_equal(bias(first)[c], bias(state)[c]) == (c in (0, 3))
    # A client adds what it has itself yet to send: with another client's, the error would be as large as their difference.
    shuffled = Cohort(data.rows[:, ::-1], data.clients[::-1], data.weights[::-1], data.round)
    assert_trees_close(round(state, shuffled)[0].averaging, first.averaging, atol=2e-6)


def test_the_mean_gradient_comes_back_in_bfloat16():
    """SGD shows it: the segment moves by numbers that bfloat16 can hold, the body by others."""
    opt = SGD | dict(learning_rate=1.0)
    config = tiny_config(
        federated=dict(average="gradients", local_steps=1),
        wire=dict(gradient_codec="int8"),
        client_optimizer=opt,
        server_optimizer=opt,
    )
    setting, _, state, _ = program(config)
    seen = {}

    def spy(name: str, tx):
        return tx._replace(update=lambda grads, *rest: seen.update({name: grads}) or tx.update(grads, *rest))

    txs = dict(client_tx=spy("client", setting.client_tx), server_tx=spy("server", setting.server_tx))
    spied = dataclasses.replace(setting, **txs)

    @jax.jit
    def round(state, data):
        make(spied).round(state, data)
        return seen

    with pytest.MonkeyPatch.context() as patch:  # a loop of one step in plain Python, so that what it sees can be returned
        patch.setattr(
            jax.lax,
            "scan",
            lambda f, init, xs: (lambda end: (end[0], jax.tree.map(lambda x: x[None], end[1])))(
                f(init, jax.tree.map(lambda x: x[0], xs))
            ),
        )
        seen = round(state, cohort(config))
    exact = lambda tree: all(  # noqa: E731
        jnp.array_equal(x, x.astype(jnp.bfloat16).astype(jnp.float32)) for x in jax.tree.leaves(tree)
    )
    assert exact(seen["client"]) and not exact(seen["server"])


def test_traffic_of_each_row_by_what_travels():
    """Segments handed on in turn, kept optimizers, bodies that stay on the server, and clients that missed a round."""
    traffic = lambda **federated: set(  # noqa: E731
        round_traffic(make_setting(tiny(**federated)), jax.ShapeDtypeStruct((2, 12), jnp.int32))
    )
    step = {"activations", "positions", "hidden_states", "head_gradient", "input_gradient"}
    both, moments = {"segment", "trained_segment"}, {"segment_optimizer", "trained_segment_optimizer"}
    assert traffic(strategy="sequential") == step | both | moments
    assert traffic(client_optimizer_state="keep") == step | both
    assert traffic(body="merged") == step | both | moments == traffic(body="private")
    assert traffic(average="gradients", clients_per_round=2) == step | {
        "segment_gradient",
        "mean_gradient",
        "segment",
        "segment_optimizer",
    }


def test_bytes_of_an_average_in_fixed_point_are_those_of_its_payload():
    """An integer for each number, and for each tensor the 4 bytes that say whether all its numbers are finite."""
    federated, privacy = dict(client_optimizer_state="reset"), dict(averaging="blinded")
    traffic = lambda config: round_traffic(make_setting(config), jax.ShapeDtypeStruct((2, 12), jnp.int32))  # noqa: E731
    config = tiny_config(federated=federated, privacy=privacy)
    found, leaves = traffic(config), jax.tree.leaves(program(config)[2].model.client)
    client = sum(x.nbytes for x in leaves)
    assert found["padded"] == found["padded_sum"] == 3 * (client + 4 * len(leaves))
    assert not {"segment", "trained_segment"} & set(found)  # the segment follows from the sum
    away = traffic(tiny_config(federated=federated | dict(clients_per_round=2), privacy=privacy))
    assert away["segment"] == 2 * client and away["padded"] == 2 * (client + 4 * len(leaves))
    gradients = traffic(tiny_config(federated=dict(average="gradients"), privacy=privacy))
    assert gradients["padded"] == gradients["padded_sum"] == config.federated.local_steps * found["padded"]
    assert not {"segment_gradient", "mean_gradient"} & set(gradients)


def test_optimizer_states_of_bodies_that_are_copies_go_by_the_same_setting():
    def merged(mode):
        config = tiny(body="merged", client_optimizer_state=mode)
        _, strategy, state = make_strategy(config)
        return jax.eval_shape(strategy.round, state, cohort(config))[0]

    states = {mode: merged(mode) for mode in ("average", "reset", "keep")}
    assert states["reset"].opt.server == () and states["average"].opt.server[0].mu["layers"]["up"]["bias"].ndim == 2
    assert states["keep"].opt.server[0].mu["layers"]["up"]["bias"].shape[0] == 3


def test_attention_dropout_alone_has_keys():
    setting = make_setting(tiny(model=dict(attention_dropout=0.1)))
    _, keys = setting.draw(random_blocks(0, 3, 2), 0, 0, jnp.arange(3))
    assert keys.client is not None and keys.server is not None and keys.noise is None

"""What every client draws in every step of every strategy, which moments it gets, and which weight its numbers have.

The strategies run on segments that compute nothing: their gradients are the values that reached them (tokens, positions,
keys), and the optimizer records each step's gradient at the global step it was given. The loss is the labels asked for plus
the noise on the activations at their positions. tests/draws.py draws the values that should have reached them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import LENGTH, VOCAB, make_setting, mask_spec, random_blocks, tiny_config

from fedbert_jax.config import WireConfig
from fedbert_jax.data.masking import MaskedBatch, MaskSpec, mask_blocks
from fedbert_jax.data.streams import Seeds, secrets
from fedbert_jax.federated import setting as setting_lib
from fedbert_jax.federated.evaluation import EvalSet
from fedbert_jax.federated.evaluation import masked as masked_for_scoring
from fedbert_jax.federated.optim import Optimizer
from fedbert_jax.federated.rounds import make_strategy
from fedbert_jax.federated.setting import Setting
from fedbert_jax.federated.state import Cohort, State, Strategy
from fedbert_jax.models.bert import Segments

SEEDS = Seeds(server=11, client=12)  # in a run they are one number
K, B, M = 2, 2, 4  # B * M is a power of two, so that dividing by it loses nothing
STEPS = 16  # global steps that are recorded
CUT = ("parallel", "sequential")  # strategies whose clients send anything
DEVIATION = 0.5  # of the noise that they add to their activations


@pytest.fixture(autouse=True)
def seeds(monkeypatch):
    monkeypatch.setattr(setting_lib, "seeds_of", lambda config: Seeds(config.seed, SEEDS.client))


def words(keys: jax.Array) -> jax.Array:
    """The numbers of keys [G] in a form that float32 can hold, [G, 4]."""
    data = jax.random.key_data(keys)
    return jnp.concatenate([data >> 16, data & 0xFFFF], axis=-1).astype(jnp.float32)


def recorder(config: Any) -> Segments:
    """Segments whose loss is linear: the gradient of each parameter is the value that its name says.

    Rows come in G groups, each with a key: several clients' rows as one batch, at the body or pooled as one client's.
    """

    def groups(x: jax.Array) -> jax.Array:
        return x.astype(jnp.float32).reshape(-1, B, *x.shape[1:])

    def seen(param: jax.Array, shown: jax.Array, key: jax.Array, keys: jax.Array) -> jax.Array:
        """G groups [G, B, ...] times a parameter [B, ...], plus their keys times another, for each row: [G * B, 1]."""
        return jnp.repeat(jnp.sum(param[None] * shown, (1, 2)) + jnp.sum(key[None] * words(keys), 1), B)[:, None]

    def init(client_key: jax.Array, server_key: jax.Array) -> tuple[Any, Any]:
        client = {"tokens": jnp.zeros((B, LENGTH)), "labels": jnp.zeros((B, M)), "embed_key": jnp.zeros(4)}
        return client | {"head_key": jnp.zeros(4)}, {"positions": jnp.zeros((B, M)), "body_key": jnp.zeros(4)}

    def embed(params: Any, batch: MaskedBatch, keys: jax.Array) -> jax.Array:
        h = seen(params["tokens"], groups(batch.tokens), params["embed_key"], keys)
        return jnp.broadcast_to(h[..., None], (*batch.tokens.shape, 1))

    def transform(params: Any, h: jax.Array, positions: jax.Array, lengths: None, keys: jax.Array) -> jax.Array:
        z = jnp.take_along_axis(h, positions[..., None].astype(jnp.int32), 1)  # [G * B, M, 1]
        return z + seen(params["positions"], groups(positions), params["body_key"], keys)[..., None]

    def loss(params: Any, z: jax.Array, batch: MaskedBatch, keys: jax.Array) -> jax.Array:
        here = seen(params["labels"], groups(batch.labels), params["head_key"], keys)
        return jnp.sum((z[..., 0] + here + batch.labels) * batch.weights) / jnp.sum(batch.weights)

    return Segments(config.model, jnp.dtype(jnp.float32), init, embed, transform, loss, loss)


def update(grads: Any, state: Any, params: Any, step: jax.Array) -> tuple[Any, Any, jax.Array]:
    state = jax.tree.map(lambda seen, g: seen.at[step].set(g), state, grads)
    return params, state, jnp.max(grads.get("labels", grads.get("positions")))


WRITES = Optimizer(lambda params: jax.tree.map(lambda p: jnp.zeros((STEPS, *p.shape)), params), update, lambda n: n)


def record(name: str, clients: int = 3, **federated: Any) -> tuple[Setting, Strategy, State]:
    """A strategy (`parallel` may be followed by the body's name or `gradients`) on segments that compute nothing."""
    strategy, _, kind = name.partition(" ")
    federated |= dict(average=kind) if kind == "gradients" else dict(body=kind or "pooled")
    config = tiny_config(
        seed=SEEDS.server,
        model=dict(hidden_dropout=0.1),
        mlm=dict(mask_prob=M / LENGTH),
        wire=dict(noise=DEVIATION) if strategy in CUT else {},
        federated=dict(strategy=strategy, num_clients=clients, local_steps=K, batch_size=B, **federated),
    )
    setting = dataclasses.replace(make_setting(config), segments=recorder(config), client_tx=WRITES, server_tx=WRITES)
    rule = make_strategy(setting)
    return setting, rule, rule.init(setting.fresh())


def cohort(round: int, ids: Any, weights: Any) -> Cohort:
    blocks = random_blocks(round, K, len(ids), B)
    return Cohort(blocks, jnp.asarray(ids), jnp.asarray(weights, jnp.float32), jnp.int32(round))


@jax.jit
def masked(key: jax.Array, blocks: jax.Array) -> MaskedBatch:
    return mask_blocks(key, blocks, MaskSpec(M, VOCAB, 4, (0, 1, 2, 3, 4), None))


@jax.jit
def noise(key: jax.Array) -> jax.Array:
    """The noise that a client adds to its activations [B, T, 1], the first of the messages to which it adds any."""
    return DEVIATION * jax.random.normal(jax.random.fold_in(key, 0), (B, LENGTH))


def place(given: Cohort, n: int, k: int) -> tuple[int, int, int]:
    """Round, step and client, of which every draw is a function."""
    return int(given.round), k, int(given.clients[n])


def expected(given: Cohort, n: int, k: int, seeds: Seeds = SEEDS) -> tuple[dict[str, Any], dict[str, Any]]:
    """The values that should reach the segments of the client at place `n` of the cohort in step `k`."""
    draw = place(given, n, k)
    batch = masked(draws.key("client", seeds.client, draws.MASK, *draw), given.rows[k, n])
    own = draws.key("client", seeds.client, draws.SEGMENT_DROPOUT, *draw)
    body = draws.key("server", seeds.server, draws.BODY_DROPOUT, *draw)
    number = lambda key: words(key[None])[0]  # noqa: E731
    client = {
        "tokens": batch.tokens,
        "embed_key": number(jax.random.fold_in(own, 0)),
        "head_key": number(jax.random.fold_in(own, 1)),
        "labels": batch.labels,
    }
    return client, {"positions": batch.positions, "body_key": number(body)}


def expected_loss(strategy: str, given: Cohort, n: int, k: int) -> float:
    """The mean label of that client and step, plus the noise at the positions asked for."""
    client, server = expected(given, n, k)
    if strategy.split()[0] not in CUT:
        return float(np.mean(client["labels"]))
    heard = np.asarray(noise(draws.key("client", SEEDS.client, draws.NOISE, *place(given, n, k))))
    return float(np.mean(client["labels"] + np.take_along_axis(heard, np.asarray(server["positions"]), 1)))


def assert_seen(seen: Any, step: int, wanted: Any) -> None:
    for name, value in wanted.items():
        np.testing.assert_array_equal(seen[name][step], value, err_msg=f"{name}, step {step}")


def of_client(tree: Any, n: int) -> Any:
    return jax.tree.map(lambda x: x[n], tree)


@pytest.mark.parametrize(
    "strategy, ids",
    [
        ("parallel", [4, 1, 7]),
        ("parallel gradients", [4, 1, 7]),
        ("parallel merged", [4, 1, 7]),
        ("parallel private", [0, 1, 2]),
        ("sequential", [4, 1, 7]),
        ("centralized", [0]),
        ("local", [0, 1, 2]),
        ("fedavg", [4, 1, 7]),
    ],
)
def test_what_a_client_draws_and_what_its_numbers_weigh(strategy, ids):
    """Masks, both sides' dropout and noise depend on the round, the step and the client; metrics are weighted means."""
    _, rule, state = record(strategy)
    round, drawn, count = jax.jit(rule.round), [], len(ids)
    for number in (0, 1):
        for n in range(count):
            given = cohort(number, ids, np.eye(count)[n])  # so that averages are this client's own numbers
            ended, metrics = round(state, given)
            opt, losses = ended.opt, [expected_loss(strategy, given, n, k) for k in range(K)]
            np.testing.assert_allclose(metrics.loss, np.mean(losses), rtol=1e-6)
            # State that each client has of its own has an axis of clients before that of the steps.
            client, server = (of_client(o, n) if jax.tree.leaves(o)[0].shape[0] != STEPS else o for o in opt)
            for k in range(K):
                at = (number * count + n if strategy == "sequential" else number) * K + k
                wanted = expected(given, n, k)
                assert_seen(client, at, wanted[0])
                assert_seen(server, at, wanted[1])
                drawn += [np.asarray(key[at]) for key in (client["embed_key"], client["head_key"], server["body_key"])]
    assert len(np.unique(drawn, axis=0)) == len(drawn) == 2 * count * K * 3

    # The loss here is the mean label, and a norm is the largest label or position.
    weights = [0.5, 0.2, 0.3] if count == 3 else [1.0]
    given = cohort(0, ids, weights)
    ended, metrics = round(state, given)
    losses = [np.mean([expected_loss(strategy, given, n, k) for k in range(K)]) for n in range(count)]
    np.testing.assert_allclose(metrics.loss, np.dot(weights, losses), rtol=1e-6)
    seen = [[expected(given, n, k) for k in range(K)] for n in range(count)]
    for side, name, found, one in (
        (0, "labels", metrics.client_norm, strategy == "parallel gradients"),
        (1, "positions", metrics.server_norm, strategy in ("parallel", "parallel gradients")),
    ):
        if one:  # a single copy takes one step, with the weighted mean of all gradients
            means = [sum(w * of[k][side][name] for w, of in zip(weights, seen, strict=True)) for k in range(K)]
            np.testing.assert_allclose(found, np.mean([mean.max() for mean in means]), rtol=1e-6)
            np.testing.assert_allclose(ended.opt[side][name][:K], means, rtol=1e-6)
        else:
            largest = [np.mean([step[side][name].max() for step in steps]) for steps in seen]
            np.testing.assert_allclose(found, np.dot(weights, largest), rtol=1e-6)


def test_draws_are_the_secrets_own():
    """If several seeds are trained side by side, each has its own draws; each party's draws follow from its own seed."""
    setting, _, _ = record("parallel")
    given = cohort(3, [5], [1.0])
    at = (given.rows[1], jnp.int32(3), jnp.int32(1), jnp.array([5]))
    with_secrets = jax.jit(lambda of: jax.tree.map(lambda x: x[0], dataclasses.replace(setting, secrets=of).draw(*at)))
    draw = lambda server, client: with_secrets(secrets(Seeds(server, client)))  # noqa: E731
    client, server = expected(given, 0, 1, Seeds(9, 4))
    batch, keys = draw(9, 4)
    np.testing.assert_array_equal(batch.tokens, client["tokens"])
    np.testing.assert_array_equal(words(jax.random.fold_in(keys.client, 1)[None])[0], client["head_key"])
    np.testing.assert_array_equal(words(keys.server[None])[0], server["body_key"])
    other = draw(4, 9)[1]
    assert not np.array_equal(words(other.server[None])[0], server["body_key"])


def test_noise_is_of_the_round_the_step_and_the_client_by_the_clients_secret():
    """Each client has its own key in each step, independent of the server's seed; without noise there is none."""
    setting, _, _ = record("parallel")
    ids, blocks = jnp.array([4, 1, 7]), random_blocks(0, 3, B)
    draw = jax.jit(lambda of, round, step: dataclasses.replace(setting, secrets=of).draw(blocks, round, step, ids)[1])
    found = {}
    for seeds in (SEEDS, Seeds(SEEDS.server + 1, SEEDS.client), Seeds(SEEDS.server, SEEDS.client + 1)):
        for at in ((0, 0), (0, 1), (1, 0), (2, 7)):
            drawn = draw(secrets(seeds), *map(jnp.int32, at)).noise
            for key, client in zip(drawn, ids.tolist(), strict=True):
                wanted = draws.key("client", seeds.client, draws.NOISE, *at, client)
                found[seeds.client, *at, client] = tuple(words(key[None])[0].tolist())
                np.testing.assert_array_equal(jax.random.key_data(key), jax.random.key_data(wanted))
    assert len(set(found.values())) == len(found) == 2 * 4 * 3
    for wire, noisy in (({}, False), (dict(noise=0.1), True), (dict(gradient_noise=0.1), True)):
        config = dataclasses.replace(setting.config, wire=WireConfig(**wire))
        quiet = dataclasses.replace(setting, config=config)
        keys = jax.eval_shape(lambda quiet=quiet: quiet.draw(blocks, jnp.int32(0), jnp.int32(0), ids)[1])
        assert (keys.noise is not None) == noisy


def test_held_out_text_is_masked_by_its_client_and_block():
    """Rows of a batch, batches of a client, and clients each have masks of their own, at every evaluation."""
    spec, blocks, numbers = mask_spec(tiny_config()), random_blocks(0, 6, 2), [[0, 1], [2, 3], [4, 5]] * 2
    batches = EvalSet(blocks, jnp.ones((6, 2)), jnp.array(numbers), jnp.array([0, 0, 0, 5, 5, 5]))
    hidden = jax.jit(lambda key, blocks: mask_blocks(key, blocks, spec, hide_all=True))
    masks = jax.jit(jax.vmap(lambda batch: masked_for_scoring(secrets(SEEDS), batch, spec)))(batches)
    for n, client in enumerate([0, 0, 0, 5, 5, 5]):
        for row, number in enumerate(numbers[n]):
            key = draws.key("client", SEEDS.client, draws.EVAL_MASK, client, number)
            wanted = hidden(key, blocks[n, row][None])
            for found, value in zip(masks[:4], wanted[:4], strict=True):
                np.testing.assert_array_equal(found[n, row], value[0])
    assert len(np.unique(masks.positions.reshape(12, -1), axis=0)) > 8


@pytest.mark.parametrize("strategy", ["parallel", "parallel merged", "parallel private", "sequential"])
def test_kept_moments_are_each_clients_own(strategy):
    """After two rounds, a client's moments come from its own two rounds, and nothing in them is another client's."""
    # Clients that take turns may be only some of all clients; in the other strategies, all take part.
    rounds = [[3, 0, 4], [0, 1, 3]] if strategy == "sequential" else [[0, 1, 2, 3, 4]] * 2
    setting, _, state = record(strategy, clients=5, client_optimizer_state="keep")
    rule = make_strategy(dataclasses.replace(setting, cohort=len(rounds[0])))
    wanted: list[dict[int, Any]] = [{} for _ in range(5)]  # by client, then by global step
    step = jax.jit(rule.round)
    for round, ids in enumerate(rounds):
        given = cohort(round, ids, np.full(len(ids), 1 / len(ids)))
        state, _ = step(state, given)
        for n, c in enumerate(ids):
            for k in range(K):
                at = (round * len(ids) + n if strategy == "sequential" else round) * K + k
                wanted[c][at] = expected(given, n, k)[0]
    for c in range(5):
        seen = of_client(state.opt.client, c)
        for at in range(STEPS):
            assert_seen(seen, at, wanted[c].get(at) or jax.tree.map(lambda x, at=at: 0 * x[at], seen))
    if strategy == "parallel private":
        bodies = state.opt.server["body_key"][:, : 2 * K]
        assert len(np.unique(bodies.reshape(-1, 4), axis=0)) == 5 * 2 * K

"""What every client draws in every step of every strategy, whose moments it gets, and whose weight its numbers have.

The strategies run on segments that compute nothing: their gradients are what reached them (tokens, positions, keys), and the
optimizer writes each step's gradient down at the global step it was given. What should have reached them is drawn by
tests/draws.py.
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

from fedbert_jax.data.masking import MaskedBatch, MaskSpec, mask_blocks
from fedbert_jax.federated import setting as setting_lib
from fedbert_jax.federated.evaluation import EvalSet
from fedbert_jax.federated.evaluation import masked as masked_for_scoring
from fedbert_jax.federated.setting import RoundInputs, Setting, State, Strategy
from fedbert_jax.federated.strategies import STRATEGIES
from fedbert_jax.models.bert import Segments
from fedbert_jax.optim import Optimizer
from fedbert_jax.streams import Seeds, secrets

SEEDS = Seeds(server=11, client=12)  # in a run they are one number
K, B, M = 2, 2, 4  # B * M is a power of two, so that dividing by it loses nothing
STEPS = 16  # global steps that are written down


@pytest.fixture(autouse=True)
def seeds(monkeypatch):
    monkeypatch.setattr(setting_lib, "seeds_of", lambda config: Seeds(config.seed, SEEDS.client))


def words(keys: jax.Array | None) -> jax.Array:
    """The numbers of keys [G] as float32 can hold them, [G, 4]; where traffic is reckoned there are none."""
    if keys is None:
        return jnp.zeros((1, 4))
    data = jax.random.key_data(keys)
    return jnp.concatenate([data >> 16, data & 0xFFFF], axis=-1).astype(jnp.float32)


def recorder(config: Any) -> Segments:
    """Segments whose loss is linear: the gradient of each parameter is what its name says."""

    def init(client_key: jax.Array, server_key: jax.Array) -> tuple[Any, Any]:
        client = {"tokens": jnp.zeros((B, LENGTH)), "labels": jnp.zeros((B, M)), "embed_key": jnp.zeros(4)}
        return client | {"head_key": jnp.zeros(4)}, {"positions": jnp.zeros((B, M)), "body_key": jnp.zeros(4)}

    def embed(params: Any, tokens: jax.Array, keys: jax.Array, token_types: None) -> jax.Array:
        seen = jnp.sum(params["tokens"] * tokens) + jnp.sum(params["embed_key"] * words(keys)[0])
        return jnp.broadcast_to(seen, (*tokens.shape, 1))

    def transform(params: Any, h: jax.Array, keys: jax.Array, mask: None, positions: jax.Array) -> jax.Array:
        at = positions.astype(jnp.float32).reshape(-1, B, M)  # [G, B, M]: one group a client
        seen = jnp.sum(params["positions"][None] * at, (1, 2)) + jnp.sum(params["body_key"][None] * words(keys), 1)
        z = jnp.take_along_axis(h, positions[..., None].astype(jnp.int32), 1)  # [G * B, M, 1]
        return z + jnp.repeat(seen, B)[:, None, None]

    def loss(params: Any, z: jax.Array, labels: jax.Array, weights: jax.Array, keys: jax.Array) -> jax.Array:
        seen = jnp.sum(params["labels"] * labels) + jnp.sum(params["head_key"] * words(keys)[0])
        return jnp.mean(z) + seen + jnp.mean(labels.astype(jnp.float32))

    return Segments(config.model, init, embed, transform, loss, loss)


def update(grads: Any, state: Any, params: Any, step: jax.Array) -> tuple[Any, Any, jax.Array]:
    state = jax.tree.map(lambda seen, g: seen.at[step].set(g), state, grads)
    return params, state, jnp.max(grads.get("labels", grads.get("positions")))


WRITES = Optimizer(lambda params: jax.tree.map(lambda p: jnp.zeros((STEPS, *p.shape)), params), update, lambda n: n)


def record(name: str, clients: int = 3, **federated: Any) -> tuple[Setting, Strategy, State]:
    """A strategy (of `parallel` with the body's name) on segments that compute nothing."""
    strategy, _, body = name.partition(" ")
    config = tiny_config(
        seed=SEEDS.server, model=dict(hidden_dropout=0.1), mlm=dict(mask_prob=M / LENGTH),
        federated=dict(
            strategy=strategy, body=body or "pooled", num_clients=clients, local_steps=K, batch_size=B, **federated
        ),
    )  # fmt: skip
    setting = dataclasses.replace(make_setting(config), segments=recorder(config), client_tx=WRITES, server_tx=WRITES)
    rule = STRATEGIES[strategy](setting)
    return setting, rule, rule.init(setting.fresh())


def inputs(round: int, ids: Any, weights: Any) -> RoundInputs:
    blocks = random_blocks(round, K, len(ids), B)
    return RoundInputs(blocks, jnp.asarray(ids), jnp.asarray(weights, jnp.float32), jnp.int32(round))


@jax.jit
def masked(key: jax.Array, blocks: jax.Array) -> MaskedBatch:
    return mask_blocks(key, blocks, MaskSpec(M, VOCAB, 4, (0, 1, 2, 3, 4), None))


def expected(given: RoundInputs, n: int, k: int, seeds: Seeds = SEEDS) -> tuple[dict[str, Any], dict[str, Any]]:
    """What should reach the segments of the client at place `n` of the cohort in step `k`."""
    draw = (int(given.round), k, int(given.client_ids[n]))
    batch = masked(draws.key("client", seeds.client, draws.MASK, *draw), given.tokens[k, n])
    own = draws.key("client", seeds.client, draws.SEGMENT_DROPOUT, *draw)
    body = draws.key("server", seeds.server, draws.BODY_DROPOUT, *draw)
    number = lambda key: words(key[None])[0]  # noqa: E731
    client = {"tokens": batch.tokens, "embed_key": number(jax.random.fold_in(own, 0)),
              "head_key": number(jax.random.fold_in(own, 1)), "labels": batch.labels}  # fmt: skip
    return client, {"positions": batch.positions, "body_key": number(body)}


def assert_seen(seen: Any, step: int, wanted: Any) -> None:
    for name, value in wanted.items():
        np.testing.assert_array_equal(seen[name][step], value, err_msg=f"{name}, step {step}")


def of_client(tree: Any, n: int) -> Any:
    return jax.tree.map(lambda x: x[n], tree)


@pytest.mark.parametrize(
    "strategy, ids",
    [("parallel", [4, 1, 7]), ("parallel merged", [4, 1, 7]), ("parallel private", [0, 1, 2]), ("sequential", [4, 1, 7]),
     ("centralized", [0]), ("local", [0, 1, 2]), ("fedavg", [4, 1, 7])],
)  # fmt: skip
def test_what_a_client_draws_and_what_its_numbers_weigh(strategy, ids):
    """Masks and dropout of both sides are of the round, the step and the client; a round's metrics are means by weight."""
    _, rule, state = record(strategy)
    round, drawn, count = jax.jit(rule.round), [], len(ids)
    for number in (0, 1):
        for n in range(count):
            given = inputs(number, ids, np.eye(count)[n])  # so that averages are this client's own numbers
            opt = round(state, given)[0].opt
            # What each client has of its own has an axis of clients before that of the steps.
            client, server = (of_client(o, n) if jax.tree.leaves(o)[0].shape[0] != STEPS else o for o in opt)
            for k in range(K):
                at = (number * count + n if strategy == "sequential" else number) * K + k
                wanted = expected(given, n, k)
                assert_seen(client, at, wanted[0])
                assert_seen(server, at, wanted[1])
                drawn += [np.asarray(key[at]) for key in (client["embed_key"], client["head_key"], server["body_key"])]
    assert len(np.unique(drawn, axis=0)) == len(drawn) == 2 * count * K * 3

    # The loss here is the mean label, and a norm the largest label or position.
    weights = [0.5, 0.2, 0.3] if count == 3 else [1.0]
    given = inputs(0, ids, weights)
    metrics = round(state, given)[1]
    seen = [[expected(given, n, k) for k in range(K)] for n in range(count)]
    by_weight = lambda of: sum(w * np.mean([of(*step) for step in steps]) for w, steps in zip(weights, seen, strict=True))  # noqa: E731
    np.testing.assert_allclose(metrics.loss, by_weight(lambda client, _: np.mean(client["labels"])), rtol=1e-6)
    np.testing.assert_allclose(metrics.client_norm, by_weight(lambda client, _: np.max(client["labels"])), rtol=1e-6)
    if strategy == "parallel":  # the one body takes one step, with the weighted mean of what all send
        means = [sum(w * of[k][1]["positions"] for w, of in zip(weights, seen, strict=True)) for k in range(K)]
        np.testing.assert_allclose(metrics.server_norm, np.mean([m.max() for m in means]), rtol=1e-6)
    else:
        np.testing.assert_allclose(metrics.server_norm, by_weight(lambda _, server: np.max(server["positions"])), rtol=1e-6)


def test_draws_are_the_secrets_own():
    """Where seeds are trained side by side, each has its own draws; each party's follow from its own number."""
    setting, _, _ = record("parallel")
    given = inputs(3, [5], [1.0])
    at = (given.tokens[1, 0], jnp.int32(3), jnp.int32(1), jnp.int32(5))
    with_secrets = jax.jit(lambda of: dataclasses.replace(setting, secrets=of).draw(*at))
    draw = lambda server, client: with_secrets(secrets(Seeds(server, client)))  # noqa: E731
    client, server = expected(given, 0, 1, Seeds(9, 4))
    batch, keys = draw(9, 4)
    np.testing.assert_array_equal(batch.tokens, client["tokens"])
    np.testing.assert_array_equal(words(jax.random.fold_in(keys.client, 1)[None])[0], client["head_key"])
    np.testing.assert_array_equal(words(keys.server[None])[0], server["body_key"])
    other = draw(4, 9)[1]
    assert not np.array_equal(words(other.server[None])[0], server["body_key"])


def test_held_out_text_is_masked_by_its_client_and_block():
    """The rows of a batch, the batches of a client, and the clients: each has masks of its own, at every evaluation."""
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
    """After two rounds a client's moments are of its own two rounds, and nothing in them is another's."""
    _, rule, state = record(strategy, clients=5, client_optimizer_state="keep")
    # Those who take turns may be some of all; the others are everybody.
    rounds = [[3, 0, 4], [0, 1, 3]] if strategy == "sequential" else [[0, 1, 2, 3, 4]] * 2
    wanted: list[dict[int, Any]] = [{} for _ in range(5)]  # by client, then by global step
    step = jax.jit(rule.round)
    for round, ids in enumerate(rounds):
        given = inputs(round, ids, np.full(len(ids), 1 / len(ids)))
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

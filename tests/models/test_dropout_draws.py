"""Every dropout of a model has its own draws: in the embedding, in each layer's three places, in the head."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import LENGTH, random_blocks, tiny_config

from fedbert_jax.config import WireConfig
from fedbert_jax.data.masking import MaskedBatch
from fedbert_jax.federated.joined import joined_loss
from fedbert_jax.federated.split import split_step
from fedbert_jax.federated.wire import StepKeys, make_cut
from fedbert_jax.models import layers
from fedbert_jax.models.bert import make_segments

LAYERS, B, HIDDEN, ATTENTION = 3, 2, 0.5, 0.4


def segments(unrolled: bool = True):
    """A classifier, which has every kind of dropout."""
    sizes = dict(num_layers=LAYERS, hidden_dropout=HIDDEN, attention_dropout=ATTENTION, unroll_layers=unrolled)
    return make_segments(tiny_config(model=sizes).model, outputs=2)


@pytest.fixture(scope="module")
def model():
    """Parameters so large that a draw shows in the loss."""
    rng = np.random.default_rng(0)
    fresh = jax.jit(segments().init)(*jax.random.split(jax.random.key(0)))
    return jax.tree.map(lambda x: x + 0.3 * rng.standard_normal(x.shape).astype(np.float32), fresh)


@pytest.fixture(scope="module")
def batch() -> MaskedBatch:
    """Two clients' sequences [2, B, T]. The body computes all positions, so that all layers draw equally much."""
    positions = jnp.broadcast_to(jnp.arange(LENGTH), (2, B, LENGTH))
    return MaskedBatch(random_blocks(0, 2, B), positions, positions % 2, jnp.ones((2, B, LENGTH)))


DRAWS = jax.random.split(jax.random.key(1), (2, 2))
KEYS = StepKeys(client=DRAWS[0], server=DRAWS[1])  # of both sides, [2 clients]


def of_client(tree, n: int):
    return jax.tree.map(lambda x: x[n], tree)


def keys_of(client: int, server: int | None = None) -> StepKeys:
    """A client's keys [1]; the server's may be those of another."""
    return of_client(KEYS, np.array([client]))._replace(server=KEYS.server[np.array([client if server is None else server])])


@pytest.fixture(scope="module")
def step(model):
    """The joined model's compiled loss, and what each call of `dropout` kept, its key and its rate, in order of calls."""
    rates, made, dropout = [], segments(), layers.dropout

    @jax.jit
    def run(model, batch, keys):
        calls = []

        def spy(x, rate, keys):
            rates.append(rate)
            calls.append((jax.random.key_data(keys[0]), dropout(jnp.ones_like(x), rate, keys) > 0))
            return dropout(x, rate, keys)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layers, "dropout", spy)
            return joined_loss(made, *model, batch, keys), calls

    def loss_and_draws(batch, keys):
        loss, calls = jax.device_get(run(model, batch, keys))
        return loss, [(rate, key.tobytes(), kept) for rate, (key, kept) in zip(rates, calls, strict=True)]

    return loss_and_draws


@pytest.fixture(scope="module")
def drawn(step, batch):
    """The loss and the draws of client 0's step."""
    return step(of_client(batch, 0), keys_of(0))


def test_where_there_is_dropout_and_how_much(drawn):
    _, calls = drawn
    assert [rate for rate, *_ in calls] == [HIDDEN, *[ATTENTION, HIDDEN, HIDDEN] * LAYERS, HIDDEN]
    for rate, _, kept in calls:
        assert abs(kept.mean() - (1 - rate)) < 5 * (rate * (1 - rate) / kept.size) ** 0.5


def test_no_two_draws_are_alike(drawn, step, batch):
    """Not two layers', nor attention's and the feed-forward's, nor the embedding's and the head's, nor another step's."""
    calls = drawn[1] + step(of_client(batch, 0), keys_of(1))[1]
    assert len({key for _, key, _ in calls}) == len(calls) == 2 * (2 + 3 * LAYERS)
    alike = [(a, b) for (*_, a), (*_, b) in itertools.combinations(calls, 2) if a.shape == b.shape]
    assert len(alike) > 100
    for a, b in alike:  # by chance both keep a place, or both drop it
        chance = a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean())
        assert abs((a == b).mean() - chance) < 5 * 0.5 / a.size**0.5


def test_each_sides_dropout_follows_from_its_own_key(drawn, step, batch):
    """The embedding's and the head's draws follow from the client's key, the layers' from the server's."""
    own = [True] + [False] * 3 * LAYERS + [True]  # whether a draw is the client's
    for side, keys in (("client", keys_of(1, server=0)), ("server", keys_of(0, server=1))):
        _, calls = step(of_client(batch, 0), keys)
        changed = [not np.array_equal(a, b) for (*_, a), (*_, b) in zip(calls, drawn[1], strict=True)]
        assert changed == [mine == (side == "client") for mine in own]


def test_a_scan_over_layers_draws_what_single_layers_draw(drawn, model, batch):
    scanned = segments(unrolled=False)
    loss = jax.jit(lambda *args: joined_loss(scanned, *args))(*model, of_client(batch, 0), keys_of(0))
    np.testing.assert_allclose(loss, drawn[0], rtol=1e-4)


def test_across_the_cut_the_draws_are_the_same(step, model, batch):
    """This includes the classifier's own dropout, which the masked language model's head doesn't have."""
    cut, weights = make_cut(segments(), WireConfig()), jnp.array([0.5, 0.5])
    across = jax.jit(lambda model: split_step(cut, *model, batch, weights, KEYS, shared_client=True).loss)
    losses = [step(of_client(batch, n), keys_of(n))[0] for n in range(2)]
    np.testing.assert_allclose(across(model), losses, rtol=1e-4)
    assert abs(losses[0] - losses[1]) > 0.01

"""The split step against the joined model's `jax.grad`, and what it hands to the wire (invariants 1 and 9)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import LENGTH, assert_trees_close, mask_spec, random_blocks, tiny_config

from fedbert_jax.config import WireConfig
from fedbert_jax.data.masking import MaskedBatch, mask_blocks
from fedbert_jax.federated import split
from fedbert_jax.federated.split import DropoutKeys, joined_loss
from fedbert_jax.models.bert import make_segments
from fedbert_jax.models.layers import take_positions
from fedbert_jax.models.losses import cross_entropy
from fedbert_jax.wire import message_bytes, traffic

WEIGHTS = jnp.array([0.5, 0.2, 0.3])
split_step = jax.jit(split.split_step, static_argnums=(0, 1), static_argnames="shared_client")
joined_grad = jax.jit(jax.value_and_grad(joined_loss, (1, 2)), static_argnums=0)


@pytest.fixture(scope="module")
def clients(segments):
    """Three clients' own segments [3, ...] and the server's."""
    inits = [segments.init(*jax.random.split(jax.random.key(n))) for n in range(3)]
    return jax.tree.map(lambda *x: jnp.stack(x), *[c for c, _ in inits]), inits[0][1]


def of_client(tree, n):
    return jax.tree.map(lambda x: x[n], tree)


@pytest.mark.parametrize("downlink", ["masked", "all"])
def test_gradients_equal_the_joined_models(segments, batch, clients, downlink):
    client_params, server_params = clients
    out = split_step(segments, WireConfig(downlink=downlink), client_params, server_params, batch, WEIGHTS)

    body = jax.tree.map(jnp.zeros_like, server_params)
    for n in range(3):
        value, (dclient, dserver) = joined_grad(segments, of_client(client_params, n), server_params, of_client(batch, n))
        np.testing.assert_allclose(out.loss[n], value, rtol=1e-6)
        assert_trees_close(of_client(out.client_grads, n), dclient)
        body = jax.tree.map(lambda total, g, n=n: total + WEIGHTS[n] * g, body, dserver)
    assert_trees_close(out.server_grads, body)


def test_gradients_in_float64(batch):
    """The same in double precision: what is left of the difference is not the algebra."""
    with jax.enable_x64(True):
        config = tiny_config()
        segments = make_segments(config.model, jnp.float64)
        as64 = lambda tree: jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), tree)  # noqa: E731
        client, server = as64(segments.init(*jax.random.split(jax.random.key(0))))
        # The wire carries float32; two messages of rounding are all that may be seen.
        out = split_step(segments, WireConfig(), client, server, batch, WEIGHTS, shared_client=True)
        expected = [joined_grad(segments, client, server, of_client(batch, n))[1][1] for n in range(3)]
        mean = jax.tree.map(lambda *g: sum(w * x for w, x in zip(WEIGHTS, g, strict=True)), *expected)
        assert_trees_close(out.server_grads, mean, rtol=1e-5, atol=1e-8)


def test_shared_clients_equal_copies(segments, batch, clients):
    client, server = of_client(clients[0], 0), clients[1]
    copies = jax.tree.map(lambda x: jnp.stack([x] * 3), client)
    one = split_step(segments, WireConfig(), client, server, batch, WEIGHTS, shared_client=True)
    many = split_step(segments, WireConfig(), copies, server, batch, WEIGHTS)
    assert_trees_close(one.client_grads, many.client_grads)
    assert_trees_close(one.server_grads, many.server_grads)


def test_a_client_of_weight_0_changes_nothing(segments, batch, clients):
    client_params, server_params = clients
    two = jax.tree.map(lambda x: x[:2], (client_params, batch))
    without = split_step(segments, WireConfig(), two[0], server_params, two[1], jnp.array([0.6, 0.4]))
    padded = split_step(segments, WireConfig(), client_params, server_params, batch, jnp.array([0.6, 0.4, 0.0]))
    assert_trees_close(padded.server_grads, without.server_grads)
    assert_trees_close(jax.tree.map(lambda x: x[:2], padded.client_grads), without.client_grads)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(padded.client_grads))


@pytest.mark.parametrize("downlink", ["masked", "all"])
def test_a_codec_trains_through_what_the_wire_carries(segments, batch, clients, downlink):
    """Against `jax.grad` of the joined model with the wire as a custom_vjp at both crossings."""

    @jax.custom_vjp
    def cross(x):
        return x.astype(jnp.bfloat16).astype(x.dtype)

    cross.defvjp(lambda x: (cross(x), None), lambda _, g: (g.astype(jnp.bfloat16).astype(g.dtype),))

    def loss(client, server, n):
        b = of_client(batch, n)
        z = segments.transform(server, cross(segments.embed(client, b.tokens)))
        z = take_positions(cross(z), b.positions) if downlink == "all" else cross(take_positions(z, b.positions))
        return cross_entropy(segments.predict(client, z), b.labels, b.weights)

    wire = WireConfig(codec="bfloat16", downlink=downlink)
    out = split_step(segments, wire, *clients, batch, WEIGHTS)
    for n in range(3):
        expected = jax.jit(jax.grad(loss), static_argnums=2)(of_client(clients[0], n), clients[1], n)
        # dz is scaled by the weight in the server and back, so a last bit may round to the other side.
        assert_trees_close(of_client(out.client_grads, n), expected, rtol=1e-2, atol=2e-4)
    plain = split_step(segments, WireConfig(downlink=downlink), *clients, batch, WEIGHTS)
    assert not np.allclose(plain.loss, out.loss, rtol=1e-7, atol=0)


def test_dropout_draws_are_a_clients_own(batch):
    config = tiny_config(model=dict(hidden_dropout=0.2, attention_dropout=0.2))
    segments = make_segments(config.model)
    client, server = segments.init(*jax.random.split(jax.random.key(0)))
    keys = DropoutKeys(*jax.random.split(jax.random.key(1), (2, 3)))
    out = split_step(segments, WireConfig(), client, server, batch, WEIGHTS, keys, shared_client=True)
    for n in range(3):
        expected = joined_grad(segments, client, server, of_client(batch, n), of_client(keys, n))[0]
        np.testing.assert_allclose(out.loss[n], expected, rtol=1e-6)
    undropped = split_step(segments, WireConfig(), client, server, batch, WEIGHTS, shared_client=True)
    assert not np.allclose(undropped.loss, out.loss, rtol=1e-4)


# --- the wire --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["float32", "bfloat16"])
@pytest.mark.parametrize("downlink", ["masked", "all"])
def test_tokens_and_labels_are_in_no_message(segments, batch, clients, codec, downlink):
    """Invariant 9: the same h for other tokens, and the same task at the head for other labels, are the same messages."""
    wire = WireConfig(codec=codec, downlink=downlink)
    names = np.random.default_rng(5).permutation(61)  # every word's new number
    renamed = batch._replace(tokens=jnp.asarray(names)[batch.tokens], labels=jnp.asarray(names)[batch.labels])
    table, bias = clients[0]["embeddings"]["word"]["embedding"], clients[0]["head"]["bias"]  # [C, V, D], [C, V]
    other = jax.tree.map(jnp.asarray, clients[0])
    other["embeddings"]["word"]["embedding"] = jnp.zeros_like(table).at[:, names].set(table)
    other["head"]["bias"] = jnp.zeros_like(bias).at[:, names].set(bias)
    assert jnp.mean(renamed.tokens != batch.tokens) > 0.9 and jnp.mean(renamed.labels != batch.labels) > 0.9
    one = split_step(segments, wire, *clients, batch, WEIGHTS).messages
    two = split_step(segments, wire, other, clients[1], renamed, WEIGHTS).messages
    # The softmax adds up in another order, so what comes after it may round to the other side.
    assert_trees_close(two, one, *((1e-5, 1e-6) if codec == "float32" else (2e-2, 1e-3)))
    for name in ("activations_up", "positions_up", "hidden_states_down"):  # nothing adds up over words before these
        assert jax.tree.all(jax.tree.map(jnp.array_equal, getattr(two, name), getattr(one, name)))


@pytest.mark.parametrize("codec", ["float32", "bfloat16"])
@pytest.mark.parametrize("downlink, padded", [("masked", False), ("all", False), ("masked", True)])
def test_messages_have_these_fields_and_no_others(segments, batch, clients, codec, downlink, padded):
    """A whitelist, as it stands in docs/architecture.md: whoever lets something else cross has to come by here."""
    wire = WireConfig(codec=codec, downlink=downlink)
    data = batch._replace(lengths=jnp.full((3, 2), 9, jnp.int32)) if padded else batch
    messages = jax.eval_shape(lambda c, s: split_step(segments, wire, c, s, data, WEIGHTS).messages, *clients)
    asked = 3 if downlink == "masked" else 12  # M, or T
    expected = {
        "activations_up": (codec, (3, 2, 12, 16)),
        "positions_up": ("uint16", (3, 2, 3)) if downlink == "masked" else None,
        "hidden_states_down": (codec, (3, 2, asked, 16)),
        "head_gradient_up": (codec, (3, 2, asked, 16)),
        "input_gradient_down": (codec, (3, 2, 12, 16)),
        "lengths_up": ("uint16", (3, 2)) if padded else None,
    }
    assert {name: m and (m.dtype.name, m.shape) for name, m in messages._asdict().items()} == expected


def test_positions_do_not_depend_on_the_words(config):
    """The same key masks the same positions in other words, as long as special tokens stand in the same places."""
    one = mask_blocks(jax.random.key(3), random_blocks(1, 4), mask_spec(config))
    other = mask_blocks(jax.random.key(3), random_blocks(2, 4), mask_spec(config))
    assert not jnp.array_equal(one.labels, other.labels)
    assert jnp.array_equal(one.positions, other.positions)


def test_whoever_holds_the_client_segment_reads_the_tokens(segments, clients, batch):
    """What the cut does not do: embed acts on each token alone, so a table lookup inverts the first message."""
    client = of_client(clients[0], 0)
    tokens = batch.tokens[0]
    h = segments.embed(client, tokens)  # [B, T, D], what the server receives
    table = segments.embed(client, jnp.broadcast_to(jnp.arange(61)[:, None], (61, LENGTH)))  # [V, T, D]
    distance = jnp.sum((h[:, None] - table[None]) ** 2, axis=-1)  # [B, V, T]
    assert jnp.array_equal(jnp.argmin(distance, axis=1), tokens)


def test_messages_do_not_depend_on_labels_before_the_head(segments, batch, clients):
    """Other labels change the gradients, never what goes up first."""
    changed = batch._replace(labels=(batch.labels + 1) % 61)
    one = split_step(segments, WireConfig(), *clients, batch, WEIGHTS).messages
    other = split_step(segments, WireConfig(), *clients, changed, WEIGHTS).messages
    assert jnp.array_equal(one.activations_up, other.activations_up)
    assert jnp.array_equal(one.positions_up, other.positions_up)
    assert jnp.array_equal(one.hidden_states_down, other.hidden_states_down)
    assert not jnp.array_equal(one.head_gradient_up, other.head_gradient_up)


def test_bytes_are_those_of_the_messages(segments, batch, clients, config):
    size, masked = config.model.hidden_size, batch.labels.shape[-1]
    rows = 3 * 2
    expected = {
        "activations_up": rows * LENGTH * size * 4,
        "positions_up": rows * masked * 2,
        "hidden_states_down": rows * masked * size * 4,
        "head_gradient_up": rows * masked * size * 4,
        "input_gradient_down": rows * LENGTH * size * 4,
    }
    messages = jax.eval_shape(lambda c, s: split_step(segments, WireConfig(), c, s, batch, WEIGHTS).messages, *clients)
    assert message_bytes(messages) == expected
    up, down = traffic(messages)
    assert (up, down) == (
        sum(expected[k] for k in expected if k.endswith("_up")),
        sum(expected[k] for k in expected if k.endswith("_down")),
    )
    half = dataclasses.replace(WireConfig(), codec="bfloat16", downlink="all")
    messages = jax.eval_shape(lambda c, s: split_step(segments, half, c, s, batch, WEIGHTS).messages, *clients)
    assert sum(message_bytes(messages).values()) == 4 * rows * LENGTH * size * 2


def test_masked_batch_is_what_the_wire_test_assumes(batch):
    assert isinstance(batch, MaskedBatch)
    assert batch.tokens.shape == (3, 2, LENGTH)

"""The split step against the joined model's `jax.grad`, and what it sends over the wire (invariants 1 and 9)."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import LENGTH, assert_trees_close, mask_spec, random_blocks, tiny_config

from fedbert_jax.config import WireConfig
from fedbert_jax.data.masking import MaskedBatch, mask_blocks
from fedbert_jax.federated import split
from fedbert_jax.federated.joined import joined_loss
from fedbert_jax.federated.wire import MESSAGES, NO_KEYS, StepKeys, by_way, make_cut, num_bytes
from fedbert_jax.models.bert import make_segments
from fedbert_jax.models.layers import take_positions
from fedbert_jax.models.losses import cross_entropy

WEIGHTS = jnp.array([0.5, 0.2, 0.3])
split_step = jax.jit(split.split_step, static_argnums=0, static_argnames="shared_client")
joined_grad = jax.jit(jax.value_and_grad(joined_loss, (1, 2)), static_argnums=0)
cut_of = functools.cache(lambda segments, **wire: make_cut(segments, WireConfig(**wire)))  # each a program of its own


def stack(*trees):
    return jax.tree.map(lambda *x: np.stack(x), *trees)


@pytest.fixture(scope="module")
def clients(segments):
    """Three clients' own segments [3, ...] and the server's."""
    init = jax.jit(segments.init)
    inits = [init(*jax.random.split(jax.random.key(n))) for n in range(3)]
    return jax.tree.map(lambda *x: jnp.stack(x), *[c for c, _ in inits]), inits[0][1]


def of_client(tree, n):
    return jax.tree.map(lambda x: x[n], tree)


def messages_of(cut, clients, batch):
    """The shapes of the messages that a step sends."""
    return jax.eval_shape(lambda c, s: split_step(cut, c, s, batch, WEIGHTS).messages, *clients)


@pytest.mark.parametrize("downlink", ["masked", "all"])
def test_gradients_equal_the_joined_models(segments, batch, clients, downlink):
    client_params, server_params = clients
    out = split_step(cut_of(segments, downlink=downlink), client_params, server_params, batch, WEIGHTS)

    body = jax.tree.map(jnp.zeros_like, server_params)
    for n in range(3):
        value, (dclient, dserver) = joined_grad(segments, of_client(client_params, n), server_params, of_client(batch, n))
        np.testing.assert_allclose(out.loss[n], value, rtol=1e-6)
        assert_trees_close(of_client(out.client_grads, n), dclient)
        body = jax.tree.map(lambda total, g, n=n: total + WEIGHTS[n] * g, body, dserver)
    assert_trees_close(out.server_grads, body)


def test_gradients_in_float64(batch):
    """The same in double precision, where the remaining difference is not due to the algebra."""
    segments = make_segments(tiny_config(model=dict(num_layers=2, unroll_layers=False)).model, jnp.float64)
    fresh = jax.jit(segments.init)(*jax.random.split(jax.random.key(0)))
    with jax.enable_x64(True):
        client, server = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), fresh)
        out = split_step(cut_of(segments), client, server, batch, WEIGHTS, shared_client=True)
        expected = [joined_grad(segments, client, server, of_client(batch, n))[1][1] for n in range(3)]
        mean = jax.tree.map(lambda *g: sum(w * x for w, x in zip(WEIGHTS, g, strict=True)), *expected)
        # LayerNorm and softmax are still float32, so only their rounding may show.
        assert_trees_close(out.server_grads, mean, rtol=2e-6, atol=2e-9)
        assert out.messages["activations"].dtype == out.messages["input_gradient"].dtype == jnp.float64


def test_shared_clients_equal_copies(segments, batch, clients):
    client, server = of_client(clients[0], 0), clients[1]
    copies = jax.tree.map(lambda x: jnp.stack([x] * 3), client)
    one = split_step(cut_of(segments), client, server, batch, WEIGHTS, shared_client=True)
    many = split_step(cut_of(segments), copies, server, batch, WEIGHTS)
    assert_trees_close(one.client_grads, many.client_grads)
    assert_trees_close(one.server_grads, many.server_grads)


def test_a_client_of_weight_0_changes_nothing(segments, batch, clients):
    client_params, server_params = clients
    two = jax.tree.map(lambda x: x[:2], (client_params, batch))
    without = split_step(cut_of(segments), two[0], server_params, two[1], jnp.array([0.6, 0.4]))
    padded = split_step(cut_of(segments), client_params, server_params, batch, jnp.array([0.6, 0.4, 0.0]))
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

    @jax.jit
    @jax.grad
    def grads(client, server, b):
        z = segments.transform(server, cross(segments.embed(client, b)))
        z = take_positions(cross(z), b.positions) if downlink == "all" else cross(take_positions(z, b.positions))
        return cross_entropy(segments.predict(client, z), b.labels, b.weights)

    out = split_step(cut_of(segments, codec="bfloat16", downlink=downlink), *clients, batch, WEIGHTS)
    for n in range(3):
        expected = grads(of_client(clients[0], n), clients[1], of_client(batch, n))
        # The server scales dz by the weight and back, so a last bit may round the other way.
        assert_trees_close(of_client(out.client_grads, n), expected, rtol=1e-2, atol=2e-4)
    plain = split_step(cut_of(segments, downlink=downlink), *clients, batch, WEIGHTS)
    assert not np.allclose(plain.loss, out.loss, rtol=1e-7, atol=0)


def test_dropout_draws_are_a_clients_own(batch):
    config = tiny_config(model=dict(hidden_dropout=0.2, attention_dropout=0.2))
    segments = make_segments(config.model)
    client, server = jax.jit(segments.init)(*jax.random.split(jax.random.key(0)))
    draws = jax.random.split(jax.random.key(1), (2, 3))
    keys = StepKeys(client=draws[0], server=draws[1])
    out = split_step(cut_of(segments), client, server, batch, WEIGHTS, keys, shared_client=True)
    for n in range(3):
        own = StepKeys(client=draws[0, n : n + 1], server=draws[1, n : n + 1])
        loss, (grads, _) = joined_grad(segments, client, server, of_client(batch, n), own)
        np.testing.assert_allclose(out.loss[n], loss, rtol=1e-6)
        assert_trees_close(of_client(out.client_grads, n), grads)
    undropped = split_step(cut_of(segments), client, server, batch, WEIGHTS, shared_client=True)
    assert not np.allclose(undropped.loss, out.loss, rtol=1e-4)


# --- the wire --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["float32", "bfloat16"])
@pytest.mark.parametrize("downlink", ["masked", "all"])
def test_tokens_and_labels_are_in_no_message(segments, batch, clients, codec, downlink):
    """Invariant 9: other tokens with the same h, and other labels with the same task at the head, give equal messages."""
    cut = cut_of(segments, codec=codec, downlink=downlink)
    names = np.random.default_rng(5).permutation(61)  # every word's new number
    renamed = batch._replace(tokens=jnp.asarray(names)[batch.tokens], labels=jnp.asarray(names)[batch.labels])
    table, bias = clients[0]["embeddings"]["word"]["embedding"], clients[0]["head"]["bias"]  # [C, V, D], [C, V]
    other = jax.tree.map(jnp.asarray, clients[0])
    other["embeddings"]["word"]["embedding"] = jnp.zeros_like(table).at[:, names].set(table)
    other["head"]["bias"] = jnp.zeros_like(bias).at[:, names].set(bias)
    assert jnp.mean(renamed.tokens != batch.tokens) > 0.9 and jnp.mean(renamed.labels != batch.labels) > 0.9
    one = split_step(cut, *clients, batch, WEIGHTS).messages
    two = split_step(cut, other, clients[1], renamed, WEIGHTS).messages
    # The softmax sums in another order, so the values after it may round the other way.
    assert_trees_close(two, one, *((1e-5, 1e-6) if codec == "float32" else (2e-2, 1e-3)))
    before = ("activations", "positions", "hidden_states") if downlink == "masked" else ("activations", "hidden_states")
    for name in before:  # nothing is summed over words before these
        assert jnp.array_equal(two[name], one[name])


@pytest.mark.parametrize("codec", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("downlink, padded", [("masked", False), ("all", False), ("masked", True)])
def test_messages_have_these_fields_and_no_others(segments, batch, clients, codec, downlink, padded):
    """A whitelist, as in docs/architecture.md: whoever lets something else cross has to change it here."""
    data = batch._replace(lengths=jnp.full((3, 2), 9, jnp.int32)) if padded else batch
    messages = messages_of(cut_of(segments, codec=codec, downlink=downlink), clients, data)
    asked = 3 if downlink == "masked" else 12  # M, or T

    def floats(*shape):
        if codec == "int8":
            return {"int8": ("int8", shape), "scale": ("float32", (*shape[:-1], 1))}
        return (codec, shape)

    expected = {
        "activations": floats(3, 2, 12, 16),
        "hidden_states": floats(3, 2, asked, 16),
        "head_gradient": floats(3, 2, asked, 16),
        "input_gradient": floats(3, 2, 12, 16),
    }
    expected |= {"positions": ("uint16", (3, 2, 3))} if downlink == "masked" else {}
    expected |= {"lengths": ("uint16", (3, 2))} if padded else {}
    assert jax.tree.map(lambda m: (m.dtype.name, m.shape), messages) == expected


def test_positions_do_not_depend_on_the_words(config):
    """The same key masks the same positions of other words, as long as special tokens are in the same places."""
    one = mask_blocks(jax.random.key(3), random_blocks(1, 4), mask_spec(config))
    other = mask_blocks(jax.random.key(3), random_blocks(2, 4), mask_spec(config))
    assert not jnp.array_equal(one.labels, other.labels)
    assert jnp.array_equal(one.positions, other.positions)


def test_whoever_holds_the_client_segment_reads_the_tokens(segments, clients, batch):
    """What the cut does not prevent: embed acts on each token alone, so a table lookup inverts the first message."""
    client = of_client(clients[0], 0)
    embed = lambda tokens: segments.embed(client, MaskedBatch(tokens, None, None, None))  # noqa: E731
    tokens = batch.tokens[0]
    h = embed(tokens)  # [B, T, D], what the server receives
    table = embed(jnp.broadcast_to(jnp.arange(61)[:, None], (61, LENGTH)))  # [V, T, D]
    distance = jnp.sum((h[:, None] - table[None]) ** 2, axis=-1)  # [B, V, T]
    assert jnp.array_equal(jnp.argmin(distance, axis=1), tokens)


def test_messages_do_not_depend_on_labels_before_the_head(segments, batch, clients):
    """Other labels change the gradients, but never the messages before them."""
    changed = batch._replace(labels=(batch.labels + 1) % 61)
    one = split_step(cut_of(segments), *clients, batch, WEIGHTS).messages
    other = split_step(cut_of(segments), *clients, changed, WEIGHTS).messages
    assert jnp.array_equal(one["activations"], other["activations"])
    assert jnp.array_equal(one["positions"], other["positions"])
    assert jnp.array_equal(one["hidden_states"], other["hidden_states"])
    assert not jnp.array_equal(one["head_gradient"], other["head_gradient"])


def test_bytes_are_those_of_the_messages(segments, batch, clients, config):
    size, masked = config.model.hidden_size, batch.labels.shape[-1]
    rows = 3 * 2
    up = {
        "activations": rows * LENGTH * size * 4,
        "positions": rows * masked * 2,
        "head_gradient": rows * masked * size * 4,
    }
    down = {"hidden_states": rows * masked * size * 4, "input_gradient": rows * LENGTH * size * 4}
    sizes = {name: num_bytes(message) for name, message in messages_of(cut_of(segments), clients, batch).items()}
    assert sizes == up | down
    assert (by_way(sizes, "up"), by_way(sizes, "down")) == (up, down)
    half = messages_of(cut_of(segments, codec="bfloat16", downlink="all"), clients, batch)
    assert num_bytes(half) == 4 * rows * LENGTH * size * 2


def test_what_is_computed_in_bfloat16_crosses_as_it_is(batch):
    """The codec float32 is for numbers computed in float32; it doesn't widen others."""
    segments = make_segments(tiny_config().model, jnp.bfloat16)
    client, server = jax.eval_shape(segments.init, *[jax.eval_shape(lambda: jax.random.key(0))] * 2)
    copies = jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), client)
    messages = messages_of(cut_of(segments, codec="float32"), (copies, server), batch)
    assert messages["activations"].dtype == jnp.bfloat16
    assert num_bytes(messages["activations"]) == 3 * 2 * LENGTH * 16 * 2
    assert {name: m.dtype.name for name, m in messages.items() if name != "positions"} == dict.fromkeys(
        ("activations", "hidden_states", "head_gradient", "input_gradient"), "bfloat16"
    )


def test_int8_is_off_by_half_a_scale_at_most(segments):
    """Each number takes 8 bits, and each row along the last axis has a scale; the largest number of a row becomes 127."""
    channel = cut_of(segments, codec="int8").channels.activations
    x = np.random.default_rng(0).standard_normal((2, LENGTH, 16)).astype(np.float32)
    x *= np.exp(np.linspace(-20, 20, LENGTH, dtype=np.float32))[:, None]  # rows of all sizes
    x[0, 3] = 0.0
    sent = channel.send(jnp.asarray(x), None)
    assert {name: (a.dtype.name, a.shape) for name, a in sent.items()} == {
        "int8": ("int8", (2, LENGTH, 16)),
        "scale": ("float32", (2, LENGTH, 1)),
    }
    received = channel.receive(sent)
    assert received.dtype == jnp.float32
    there = np.any(x, axis=-1)
    units = (np.asarray(received) - x)[there] / np.asarray(sent["scale"])[there]
    assert 0.4 < np.abs(units).max() < 0.5 + 1e-4  # the quotient has float32's rounding
    assert np.all(np.abs(np.asarray(sent["int8"], np.int32)).max(axis=-1) == np.where(there, 127, 0))
    assert not there[0, 3] and not np.any(received[0, 3]) and not np.any(sent["int8"][0, 3])


def test_masked_batch_is_what_the_wire_test_assumes(batch):
    assert isinstance(batch, MaskedBatch)
    assert batch.tokens.shape == (3, 2, LENGTH)


# --- in five programs -------------------------------------------------------------------------------------------------

begin, forward, head, backward, finish = (
    jax.jit(half, static_argnums=0)
    for half in (split.client_begin, split.server_forward, split.client_head, split.server_backward, split.client_finish)
)


@pytest.fixture(scope="module")
def dropping():
    """Segments with dropout, three clients' own parameters and a server's; without keys, it is the model of dropout 0."""
    made = make_segments(tiny_config(model=dict(hidden_dropout=0.1, attention_dropout=0.1)).model)
    client, server = jax.device_get(jax.jit(made.init)(*jax.random.split(jax.random.key(0))))
    rng = np.random.default_rng(0)
    own = jax.tree.map(lambda x: x[None] + 0.1 * rng.standard_normal((3, *x.shape)).astype(np.float32), client)
    return made, own, server


def padded_batch(config) -> MaskedBatch:
    """Blocks that end early, with fewer tokens that may be masked, so that some of the positions have weight 0."""
    lengths = np.array([[12, 3], [7, 12], [5, 8]], np.int32)
    tokens = jnp.where(np.arange(LENGTH) < lengths[..., None], random_blocks(0, 3, 2), 0)
    mask = jax.vmap(lambda k, t: mask_blocks(k, t, mask_spec(config)))
    return mask(jax.random.split(jax.random.key(7), 3), tokens)._replace(lengths=jnp.asarray(lengths))


def assert_messages_equal(found, expected, codec):
    """Requires equal numbers; with a codec that rounds, a few entries may have rounded the other way, a quantum off."""
    if codec == "float32" or jnp.issubdtype(jax.tree.leaves(expected)[0].dtype, jnp.unsignedinteger):
        return assert_equal(found, expected)
    if codec == "int8":
        assert_equal(found["scale"], expected["scale"])
        found, expected = found["int8"].astype(np.int32), expected["int8"].astype(np.int32)
        assert np.abs(found - expected).max() <= 1
    np.testing.assert_allclose(found.astype(np.float32), expected.astype(np.float32), rtol=2.0**-7, atol=codec == "int8")
    assert np.mean(found != expected) < 0.01


def assert_equal(found, expected):
    """Requires equality to 1e-6 of each number, or, where an array's numbers nearly cancel, of its largest."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        name, most = jax.tree_util.keystr(path), float(np.abs(b).max())
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6 * most, err_msg=name)


@pytest.mark.parametrize(  # every pair of settings occurs
    "codec, downlink, drops, padded",
    [
        ("float32", "masked", True, True),
        ("float32", "all", False, False),
        ("bfloat16", "masked", False, False),
        ("bfloat16", "all", True, True),
        ("int8", "masked", True, False),
        ("int8", "all", False, True),
    ],
)
def test_the_halves_in_five_programs_are_the_one_step(dropping, config, batch, codec, downlink, drops, padded):
    """As over a network: clients one by one, and nothing but NumPy arrays between them and the server."""
    segments, own, server = dropping
    cut, weights = cut_of(segments, codec=codec, downlink=downlink), np.array([0.6, 0.4, 0.0], np.float32)
    data = jax.device_get(padded_batch(config) if padded else batch)
    assert (data.weights == 0).any() == padded
    draws = jax.random.split(jax.random.key(1), (2, 3))
    keys = StepKeys(client=draws[0], server=draws[1]) if drops else NO_KEYS
    one = jax.device_get(split_step(cut, own, server, data, weights, keys))
    clients = [  # each client's parameters, batch and keys
        (*of_client((own, data), n), StepKeys(client=draws[0, n : n + 1]) if drops else NO_KEYS) for n in range(3)
    ]

    def cross(found, *names):
        """Checks what crossed; with a codec that rounds, goes on with the one program's, so that no flipped bit spreads."""
        expected = {name: one.messages[name] for name in names}
        for name in names:
            assert_messages_equal(found[name], expected[name], codec)
        return found if codec == "float32" else expected

    begun = [begin(cut, params, b, k) for params, b, k in clients]
    up = stack(*jax.device_get([up for up, _ in begun]))
    sent = {name: x for name, x in up._asdict().items() if x is not None}
    sent = cross(sent, *sent)
    up = split.Up(sent["activations"], sent.get("positions"), sent.get("lengths"))
    z, kept = forward(cut, server, up, weights, StepKeys(server=keys.server))
    z = cross({"hidden_states": jax.device_get(z)}, "hidden_states")["hidden_states"]
    heads = [head(cut, params, b, of_client(z, n), k) for n, (params, b, k) in enumerate(clients)]
    dz = stack(*jax.device_get([dz for *_, dz in heads]))
    dz = cross({"head_gradient": dz}, "head_gradient")["head_gradient"]
    server_grads, dh = backward(cut, kept, dz, weights)
    dh = cross({"input_gradient": jax.device_get(dh)}, "input_gradient")["input_gradient"]
    grads = [finish(cut, begun[n][1], of_client(dh, n), heads[n][1]) for n in range(3)]

    assert set(one.messages) == set(sent) | {"hidden_states", "head_gradient", "input_gradient"} <= set(MESSAGES)
    assert_equal(np.stack([loss for loss, *_ in heads]), one.loss)
    assert_equal(stack(*jax.device_get(grads)), one.client_grads)
    assert_equal(jax.device_get(server_grads), one.server_grads)
    assert not np.any(jax.tree.leaves(of_client(one.messages["input_gradient"], 2))[0])  # nothing for a weight of 0


def test_a_padded_batch_with_dropout_has_the_joined_models_gradients(dropping, config):
    """The clients that count have weights 0.6 and 0.4; the third, of weight 0, enters no number of theirs."""
    segments, own, server = dropping
    data, weights = jax.device_get(padded_batch(config)), np.array([0.6, 0.4, 0.0], np.float32)
    draws = jax.random.split(jax.random.key(1), (2, 3))
    cut = cut_of(segments, codec="float32", downlink="masked")  # these arguments reuse a compiled program
    out = split_step(cut, own, server, data, weights, StepKeys(client=draws[0], server=draws[1]))
    body = jax.tree.map(np.zeros_like, server)
    for n in range(2):
        keys = StepKeys(client=draws[0, n : n + 1], server=draws[1, n : n + 1])
        loss, (grads, body_grads) = joined_grad(segments, *of_client((own,), n), server, of_client(data, n), keys)
        np.testing.assert_allclose(out.loss[n], loss, rtol=1e-6)
        assert_trees_close(of_client(out.client_grads, n), grads)
        body = jax.tree.map(lambda total, g, n=n: total + weights[n] * g, body, body_grads)
    assert_trees_close(out.server_grads, body)

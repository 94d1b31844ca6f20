"""The channels: what they lose, what sums to what, and that noise, clipping and codecs act on training as they should."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import assert_trees_close, cohort, program, tiny_config

from fedbert_jax.config import WireConfig
from fedbert_jax.federated import wire
from fedbert_jax.federated.average import add_up, add_up_with_feedback, pool
from fedbert_jax.federated.fixed_point import fixed_point

RNG = np.random.default_rng(0)


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def test_clipping_shortens_long_rows_alone():
    x = normal(2, 3, 16)
    sent = wire.clip(3.5).send(x, None)
    sizes = np.linalg.norm(x, axis=-1)
    assert (sizes > 3.5).any() and (sizes < 3.5).any()
    np.testing.assert_allclose(sent, x * np.minimum(1, 3.5 / sizes)[..., None], rtol=1e-6)
    assert np.isfinite(wire.clip(1.0).send(jnp.zeros((2, 4)), None)).all()


def test_noise_is_gaussian_and_each_groups_own():
    keys, x = jax.random.split(jax.random.key(0), 2), jnp.zeros((4, 50, 40))
    one = np.asarray(wire.noise(0.5, 0).send(x, keys))
    assert abs(one.std() - 0.5) < 0.02 and abs(one.mean()) < 0.02
    assert not np.allclose(one[:2], one[2:])  # the groups are two clients' rows
    np.testing.assert_array_equal(one[2:], wire.noise(0.5, 0).send(x[:2], keys[1:]))
    assert not np.allclose(one, wire.noise(0.5, 1).send(x, keys))  # another message of the step


def test_links_send_from_left_to_right_and_receive_in_reverse():
    log = []
    link = lambda name: wire.Channel(  # noqa: E731
        lambda x, _: log.append(f"send {name}") or x + 1, lambda x: log.append(f"receive {name}") or x, lambda x: x * 2
    )
    both = wire.chain(link("a"), link("b"))
    assert both.total(both.receive(both.send(0, None))) == 8
    assert log == ["send a", "send b", "receive b", "receive a"]
    fixed = wire.chain(wire.codec("float32", jnp.float32), fixed_point(jnp.zeros(1, jnp.int32)))  # numbers within ±1
    assert 0.99 < fixed.bounded({"x": jnp.array([5.0])})["x"][0] < 1.0


@pytest.mark.parametrize("channel", [None, fixed_point(jnp.full(1, 7)), wire.codec("bfloat16", jnp.float32)])
def test_a_sum_leaves_a_client_of_weight_0_out(channel):
    stacked, weights = normal(4, 3, 5), jnp.array([0.5, 0.0, 0.3, 0.2])
    total = add_up(channel, {"x": stacked.at[1].set(jnp.nan)}, weights)
    total = channel.total(total) if channel else total
    np.testing.assert_allclose(total["x"], jnp.einsum("c,cij->ij", weights, stacked), atol=1e-2 if channel else 1e-6)


def test_what_a_codec_loses_is_sent_later():
    """Error feedback: over the steps, the numbers received plus those still unsent equal those that were to be sent."""
    channel, weights = wire.codec("int8", jnp.float32), jnp.array([0.5, 0.0, 0.5])
    unsent, received, wanted, plain = {"g": jnp.zeros((3, 4, 9))}, 0.0, 0.0, 0.0
    for _ in range(30):
        grads = normal(3, 4, 9) * jnp.array([1.0, 1.0, 0.01])[:, None, None] + 0.02
        total, unsent = add_up_with_feedback(channel, {"g": grads.at[1].set(jnp.nan)}, weights, unsent)
        received, wanted = received + total["g"], wanted + 0.5 * (grads[0] + grads[2])
        plain = plain + add_up(channel, {"g": grads.at[1].set(0.0)}, weights)["g"]
    np.testing.assert_allclose(received + unsent["g"].sum(axis=0), wanted, atol=1e-4)
    assert not unsent["g"][1].any()  # an absent client neither sends nor forgets
    assert np.abs(received - wanted).mean() < 0.5 * np.abs(plain - wanted).mean()


def test_who_is_absent_keeps_what_it_has_yet_to_send():
    channel, weights = wire.codec("int8", jnp.float32), jnp.array([0.5, 0.0, 0.5])
    grads, unsent = {"g": normal(3, 4, 9)}, {"g": 5.0 + normal(3, 4, 9)}
    total, after = add_up_with_feedback(channel, grads, weights, unsent)
    np.testing.assert_array_equal(after["g"][1], unsent["g"][1])
    wanted = 0.5 * (grads["g"][0] + grads["g"][2]) + unsent["g"][0] + unsent["g"][2]
    np.testing.assert_allclose(total["g"], wanted, atol=0.1)


def test_pooled_clients_weigh_what_they_weigh_whatever_they_have_masked(segments, batch):
    """Clients with few and with many positions: the loss is the weighted mean of their means, as is its gradient."""
    uneven = batch._replace(weights=batch.weights.at[0, :, 1:].set(0.0).at[1, 0].set(0.0))
    client, _ = jax.jit(segments.init)(*jax.random.split(jax.random.key(0)))
    weights, z = jnp.array([0.5, 0.2, 0.3]), normal(3, 2, batch.labels.shape[-1], 16)

    def each(client):
        return weights @ jax.vmap(lambda b, z: segments.loss(client, z, b))(uneven, z)

    def one(client):
        return segments.loss(client, z.reshape(6, -1, 16), jax.tree.map(lambda x: x[0], pool(uneven, weights)))

    (loss, grads), (expected, expected_grads) = (jax.value_and_grad(fn)(client) for fn in (one, each))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert_trees_close(grads, expected_grads, rtol=1e-5, atol=1e-7)
    nothing = pool(batch._replace(weights=batch.weights.at[1].set(0.0)), weights).weights[0]
    assert not nothing[2:4].any() and np.isfinite(nothing).all()


def test_a_config_makes_these_channels():
    made = wire.make_channels(WireConfig(), jnp.float32)
    assert made.gradient is None and made.mean is None
    guarded = wire.make_channels(WireConfig(clip=1.0, noise=0.1, gradient_clip=2.0), jnp.float32)
    x, keys = 10 * normal(2, 3, 8), jax.random.split(jax.random.key(0), 1)
    long = lambda channel: float(np.linalg.norm(channel.receive(channel.send(x, keys)), axis=-1).max())  # noqa: E731
    assert 1.0 < long(guarded.activations) < 2.0 and abs(long(guarded.head_gradient) - 2.0) < 1e-5
    loud = wire.make_channels(WireConfig(noise=1.0, gradient_noise=1.0), jnp.float32)
    assert not np.allclose(loud.activations.send(x, keys), loud.head_gradient.send(x, keys))  # each message its own
    np.testing.assert_array_equal(guarded.hidden_states.send(x, None), x)
    np.testing.assert_array_equal(guarded.input_gradient.send(x, None), x)


def end_of_two_rounds(**changes):
    config = tiny_config(**changes)
    _, _, state, round = program(config)
    metrics = []
    for n in range(2):
        state, seen = round(state, cohort(config, round=n, seed=n))
        metrics.append(float(seen.loss))
    return state, metrics


@pytest.mark.parametrize("codec, close", [("bfloat16", 2e-3), ("int8", 2e-3)])
def test_gradients_in_a_codec_train_nearly_as_they_are(codec, close):
    plain = end_of_two_rounds(federated=dict(average="gradients"))[0]
    coded, _ = end_of_two_rounds(federated=dict(average="gradients"), wire=dict(gradient_codec=codec))
    differences = jax.tree.map(lambda a, b: float(jnp.max(jnp.abs(a - b))), coded.model.client, plain.model.client)
    assert 0 < max(jax.tree.leaves(differences)) < close * 5
    assert bool(jax.tree.leaves(coded.averaging)) == (codec == "int8")
    if codec == "int8":  # at most the remainder of a step of 1/127 of a row's largest
        assert 0 < max(float(jnp.abs(x).max()) for x in jax.tree.leaves(coded.averaging.unsent)) < 0.1


@pytest.mark.parametrize("codec, up, down", [("float32", None, None), ("bfloat16", 2, 2), ("int8", None, 2)])
def test_a_mean_gradient_comes_back_in_two_bytes_a_number_where_gradients_are_coded(codec, up, down):
    channels, x = wire.make_channels(WireConfig(gradient_codec=codec), jnp.float32), normal(4, 16)
    assert (channels.mean is None) == (channels.gradient is None) == (codec == "float32")
    for channel, width in ((channels.gradient, up), (channels.mean, down)):
        if width is not None:
            assert channel is not None and wire.num_bytes(channel.send(x, None)) == width * 64
    if codec == "int8":
        assert wire.num_bytes(channels.gradient.send(x, None)) == 64 + 4 * 4  # and a scale for each row


@pytest.mark.parametrize("codec", ["float32", "bfloat16", "int8"])
def test_an_evaluation_is_guarded_and_never_coded(codec):
    """Its scores are to be those of the model: codecs are for training."""
    channels, x = wire.make_channels(WireConfig(codec=codec, clip=1.0), jnp.float32), normal(2, 3, 16)
    sent = channels.questions.send(x, None)
    np.testing.assert_allclose(sent, x / np.linalg.norm(x, axis=-1, keepdims=True), rtol=1e-6)
    plain = wire.make_channels(WireConfig(codec=codec), jnp.float32).questions.send(x, None)
    np.testing.assert_array_equal(plain, x)


def test_noise_and_int8_change_what_is_learnt_and_not_the_draws():
    losses = {
        name: end_of_two_rounds(wire=settings, federated=dict(local_steps=1))[1]
        for name, settings in {
            "plain": {},
            "int8": dict(codec="int8"),
            "noise": dict(noise=0.5),
            "gradient": dict(gradient_noise=1e-3),
        }.items()
    }
    second = [loss[1] for loss in losses.values()]  # of a step after noised gradients
    assert len(set(second)) == 4
    np.testing.assert_allclose(second, second[0], rtol=0.05)
    assert losses["noise"] == end_of_two_rounds(wire=dict(noise=0.5), federated=dict(local_steps=1))[1]

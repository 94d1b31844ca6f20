"""The wire between client and server: what crosses it, in which direction and encoding, and how many bytes that is."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from fedbert_jax.config import CODECS, WireConfig
from fedbert_jax.errors import ConfigError
from fedbert_jax.models.bert import Keys, Segments

Payload = Any  # a pytree of arrays: what crosses, and whose bytes are counted
Way = Literal["up", "down"]  # to the server, or to the clients

# Everything that crosses, and its direction. Tokens and labels are not in it. A network's tensors have these names.
MESSAGES: dict[str, Way] = {
    # In each step; over a network, at an evaluation as well, where held-out text makes the activations. Positions are those
    # whose hidden states are asked for (`wire.downlink=masked`). They are drawn at random among those without a special
    # token, so they reveal a little about where documents end, and with `mlm.whole_word` about where long words are. Lengths
    # cross if sequences are padded.
    "activations": "up",  # h [B, T, D]
    "positions": "up",  # uint16 [B, M]
    "lengths": "up",  # uint16 [B]
    "hidden_states": "down",  # z [B, M, D], or at all positions
    "head_gradient": "up",  # dL/dz, like z
    "input_gradient": "down",  # dL/dh, like h
    # In each step, if gradients are averaged.
    "segment_gradient": "up",
    "mean_gradient": "down",
    # The same if averages are blinded, or at a round's end: numbers under pads, and whose pads are in their sum.
    "padded": "up",
    "nonce": "up",  # uint8 [16]
    "padded_sum": "down",
    "places": "down",  # int32 [C], in the roster; -1: nobody's
    "nonces": "down",  # uint8 [C, 16]
    "share": "down",  # float32, of those whose numbers are in the sum
    # In each round, from one client, if averages are blinded: what the next one begins with, sealed, for who comes back.
    "snapshot": "up",
    # In each round, for the clients that take part: what they begin with, and what they end with.
    "segment": "down",
    "segment_optimizer": "down",
    "trained_segment": "up",
    "trained_segment_optimizer": "up",
    "body": "down",
    "body_optimizer": "down",
    "trained_body": "up",
    "trained_body_optimizer": "up",
    # Over a network alone, and not counted in a simulation's bytes, like nonces and the places of who is in a sum: before
    # the first round, from one client; in each step; in each round; after an evaluation.
    "first_segment": "up",
    "loss": "up",  # float32
    "norm": "up",  # float32, of the client's gradient: of this step if gradients are averaged, else the mean over steps
    "sums": "up",  # float32, of the answers' scores
}


class Channel(NamedTuple):
    """Both ends of one hook: what a sender does to a pytree of arrays, and what the receiver does with what crossed.

    Attributes:
      send: (x, the sender's PRNG keys [G], or None) -> what crosses, a pytree of arrays whose bytes are counted.
      receive: what crossed -> values to compute with, or to sum over senders.
      total: the sum over senders of what was received -> values to compute with.
      bounded: numbers to be weighted and sent -> within what can be.
    """

    send: Callable[[Any, Keys | None], Payload]
    receive: Callable[[Payload], Any]
    total: Callable[[Any], Any] = lambda x: x
    bounded: Callable[[Any], Any] = lambda x: x


class Channels(NamedTuple):
    """A run's channels, by what goes through them."""

    activations: Channel
    hidden_states: Channel
    head_gradient: Channel
    input_gradient: Channel
    gradient: Channel | None  # a client's weighted part of the segment's mean gradient; None: unchanged
    mean: Channel | None  # the mean gradient on its way back; None: unchanged
    questions: Channel  # activations of held-out text, for evaluation over a network: guarded alike, and never coded


class Cut(NamedTuple):
    """What both sides agree on: the segments, the channels of messages, and which hidden states come back."""

    segments: Segments
    channels: Channels
    masked_only: bool  # whether the server returns hidden states at the client's positions only


class StepKeys(NamedTuple):
    """One step's PRNG keys, [C], or [G] for G groups of a client's rows; None where nothing is drawn."""

    client: Keys | None = None  # for dropout in the client's segments
    noise: Keys | None = None  # for the noise that the client adds to what it sends
    server: Keys | None = None  # for dropout in the body, drawn by the server


NO_KEYS = StepKeys()


def chain(*links: Channel) -> Channel:
    """Returns the channel that sends through all links, from left to right, and receives through them in reverse."""

    def send(x: Any, keys: Keys | None) -> Payload:
        for link in links:
            x = link.send(x, keys)
        return x

    def through(name: str, links: Sequence[Channel]) -> Callable[[Any], Any]:
        return lambda x: functools.reduce(lambda x, link: getattr(link, name)(x), links, x)

    return Channel(send, through("receive", links[::-1]), through("total", links[::-1]), through("bounded", links))


def codec(name: str, dtype: DTypeLike) -> Channel:
    """Returns the channel that sends numbers in a given type.

    Args:
      name: `float32` (as it was computed), `bfloat16`, or `int8`: integers from -127 to 127 in units of a scale, with one
        scale for each row along the last axis. A number is off by at most half a unit. Or one that was registered.
      dtype: the type in which the receiver computes.
    """
    if (make := CODECS[name]) is not None:
        if not isinstance(made := make(dtype), Channel):
            raise ConfigError(f"the codec {name!r} has made {made!r}: accepted: a Channel.")
        return made

    def send(x: jax.Array) -> Payload:
        if name == "float32":
            return x
        if name == "bfloat16":
            return x.astype(jnp.bfloat16)
        x = x.astype(jnp.float32)
        scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 127.0
        whole = jnp.round(x / jnp.where(scale > 0, scale, 1.0))
        return {"int8": whole.astype(jnp.int8), "scale": scale}

    def receive(payload: Payload) -> jax.Array:
        if name == "int8":
            return (payload["int8"].astype(jnp.float32) * payload["scale"]).astype(dtype)
        return payload.astype(dtype)

    leaf = lambda x: isinstance(x, dict) and "int8" in x  # noqa: E731
    return Channel(lambda x, _: jax.tree.map(send, x), lambda p: jax.tree.map(receive, p, is_leaf=leaf))


def clip(norm: float) -> Channel:
    """Returns the channel whose sender scales each row, along the last axis, down to at most this Euclidean norm."""

    def send(x: jax.Array) -> jax.Array:
        size = jnp.linalg.norm(x.astype(jnp.float32), axis=-1, keepdims=True)
        return (x * jnp.minimum(1.0, norm / jnp.maximum(size, 1e-12))).astype(x.dtype)

    return Channel(lambda x, _: jax.tree.map(send, x), lambda payload: payload)


def noise(deviation: float, tag: int) -> Channel:
    """Returns the channel whose sender adds Gaussian noise of this standard deviation to every number.

    Args:
      deviation: in units of what is sent.
      tag: keeps the noise of different messages of a step apart.
    """

    def send(x: jax.Array, keys: Keys | None) -> jax.Array:
        assert keys is not None, "noise needs keys"
        groups = x.reshape(keys.shape[0], -1)
        draw = lambda key: jax.random.normal(jax.random.fold_in(key, tag), groups.shape[1:])  # noqa: E731
        return x + (deviation * jax.vmap(draw)(keys)).reshape(x.shape).astype(x.dtype)

    return Channel(send, lambda payload: payload)


def make_channels(wire: WireConfig, dtype: DTypeLike) -> Channels:
    """Returns the channels of a run's messages.

    Args:
      wire: the config of the four messages and of gradients that are averaged.
      dtype: of activations and their gradients at the receiver.
    """
    plain = codec(wire.codec, dtype)

    def guarded(norm: float | None, deviation: float, tag: int, coded: Channel = plain) -> Channel:
        links = ([clip(norm)] if norm is not None else []) + ([noise(deviation, tag)] if deviation else [])
        return chain(*links, coded) if links else coded

    gradient = mean = None
    if wire.gradient_codec != "float32":
        gradient, mean = codec(wire.gradient_codec, jnp.float32), codec("bfloat16", jnp.float32)
    return Channels(
        activations=guarded(wire.clip, wire.noise, 0),
        hidden_states=plain,
        head_gradient=guarded(wire.gradient_clip, wire.gradient_noise, 1),
        input_gradient=plain,
        gradient=gradient,
        mean=mean,
        questions=guarded(wire.clip, wire.noise, 0, codec("float32", jnp.float32)),
    )


def make_cut(segments: Segments, wire: WireConfig) -> Cut:
    """Returns a model's cut with the channels that the config sets."""
    return Cut(segments, make_channels(wire, segments.dtype), wire.downlink == "masked")


def num_bytes(tree: Any) -> int:
    """Returns the bytes of a pytree of arrays (or of their shapes)."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def by_way(sizes: Mapping[str, int], way: Way) -> dict[str, int]:
    """Returns the bytes of the messages that go in one direction."""
    return {name: size for name, size in sizes.items() if MESSAGES[name] == way}

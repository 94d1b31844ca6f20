"""The three segments of a cut BERT, as pure functions of parameter pytrees.

    embed(client_params, batch)                      [B, T]    -> h [B, T, D]
    transform(server_params, h, positions, lengths)  [B, T, D] -> z [B, M, D] at the positions asked for, or [B, T, D]
    loss(client_params, z, batch)                    [B, M, D] -> scalar, over logits [B, M, V]

`nnx.split` is called only here; every runtime (simulated, centralised, fine-tuning, export) uses these same functions, so a
client is nothing but a leading axis on a pytree of arrays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from fedbert_jax.config import ModelConfig
from fedbert_jax.data.masking import MaskedBatch
from fedbert_jax.models.layers import ClassifierSegment, ClientSegment, Layer, fold_in

Params = Any  # a nested dict of float arrays
ClientParams = Params  # what a client holds: embeddings, head, and the first `model.client_layers` layers
ServerParams = Params  # what the server holds: {"layers": leaves [L, ...]}
Keys = jax.Array  # PRNG keys [G], one for each of G equal groups of rows
OWN_LAYERS = np.uint32(2**32 - 1)  # a tag of the client's own layers; no position in a batch has this number


class Embed(Protocol):
    """Maps a batch [B, T] to h [B, T, D]."""

    def __call__(self, params: ClientParams, batch: MaskedBatch, keys: Keys | None = None) -> jax.Array: ...


class Transform(Protocol):
    """Maps h [B, T, D] to z [B, M, D] at positions [B, M], or to [B, T, D] without them; lengths [B] leave padding out."""

    def __call__(
        self,
        params: ServerParams,
        h: jax.Array,
        positions: jax.Array | None = None,
        lengths: jax.Array | None = None,
        keys: Keys | None = None,
    ) -> jax.Array: ...


class Predict(Protocol):
    """Maps z [B, M, D] to float32 logits [B, M, V], or to a classifier's outputs [B, M, n]."""

    def __call__(self, params: ClientParams, z: jax.Array, keys: Keys | None = None) -> jax.Array: ...


class Loss(Protocol):
    """Returns the mean loss of `predict` on z [B, M, D], over the batch's positions of weight 1."""

    def __call__(self, params: ClientParams, z: jax.Array, batch: MaskedBatch, keys: Keys | None = None) -> jax.Array: ...


class Segments(NamedTuple):
    """A model cut in a U. Without keys there is no dropout.

    Attributes:
      config: resolved.
      dtype: of h, z and their gradients, in which a receiver computes.
      init: (the client's PRNG key, the server's) -> new parameters, float32: the client segment's, and the body's [L, ...].
      embed: (client's parameters, batch, keys) -> h [B, T, D].
      transform: (body's parameters, h, positions, lengths, keys) -> z [B, M, D] at positions [B, M], or at all.
      predict: (client's parameters, z, keys) -> float32 logits [B, M, V], or a classifier's outputs [B, M, n].
      loss: (client's parameters, z, batch, keys) -> the mean over the batch's positions of weight 1, in nats.
    """

    config: ModelConfig
    dtype: jnp.dtype
    init: Callable[[jax.Array, jax.Array], tuple[ClientParams, ServerParams]]
    embed: Embed
    transform: Transform
    predict: Predict
    loss: Loss


def make_segments(config: ModelConfig, compute_dtype: DTypeLike = jnp.float32, outputs: int | None = None) -> Segments:
    """Builds the segments of a model.

    Args:
      config: resolved (`config.resolve_model`), so that every size is set.
      compute_dtype: of matmuls and activations; parameters, LayerNorm, softmax and loss are float32.
      outputs: None gives the client an MLM head; a number gives it a pooler and a classifier with that many classes, or,
        if it is 1, a regression.
    """
    assert config.num_layers is not None
    own, layers = config.client_layers, config.num_layers - config.client_layers  # the client's, the server's
    # cuDNN's attention takes no client axis, which a client's layers have.
    client_config = dataclasses.replace(config, attention="xla")

    def new_client(key: jax.Array) -> ClientSegment | ClassifierSegment:
        if outputs is None:
            return ClientSegment(config, dtype=compute_dtype, rngs=nnx.Rngs(key))
        return ClassifierSegment(config, outputs, dtype=compute_dtype, rngs=nnx.Rngs(key))

    def new_layer(key: jax.Array, config: ModelConfig = config) -> Layer:
        return Layer(config, dtype=compute_dtype, rngs=nnx.Rngs(key))

    shape_key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
    client_def, _ = nnx.split(nnx.eval_shape(new_client, shape_key))
    layer_def, _ = nnx.split(nnx.eval_shape(new_layer, shape_key))
    own_layer_def, _ = nnx.split(nnx.eval_shape(lambda key: new_layer(key, client_config), shape_key))

    def init(client_key: jax.Array, server_key: jax.Array) -> tuple[ClientParams, ServerParams]:
        client = nnx.to_pure_dict(nnx.state(new_client(client_key)))
        stack = jax.vmap(lambda k: nnx.to_pure_dict(nnx.state(new_layer(k))))
        if own:
            client["layers"] = stack(jax.random.split(jax.random.fold_in(client_key, OWN_LAYERS), own))
        return client, {"layers": stack(jax.random.split(server_key, layers))}  # leaves [L, ...]

    def run(
        definition: Any,
        stack: Params,
        count: int,
        x: jax.Array,
        lengths: jax.Array | None,
        keys: Keys | None,
        positions: jax.Array | None,
    ) -> jax.Array:
        """Runs a stack of `count` layers on x [B, T, D]."""
        batch, length, size = x.shape
        mask = None if lengths is None else attention_mask(lengths, length)

        def apply(x: jax.Array, params: Params, index: jax.Array, asked: jax.Array | None) -> jax.Array:
            return nnx.merge(definition, params)(x, (batch, length), mask, fold_in(keys, index), asked)

        if config.remat == "full":
            apply = jax.checkpoint(apply)
        elif config.remat == "dots":
            apply = jax.checkpoint(apply, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
        x, last = x.astype(compute_dtype).reshape(batch * length, size), count - 1
        if config.unroll_layers or not last:  # an empty scan, mapped over clients, gives NaN on CPU
            for n in range(last):
                x = apply(x, jax.tree.map(lambda leaf: leaf[n], stack), jnp.int32(n), None)  # noqa: B023
        else:
            below = (jax.tree.map(lambda leaf: leaf[:last], stack), jnp.arange(last))
            x, _ = jax.lax.scan(lambda x, layer: (apply(x, *layer, None), None), x, below)
        # The last layer computes only the positions asked for; of the others it needs only their keys and values.
        x = apply(x, jax.tree.map(lambda leaf: leaf[last], stack), jnp.int32(last), positions)
        return x.reshape(batch, -1, size)

    def head_of(params: ClientParams) -> Any:
        return nnx.merge(client_def, {name: part for name, part in params.items() if name != "layers"})

    def embed(params: ClientParams, batch: MaskedBatch, keys: Keys | None = None) -> jax.Array:
        h = head_of(params).embed(batch.tokens, batch.token_types, keys)
        if own:
            h = run(own_layer_def, params["layers"], own, h, batch.lengths, fold_in(keys, OWN_LAYERS), None)
        return h

    def transform(
        params: ServerParams,
        h: jax.Array,
        positions: jax.Array | None = None,
        lengths: jax.Array | None = None,
        keys: Keys | None = None,
    ) -> jax.Array:
        return run(layer_def, params["layers"], layers, h, lengths, keys, positions)

    def predict(params: ClientParams, z: jax.Array, keys: Keys | None = None) -> jax.Array:
        return head_of(params).predict(z.astype(compute_dtype), keys)

    def loss(params: ClientParams, z: jax.Array, batch: MaskedBatch, keys: Keys | None = None) -> jax.Array:
        return head_of(params).loss(z.astype(compute_dtype), batch.labels, batch.weights, keys)

    return Segments(config, jnp.dtype(compute_dtype), init, embed, transform, predict, loss)


def attention_mask(lengths: jax.Array, size: int) -> jax.Array:
    """Returns the mask [..., T] of sequences with `lengths` [...] tokens before the padding: 1 for a token."""
    place = jax.lax.broadcasted_iota(jnp.int32, (*lengths.shape, size), lengths.ndim)
    return (place < lengths[..., None].astype(jnp.int32)).astype(jnp.int32)


def count_parameters(params: Params) -> int:
    """Returns how many numbers a parameter pytree holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))

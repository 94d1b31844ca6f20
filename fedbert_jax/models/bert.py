"""The three segments of a cut BERT, as pure functions of parameter pytrees.

    embed(client_params, tokens)            [B, T]    -> h [B, T, D]
    transform(server_params, h, positions)  [B, T, D] -> z [B, M, D] at the positions asked for, or [B, T, D]
    predict(client_params, z)               [B, M, D] -> logits [B, M, V]

`nnx.split` is called once, here; every runtime (simulated, centralised, export) uses these same functions, so a client
is nothing but a leading axis on a pytree of arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from fedbert_jax.config import ModelConfig
from fedbert_jax.models.layers import ClassifierSegment, ClientSegment, Layer, fold_in

Params = Any  # a nested dict of float arrays


class Segments(NamedTuple):
    """A model cut in a U. Keys are PRNG keys [G], one for each of G equal groups of rows, or None for no dropout."""

    config: ModelConfig
    init: Callable[[jax.Array, jax.Array], tuple[Params, Params]]  # (client's key, server's) -> parameters of each
    embed: Callable[..., jax.Array]  # (client_params, tokens [B, T], keys=None, token_types=None) -> [B, T, D]
    # (server_params, h [B, T, D], keys=None, attention_mask=None, positions [B, M]=None) -> [B, M, D]; without, [B, T, D]
    transform: Callable[..., jax.Array]
    predict: Callable[..., jax.Array]  # (client_params, z [B, M, D], keys=None) -> float32 logits [B, M, V or outputs]
    # (client_params, z [B, M, D], labels [B, M], weights [B, M], keys=None) -> the mean loss of what `predict` gives
    loss: Callable[..., jax.Array]


def make_segments(
    config: ModelConfig, compute_dtype: DTypeLike = jnp.float32, outputs: int | None = None
) -> Segments:
    """Builds the segments of a model.

    Args:
      config: resolved (`config.resolve_model`): every size is set.
      compute_dtype: of matmuls and activations; parameters, LayerNorm, softmax and loss are float32.
      outputs: None gives the client an MLM head; a number gives it a pooler and a classifier of so many classes, or, with
        1, a regression.
    """
    layers = config.num_layers
    assert layers is not None

    def new_client(key: jax.Array) -> ClientSegment | ClassifierSegment:
        if outputs is None:
            return ClientSegment(config, dtype=compute_dtype, rngs=nnx.Rngs(key))
        return ClassifierSegment(config, outputs, dtype=compute_dtype, rngs=nnx.Rngs(key))

    def new_layer(key: jax.Array) -> Layer:
        return Layer(config, dtype=compute_dtype, rngs=nnx.Rngs(key))

    shape_key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
    client_def, _ = nnx.split(nnx.eval_shape(new_client, shape_key))
    layer_def, _ = nnx.split(nnx.eval_shape(new_layer, shape_key))

    def init(client_key: jax.Array, server_key: jax.Array) -> tuple[Params, Params]:
        client = nnx.to_pure_dict(nnx.state(new_client(client_key)))
        stack = jax.vmap(lambda k: nnx.to_pure_dict(nnx.state(new_layer(k))))
        return client, {"layers": stack(jax.random.split(server_key, layers))}  # leaves [L, ...]

    def embed(
        client_params: Params, tokens: jax.Array, keys: jax.Array | None = None, token_types: jax.Array | None = None
    ) -> jax.Array:
        return nnx.merge(client_def, client_params).embed(tokens, token_types, keys)

    def transform(
        server_params: Params, h: jax.Array, keys: jax.Array | None = None, attention_mask: jax.Array | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:  # fmt: skip
        batch, length, size = h.shape

        def apply(x: jax.Array, params: Params, index: jax.Array, asked: jax.Array | None) -> jax.Array:
            return nnx.merge(layer_def, params)(x, (batch, length), attention_mask, fold_in(keys, index), asked)

        if config.remat == "full":
            apply = jax.checkpoint(apply)
        elif config.remat == "dots":
            apply = jax.checkpoint(apply, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
        x, stack, last = h.astype(compute_dtype).reshape(batch * length, size), server_params["layers"], layers - 1
        if config.unroll_layers or not last:  # an empty scan, mapped over clients, gives NaN on CPU
            for n in range(last):
                x = apply(x, jax.tree.map(lambda leaf: leaf[n], stack), jnp.int32(n), None)  # noqa: B023
        else:
            below = (jax.tree.map(lambda leaf: leaf[:last], stack), jnp.arange(last))
            x, _ = jax.lax.scan(lambda x, layer: (apply(x, *layer, None), None), x, below)
        # The last layer makes only what is asked for; all it needs of the other positions is their keys and values.
        x = apply(x, jax.tree.map(lambda leaf: leaf[last], stack), jnp.int32(last), positions)
        return x.reshape(batch, -1, size)

    def predict(client_params: Params, z: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        return nnx.merge(client_def, client_params).predict(z.astype(compute_dtype), keys)

    def loss(
        client_params: Params, z: jax.Array, labels: jax.Array, weights: jax.Array, keys: jax.Array | None = None
    ) -> jax.Array:
        return nnx.merge(client_def, client_params).loss(z.astype(compute_dtype), labels, weights, keys)

    return Segments(config, init, embed, transform, predict, loss)


def count_parameters(params: Params) -> int:
    """Returns how many numbers a parameter pytree holds."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))

"""The Flax NNX modules of BERT, grouped by who holds them: `ClientSegment` and one Transformer `Layer`.

Post-LN, exact GELU, learned positions and token types, as in Devlin et al. 2019; the numbers are those that
`transformers.BertForMaskedLM` computes. Modules hold parameters only; a dropout key comes with the call.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from fedbert_jax.config import ModelConfig
from fedbert_jax.devices import tuning
from fedbert_jax.models.losses import chunked_cross_entropy, cross_entropy, squared_error


def dropout(x: jax.Array, rate: float, keys: jax.Array | None) -> jax.Array:
    """Zeroes entries of x with probability `rate` and scales the rest by 1 / (1 - rate).

    Args:
      x: [R, T, D]; its rows fall into G equal groups, one per client.
      rate: probability of a zero.
      keys: PRNG keys [G], or None for no dropout. The draw for (row, position, channel) depends on these three, the group's
        own key and the number of its rows. It depends neither on T and D, so that a batch may be padded for another's
        sake, nor on the other groups in it.
    """
    if keys is None or rate == 0.0:
        return x
    rows = x.shape[0] // keys.shape[0]
    # One key for each (row, position), by a number that doesn't contain T. Under one key, a draw depends on its channel.
    places = jnp.arange(rows)[:, None] + rows * jnp.arange(x.shape[1])[None]  # [R/G, T]

    def draw(key: jax.Array, place: jax.Array) -> jax.Array:
        return jax.random.bernoulli(jax.random.fold_in(key, place), 1.0 - rate, x.shape[2:])

    kept = jax.vmap(jax.vmap(jax.vmap(draw, (None, 0)), (None, 0)), (0, None))(keys, places)  # [G, R/G, T, D]
    return jnp.where(kept.reshape(x.shape), x / (1.0 - rate), jnp.zeros((), x.dtype))


def take_positions(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Returns x [..., T, D] at positions [..., M]: [..., M, D]."""
    return jnp.take_along_axis(x, positions[..., None].astype(jnp.int32), axis=-2)


def fold_in(keys: jax.Array | None, data: int | np.uint32 | jax.Array) -> jax.Array | None:
    """Folds `data` into each of keys [G]; None stays None."""
    return None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, data)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU, x * Phi(x) (Hendrycks & Gimpel 2016), of x [...]."""
    return jax.nn.gelu(x, approximate=False)


def _gelu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gelu(x), x


def _gelu_backward(x: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    cdf = 0.5 * (1.0 + jax.lax.erf(x * 2.0**-0.5))
    pdf = jnp.exp(-0.5 * x * x) * (2.0 * jnp.pi) ** -0.5
    dx = g * (cdf + x * pdf)
    return (jax.lax.optimization_barrier(dx) if tuning.keeps_gelu_gradient_apart() else dx,)


gelu.defvjp(_gelu_forward, _gelu_backward)


class LayerNorm(nnx.Module):
    """Layer normalisation, computed in float32; returns the dtype of its input."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        assert config.hidden_size is not None
        self.norm = nnx.LayerNorm(
            config.hidden_size, epsilon=config.layer_norm_eps, dtype=jnp.float32, use_fast_variance=False, rngs=rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(x).astype(x.dtype)


class SelfAttention(nnx.Module):
    """Multi-head self-attention with one fused projection, and the output projection."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        size, init = config.hidden_size, nnx.initializers.normal(config.initializer_range)
        assert size is not None and config.num_heads is not None
        self.num_heads, self.dropout_rate = config.num_heads, config.attention_dropout
        self.flash = config.attention == "cudnn"  # "auto" has been resolved, or means the compiler's own
        # [D, 3, D] rather than [D, 3D]: the last axis splits by heads over devices without mixing q, k and v.
        self.qkv = nnx.LinearGeneral(size, (3, size), kernel_init=init, dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(size, size, kernel_init=init, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        shape: tuple[int, int],
        mask: jax.Array | None,
        keys: jax.Array | None,
        asked: jax.Array | None = None,
    ) -> jax.Array:
        """Lets each row of x [B*T, D], or only the rows `asked` [B*M, D] of it, attend to all of x."""
        batch = shape[0]
        if asked is None:
            qkv = self.qkv(x)  # [B*T, 3, D]
            rows = (qkv[:, 0], qkv[:, 1], qkv[:, 2])
        else:
            kv = self._project(x, slice(1, 3))  # [B*T, 2, D]
            rows = (self._project(asked, slice(0, 1))[:, 0], kv[:, 0], kv[:, 1])
        q, k, v = (r.reshape(batch, r.shape[0] // batch, self.num_heads, -1) for r in rows)  # [B, M or T, H, D/H]
        mask = None if mask is None else mask[:, None, None, :].astype(bool)  # [B, 1, 1, T]
        if keys is None or self.dropout_rate == 0.0:
            flash = self.flash and mask is None  # cuDNN takes no mask [B, 1, 1, T]
            y = jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn" if flash else None)
        else:  # the fused kernels have no dropout on the probabilities
            scores = jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
            if mask is not None:
                scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
            probs = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
            flat = probs.reshape(-1, *probs.shape[2:])  # [B*H, M or T, T]
            probs = dropout(flat, self.dropout_rate, keys).reshape(probs.shape)
            y = jnp.einsum("bhts,bshd->bthd", probs, v)
        return self.out(y.reshape(rows[0].shape))

    def _project(self, x: jax.Array, part: slice) -> jax.Array:
        """Projects x [R, D] by some of q, k and v: [R, parts, D]."""
        assert self.qkv.bias is not None
        kernel, bias = (leaf[...].astype(x.dtype) for leaf in (self.qkv.kernel, self.qkv.bias))
        return jnp.tensordot(x, kernel[:, part], 1) + bias[None, part]


class Layer(nnx.Module):
    """One Transformer layer of the server's body."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        size, wide, init = config.hidden_size, config.intermediate_size, nnx.initializers.normal(config.initializer_range)
        assert size is not None and wide is not None
        self.dropout_rate = config.hidden_dropout
        self.attention = SelfAttention(config, dtype=dtype, rngs=rngs)
        self.attention_norm = LayerNorm(config, rngs=rngs)
        self.up = nnx.Linear(size, wide, kernel_init=init, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(wide, size, kernel_init=init, dtype=dtype, rngs=rngs)
        self.output_norm = LayerNorm(config, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        shape: tuple[int, int],
        mask: jax.Array | None,
        keys: jax.Array | None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """Maps x [B*T, D] to [B*T, D], or to [B*M, D], only at `positions` [B, M].

        `shape` is (B, T), `mask` [B, T] is 1 where a token is real, `keys` are [G].
        """
        # Flat rows: XLA on CPU multiplies [B*T, D] 12-18% faster than [B, T, D].
        asked = None
        if positions is not None:
            asked = take_positions(x.reshape(*shape, -1), positions).reshape(positions.size, -1)
        drop = lambda y, n: dropout(  # noqa: E731
            y.reshape(shape[0], -1, y.shape[-1]), self.dropout_rate, fold_in(keys, n)
        ).reshape(y.shape)
        attended = drop(self.attention(x, shape, mask, fold_in(keys, 0), asked), 1)
        x = self.attention_norm((x if asked is None else asked) + attended)
        y = self.down(gelu(self.up(x)))
        return self.output_norm(x + drop(y, 2))


class Embeddings(nnx.Module):
    """Word, position and token type embeddings, summed and normalised."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        size, init = config.hidden_size, nnx.initializers.normal(config.initializer_range)
        assert size is not None and config.vocab_size is not None
        self.dropout_rate = config.hidden_dropout
        self.word = nnx.Embed(config.vocab_size, size, embedding_init=init, rngs=rngs)
        self.position = nnx.Embed(config.max_position_embeddings, size, embedding_init=init, rngs=rngs)
        self.token_type = nnx.Embed(config.type_vocab_size, size, embedding_init=init, rngs=rngs)
        self.norm = LayerNorm(config, rngs=rngs)

    def __call__(self, tokens: jax.Array, token_types: jax.Array | None, keys: jax.Array | None) -> jax.Array:
        length = tokens.shape[-1]
        # Without token types, every token has row 0: it is broadcast, not gathered.
        types = self.token_type.embedding[:1][None] if token_types is None else self.token_type(token_types)
        x = self.word(tokens) + self.position.embedding[:length][None] + types
        return dropout(self.norm(x), self.dropout_rate, keys)


class MlmHead(nnx.Module):
    """The MLM transform (dense, GELU, LayerNorm) and the decoder's bias; the decoder's matrix is the word table."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        size, init = config.hidden_size, nnx.initializers.normal(config.initializer_range)
        assert size is not None and config.vocab_size is not None
        self.dense = nnx.Linear(size, size, kernel_init=init, dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(config, rngs=rngs)
        self.bias = nnx.Param(jnp.zeros((config.vocab_size,)))

    def features(self, z: jax.Array) -> jax.Array:
        """Maps hidden states [R, D] to the decoder's input, [R, D]."""
        return self.norm(gelu(self.dense(z)))

    def __call__(self, z: jax.Array, table: jax.Array) -> jax.Array:
        x = self.features(z)
        contract = (((1,), (1,)), ((), ()))
        logits = jax.lax.dot_general(x, table.astype(x.dtype), contract, preferred_element_type=jnp.float32)
        return logits + self.bias[None, :]


class ClientSegment(nnx.Module):
    """What a client holds: the embeddings and the MLM head, tied through the word table."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.embeddings = Embeddings(config, rngs=rngs)
        self.head = MlmHead(config, dtype=dtype, rngs=rngs)
        self.dtype, self.logits_at_once = dtype, config.logits_at_once

    def embed(self, tokens: jax.Array, token_types: jax.Array | None, keys: jax.Array | None) -> jax.Array:
        return self.embeddings(tokens, token_types, keys).astype(self.dtype)

    def predict(self, z: jax.Array, keys: jax.Array | None) -> jax.Array:
        del keys  # the MLM head has no dropout
        return self.head(z.reshape(-1, z.shape[-1]), self.embeddings.word.embedding[...]).reshape(*z.shape[:-1], -1)

    def loss(self, z: jax.Array, labels: jax.Array, weights: jax.Array, keys: jax.Array | None) -> jax.Array:
        """The mean cross-entropy of the logits at z [B, M, D]; there may be more logits than fit in memory at a time."""
        if self.logits_at_once is None:
            return cross_entropy(self.predict(z, keys), labels, weights)
        x = self.head.features(z.reshape(-1, z.shape[-1]))
        table, bias = self.embeddings.word.embedding[...], self.head.bias[...]
        return chunked_cross_entropy(x, table, bias, labels.reshape(-1), weights.reshape(-1), self.logits_at_once)


class ClassifierSegment(nnx.Module):
    """What a client holds to classify sequences: the embeddings, the pooler and the classifier.

    Like `transformers.BertForSequenceClassification`: tanh of a dense layer on [CLS], dropout, a linear layer.
    """

    def __init__(self, config: ModelConfig, outputs: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        size, init = config.hidden_size, nnx.initializers.normal(config.initializer_range)
        assert size is not None
        self.embeddings = Embeddings(config, rngs=rngs)
        self.pooler = nnx.Linear(size, size, kernel_init=init, dtype=dtype, rngs=rngs)
        self.classifier = nnx.Linear(size, outputs, kernel_init=init, dtype=jnp.float32, rngs=rngs)
        self.dropout_rate, self.dtype, self.outputs = config.hidden_dropout, dtype, outputs

    def embed(self, tokens: jax.Array, token_types: jax.Array | None, keys: jax.Array | None) -> jax.Array:
        return self.embeddings(tokens, token_types, keys).astype(self.dtype)

    def predict(self, z: jax.Array, keys: jax.Array | None) -> jax.Array:
        pooled = dropout(jnp.tanh(self.pooler(z)), self.dropout_rate, keys)  # [B, M, D], M = 1
        return self.classifier(pooled.astype(jnp.float32))

    def loss(self, z: jax.Array, labels: jax.Array, weights: jax.Array, keys: jax.Array | None) -> jax.Array:
        """The mean cross-entropy of `predict`'s classes, or the mean squared error of its one output."""
        mean = squared_error if self.outputs == 1 else cross_entropy
        return mean(self.predict(z, keys), labels, weights)

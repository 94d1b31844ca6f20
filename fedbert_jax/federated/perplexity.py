"""Pseudo-perplexity: every token of a text predicted from all others of its block, one [MASK] at a time.

Salazar et al., "Masked Language Model Scoring" (ACL 2020): exp of the mean of -log p(token | the rest of the block).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from fedbert_jax.data.masking import MaskedBatch
from fedbert_jax.federated.joined import joined_logits
from fedbert_jax.federated.state import Pair
from fedbert_jax.models.bert import Segments

AT_ONCE = 16  # rows of a block, each with another token masked, that go through the model together


def pseudo_log_likelihood(segments: Segments, model: Pair, tokens: jax.Array, asked: jax.Array, mask_id: int) -> jax.Array:
    """Returns the summed loss in nats and the count of the tokens asked for, float32 [S, 2], a row a block.

    A block costs T forward passes of a block.

    Args:
      segments: the model's functions.
      model: its parameters.
      tokens: int32 [S, T].
      asked: bool [S, T], which tokens are predicted.
      mask_id: the token [MASK].
    """
    length = tokens.shape[1]
    at_once = min(AT_ONCE, length)
    places = jnp.arange(length + -length % at_once).reshape(-1, at_once)  # those beyond T weigh 0

    def block(one: tuple[jax.Array, jax.Array]) -> jax.Array:
        row, wanted = one

        def some(places: jax.Array) -> jax.Array:
            where = jnp.minimum(places, length - 1)
            rows = jnp.where(jnp.arange(length)[None] == where[:, None], mask_id, row[None])  # [P, T]
            weights = (wanted[where] & (places < length)).astype(jnp.float32)
            batch = MaskedBatch(rows, where[:, None], row[where][:, None], weights[:, None])
            logits = joined_logits(segments, model.client, model.server, batch)[:, 0]
            nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), row[where][:, None], axis=-1)[:, 0]
            return jnp.stack([jnp.sum(jnp.where(weights > 0, nll, 0.0)), jnp.sum(weights)])

        return jnp.sum(jax.lax.map(some, places), axis=0)

    return jax.lax.map(block, (tokens, asked))


def perplexity(sums: np.ndarray) -> float:
    """Returns the pseudo-perplexity of blocks whose sums [S, 2] these are; NaN if nothing was asked."""
    loss, count = np.asarray(sums, np.float64).sum(axis=0)
    return math.exp(min(loss / count, 700.0)) if count else math.nan

"""Masks packed blocks for language modelling: draws, inside the jit, which positions are masked and what replaces them."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class MaskedBatch(NamedTuple):
    """Sequences with M positions to predict at. Only `positions` and `lengths` may leave the client.

    Pre-training predicts the tokens that were masked. Fine-tuning has M = 1: the [CLS] at position 0, whose label is the
    sequence's (float32 for a regression).
    """

    tokens: jax.Array  # int32 [..., B, T], masked
    positions: jax.Array  # int32 [..., B, M], ascending
    labels: jax.Array  # int32 [..., B, M], the original tokens
    weights: jax.Array  # float32 [..., B, M], 0 where a block had fewer than M to mask
    token_types: jax.Array | None = None  # int32 [..., B, T]; None is all 0
    lengths: jax.Array | None = None  # int32 [..., B], tokens before the padding; None where nothing is padded


class MaskSpec(NamedTuple):
    """What masking needs to know about the vocabulary."""

    num_masked: int  # M
    vocab_size: int
    mask_id: int
    special_ids: tuple[int, ...]
    continuation: np.ndarray | None  # bool [V], true where a token continues a word; None masks single tokens
    by_sorting: bool = False  # chooses the M lowest draws by sorting all; the same positions: `tuning.masks_by_sorting`


def num_masked(mask_prob: float, seq_len: int) -> int:
    """Returns M: how many positions of a block are masked."""
    return math.ceil(Fraction(str(mask_prob)) * seq_len)  # exact for the decimal number: in floats, 0.07 * 100 is above 7


def mask_blocks(key: jax.Array, tokens: jax.Array, spec: MaskSpec, hide_all: bool = False) -> MaskedBatch:
    """Masks exactly M positions of each block (fewer only if fewer may be masked).

    Of the chosen positions, 80% become [MASK], 10% become a random token, and 10% stay (Devlin et al. 2019, 3.1). Special
    tokens are never chosen. With whole words (`spec.continuation`), a word is masked entirely or not at all; the word that
    would exceed M is left out, so a few positions may have weight 0.

    Args:
      key: a PRNG key, one for (seed, round, step, client).
      tokens: integers [B, T].
      spec: the vocabulary's facts.
      hide_all: every chosen position becomes [MASK]. Held-out text is scored this way, so that predictions come from the
        context alone.
    """
    tokens = jnp.asarray(tokens, jnp.int32)
    rows, length, m = tokens.shape[0], tokens.shape[1], spec.num_masked
    # One call of the generator for all three draws, since it costs most to compile.
    bits = jax.random.bits(key, (rows, length + 2 * m), jnp.uint32)
    uniform = (bits[:, : length + m] >> 8).astype(jnp.float32) * 2.0**-24  # in [0, 1)
    scores, draw = uniform[:, :length], uniform[:, length:]
    random_ids = (bits[:, length + m :] % jnp.uint32(spec.vocab_size)).astype(jnp.int32)
    special = jnp.zeros((spec.vocab_size,), bool).at[jnp.array(spec.special_ids)].set(True)
    maskable = ~special[tokens]  # [B, T]

    if spec.continuation is not None:
        # One draw per word: every token takes the score of the position where its word begins.
        begins = ~jnp.asarray(spec.continuation)[tokens] | ~maskable
        begins = begins.at[:, 0].set(True)
        start = jax.lax.cummax(jnp.where(begins, jnp.arange(length)[None], 0), axis=1)  # [B, T]
        scores = jnp.take_along_axis(scores, start, axis=1)
    scores = jnp.where(maskable, scores, 2.0)  # past every draw, so chosen last
    # In reading order, which doesn't reveal the order of the draw.
    positions = jnp.sort(_smallest(scores, m, spec.by_sorting), axis=1)
    weights = jnp.take_along_axis(maskable, positions, axis=1)
    if spec.continuation is not None:
        rank = jnp.sum(scores[:, None, :] <= scores[:, :, None], axis=2)  # [B, T]: tokens in all words drawn up to this one
        weights &= jnp.take_along_axis(rank, positions, axis=1) <= m

    labels = jnp.take_along_axis(tokens, positions, axis=1)
    others = jnp.where(draw < 0.9, random_ids, labels)
    replaced = jnp.where((draw < 0.8) | hide_all, spec.mask_id, others)
    replaced = jnp.where(weights, replaced, labels)
    # Mapped over the rows, which the compiler then leaves where they are; with row numbers in an index it would gather all.
    masked = jax.vmap(lambda row, where, what: row.at[where].set(what))(tokens, positions, replaced)
    return MaskedBatch(masked, positions, labels, weights.astype(jnp.float32))


def _smallest(scores: jax.Array, count: int, by_sorting: bool) -> jax.Array:
    """Returns the positions, int32 [B, count], of each row's smallest scores [B, T]; of equal scores, the first win."""
    if by_sorting:
        places = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        return jax.lax.sort_key_val(scores, places)[1][:, :count]
    return jax.lax.top_k(-scores, count)[1]

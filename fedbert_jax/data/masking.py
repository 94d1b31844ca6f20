"""Masked language modelling on packed blocks, drawn inside the jit: which positions, and what stands there instead."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class MaskedBatch(NamedTuple):
    """Sequences with M positions to predict at. Of these, only `positions` and `lengths` may leave the client.

    Pre-training predicts the tokens that were masked; fine-tuning has M = 1, the [CLS] at position 0, and its label is
    the sequence's (float32 for a regression).
    """

    tokens: jax.Array  # int32 [..., B, T], masked
    positions: jax.Array  # int32 [..., B, M], ascending
    labels: jax.Array  # int32 [..., B, M], the tokens that stood there
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


def num_masked(mask_prob: float, seq_len: int) -> int:
    """Returns M: how many positions of a block are masked."""
    return math.ceil(Fraction(str(mask_prob)) * seq_len)  # of the decimal number: 0.07 * 100 is above 7 in floats


def mask_blocks(key: jax.Array, tokens: jax.Array, spec: MaskSpec, hide_all: bool = False) -> MaskedBatch:
    """Masks exactly M positions of each block (fewer only where a block has fewer that may be masked).

    Of the chosen positions 80% become [MASK], 10% a random token, 10% stay (Devlin et al. 2019, 3.1). Special tokens
    are never chosen. With whole words (`spec.continuation`), a word is masked entirely or not at all; the word that
    would exceed M is left out, so a few positions may have weight 0.

    Args:
      key: a PRNG key, one for (seed, round, step, client).
      tokens: integers [B, T].
      spec: the vocabulary's facts.
      hide_all: every chosen position becomes [MASK]. That is how held-out text is scored: what a model says there comes
        from the context alone.
    """
    tokens = jnp.asarray(tokens, jnp.int32)
    rows, length, m = tokens.shape[0], tokens.shape[1], spec.num_masked
    # One call of the generator for all three draws: it is what costs most to compile.
    bits = jax.random.bits(key, (rows, length + 2 * m), jnp.uint32)
    uniform = (bits[:, : length + m] >> 8).astype(jnp.float32) * 2.0**-24  # in [0, 1)
    scores, draw = uniform[:, :length], uniform[:, length:]
    random_ids = (bits[:, length + m :] % jnp.uint32(spec.vocab_size)).astype(jnp.int32)
    special = jnp.zeros((spec.vocab_size,), bool).at[jnp.array(spec.special_ids)].set(True)
    maskable = ~special[tokens]  # [B, T]

    if spec.continuation is not None:
        # One draw a word: every token takes the score of the place its word begins at.
        begins = ~jnp.asarray(spec.continuation)[tokens] | ~maskable
        begins = begins.at[:, 0].set(True)
        start = jax.lax.cummax(jnp.where(begins, jnp.arange(length)[None], 0), axis=1)  # [B, T]
        scores = jnp.take_along_axis(scores, start, axis=1)
    scores = jnp.where(maskable, scores, 2.0)  # past every draw, so chosen last
    positions = jnp.sort(_smallest(scores, m), axis=1)  # in reading order: the order of the draw is nobody's business
    weights = jnp.take_along_axis(maskable, positions, axis=1)
    if spec.continuation is not None:
        rank = jnp.sum(scores[:, None, :] <= scores[:, :, None], axis=2)  # [B, T]: size of all words up to this one's
        weights &= jnp.take_along_axis(rank, positions, axis=1) <= m

    labels = jnp.take_along_axis(tokens, positions, axis=1)
    others = jnp.where(draw < 0.9, random_ids, labels)
    replaced = jnp.where((draw < 0.8) | hide_all, spec.mask_id, others)
    replaced = jnp.where(weights, replaced, labels)
    # Mapped over the rows, which the compiler then leaves where they are; of row numbers in an index it'd gather all.
    masked = jax.vmap(lambda row, where, what: row.at[where].set(what))(tokens, positions, replaced)
    return MaskedBatch(masked, positions, labels, weights.astype(jnp.float32))


def _smallest(scores: jax.Array, count: int) -> jax.Array:
    """Returns the places int32 [B, count] of each row's smallest scores [B, T]; of equal ones, the first are taken."""
    if jax.sharding.get_abstract_mesh().size > 1:  # rows on several devices: top_k would gather all of them on each
        places = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        return jax.lax.sort_key_val(scores, places)[1][:, :count]
    return jax.lax.top_k(-scores, count)[1]  # two to four times as fast on a CPU

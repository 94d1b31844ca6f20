"""Reading rows that depend on their context: statistics of what a known segment makes of text that anybody may write."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np

from fedbert_jax.audit.geometry import best
from fedbert_jax.audit.tables import GUESSES, clipped_rows
from fedbert_jax.models.bert import ClientParams, Segments

BLOCKS = 900  # of text that are embedded
AT_ONCE = 50
SYNTHETIC = 0.25  # of the tokens are drawn at random, so that every word occurs in some context
FLOOR = 1e-3  # variance added in every direction, in mean squares of rows


class Pairs(NamedTuple):
    """Rows and the tokens that they were made from."""

    h: np.ndarray  # float32 [P, T, D]
    tokens: np.ndarray  # int [P, T]


def embedded(
    segments: Segments,
    params: ClientParams,
    public: np.ndarray | None,
    words: np.ndarray,
    mask_id: int,
    masked: int,
    length: int,
    blocks: int = BLOCKS,
    clip: float | None = None,
) -> Pairs:
    """Returns what a segment makes of public text, or of random words.

    Args:
      segments, params: the segment.
      public: int [N, T]; None: there is none, and all words are drawn at random.
      words: int [W], the tokens that may occur in text.
      mask_id, masked: [MASK], and at how many positions of a block it stands.
      length: T.
      blocks: P.
      clip: `wire.clip`.
    """
    rng = np.random.default_rng(0)
    random = words[rng.integers(0, len(words), (blocks, length))]
    tokens = random
    if public is not None and len(public):
        tokens = public[rng.integers(0, len(public), blocks)].copy()
        drawn = rng.random(tokens.shape) < SYNTHETIC
        tokens[drawn] = random[drawn]
    places = np.argsort(rng.random(tokens.shape), axis=1)[:, :masked]
    np.put_along_axis(tokens, places, mask_id, axis=1)  # none when fine-tuning

    @jax.jit
    def embed(tokens: jax.Array) -> jax.Array:
        return clipped_rows(segments, params, tokens, clip)

    padded = np.pad(tokens, ((0, -blocks % AT_ONCE), (0, 0))).astype(np.int32)
    h = np.concatenate([np.asarray(embed(padded[n : n + AT_ONCE])) for n in range(0, len(padded), AT_ONCE)])[:blocks]
    return Pairs(h, tokens)


class Discriminant:
    """A Gaussian for each word, with one spread for all (linear discriminant analysis), of rows without their position.

    Args:
      pairs: what it is fitted on.
      size: V.
      noise: standard deviation of the noise on the rows that will be read.
      log_prior: float [V], of words; None: all are as likely.
    """

    def __init__(self, pairs: Pairs, size: int, noise: float = 0.0, log_prior: np.ndarray | None = None):
        self.places = pairs.h.mean(axis=0)
        x, y = (pairs.h - self.places).reshape(-1, pairs.h.shape[-1]), pairs.tokens.ravel()
        counts = np.bincount(y, minlength=size)
        means = np.zeros((size, x.shape[1]), np.float32)
        np.add.at(means, y, x)
        self.means = means / np.maximum(counts, 1)[:, None]
        inner = x - self.means[y]
        spread = inner.T @ inner / len(x) + (FLOOR * np.mean(pairs.h**2) + noise**2) * np.eye(x.shape[1], dtype=np.float32)
        self.directions = np.linalg.solve(spread, self.means.T).T.astype(np.float32)
        self.bias = (-0.5 * np.sum(self.directions * self.means, axis=1)).astype(np.float32)
        if log_prior is not None:
            self.bias = self.bias + log_prior.astype(np.float32)
        self.bias[counts == 0] = -1e9  # it has never been seen

    def likeliest(self, h: np.ndarray, count: int = GUESSES) -> tuple[np.ndarray, np.ndarray]:
        """Returns the likeliest tokens of rows h [R, T, D] and their log-likelihoods up to a constant, [R, T, count]."""
        return best(h - self.places, self.directions, count, self.bias)

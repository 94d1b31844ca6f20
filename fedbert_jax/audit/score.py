"""What an attack has recovered: shares with an interval over blocks, beside what guessing without any message gives."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

RESAMPLES = 1000


class Score(NamedTuple):
    """Shares of tokens, as fractions."""

    top1: float
    top5: float
    low: float  # the 95% interval of `top1`, over blocks drawn with replacement
    high: float
    exact: float  # share of blocks of which every token is right
    bits: float  # learnt about a token, beyond its frequency
    tokens: int  # how many were asked for


class Floors(NamedTuple):
    """What is recovered without any message."""

    random: float  # by a word drawn at random
    unigram: float  # by the commonest word
    unigram5: float  # by the five commonest, in top-5


def score(guesses: np.ndarray, truth: np.ndarray, where: np.ndarray, frequencies: np.ndarray) -> Score:
    """Scores guesses.

    Args:
      guesses: int [R, N, 5], best first.
      truth: int [R, N].
      where: bool [R, N], what counts.
      frequencies: float [V], of words, summing to 1.
    """
    right = guesses == truth[..., None]
    first, five = right[..., 0] & where, right.any(axis=-1) & where
    counts = where.sum(axis=1)
    some = counts > 0
    draws = np.random.default_rng(0).integers(0, some.sum(), (RESAMPLES, int(some.sum())))
    shares = first.sum(axis=1)[some][draws].sum(axis=1) / counts[some][draws].sum(axis=1)
    low, high = np.quantile(shares, (0.025, 0.975))
    total = int(counts.sum())
    return Score(
        top1=float(first.sum() / total),
        top5=float(five.sum() / total),
        low=float(low),
        high=float(high),
        exact=float((first.sum(axis=1) == counts)[some].mean()),
        bits=_bits(right[where], truth[where], frequencies),
        tokens=total,
    )


def _bits(right: np.ndarray, truth: np.ndarray, frequencies: np.ndarray) -> float:
    """Returns by how many bits guesses shorten the description of a token.

    Without them it takes -log2 of the word's frequency. With them it takes the number of the right guess, or that there is
    none, in a code for how often each occurs; and the word itself if there is none.
    """
    alone = -np.log2(np.maximum(frequencies[truth], 1e-12))
    rank = np.where(right.any(axis=1), right.argmax(axis=1), right.shape[1])
    share = np.bincount(rank, minlength=right.shape[1] + 1) / len(rank)
    code = float(-np.sum(share[share > 0] * np.log2(share[share > 0])))
    with_guesses = code + float(np.sum(alone[rank == right.shape[1]])) / len(rank)
    return float(alone.mean()) - with_guesses


def floors(truth: np.ndarray, where: np.ndarray, frequencies: np.ndarray, words: int) -> Floors:
    """Returns what guessing gives on the same tokens.

    Args:
      truth, where, frequencies: as in `score`.
      words: how many words there are, without special tokens.
    """
    common = np.argsort(-frequencies)[:5]
    asked = truth[where]
    return Floors(1.0 / words, float(np.mean(asked == common[0])), float(np.mean(np.isin(asked, common))))

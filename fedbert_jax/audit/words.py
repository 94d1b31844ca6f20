"""Which rare words a client's text has, as whoever adds the segments up, or stands beside a client in turn, may tell."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata

from fedbert_jax.audit.views import Aggregate

RARE = 0.5  # quantile of the words' frequency, of those that occur, below which a word is rare


class Guessed(NamedTuple):
    """How well a number for each word tells the words that a client has from those that it hasn't."""

    auc: float  # area under the ROC curve, the mean over clients: .5 is chance
    low: float  # of the clients, the lowest and the highest
    high: float
    floor: float  # by how frequent a word is in everybody's text
    clients: int


def guess(aggregate: Aggregate, view: str, frequencies: np.ndarray) -> Guessed | None:
    """Scores a view of the aggregate over rare words; None if no client has some of them and lacks others.

    Args:
      aggregate: of a round.
      view: of its `views`. A client's number for a word is taken relative to the other clients' for the same word.
      frequencies: float [V], of words in everybody's text; 0 for what is no word.
    """
    occurs = frequencies > 0
    rare = occurs & (frequencies <= np.quantile(frequencies[occurs], RARE))
    seen = aggregate.views[view]
    scores, floors = [], []
    for c, held in enumerate(aggregate.held):
        truth = held[rare]
        if not truth.any() or truth.all():
            continue
        others = np.delete(seen, c, axis=0).mean(axis=0) if len(seen) > 1 else np.ones_like(seen[c])
        relative = seen[c] / (others + 1e-12 * max(float(seen.max()), 1e-30))
        scores.append(auc(relative[rare], truth))
        floors.append(auc(frequencies[rare], truth))
    if not scores:
        return None
    return Guessed(float(np.mean(scores)), min(scores), max(scores), float(np.mean(floors)), len(scores))


def auc(scores: np.ndarray, truth: np.ndarray) -> float:
    """Returns the share of pairs, of one in which `truth` holds and one in which not, that `scores` order rightly."""
    ranks, positive = rankdata(scores), int(truth.sum())
    return float((ranks[truth].sum() - positive * (positive + 1) / 2) / (positive * (len(truth) - positive)))

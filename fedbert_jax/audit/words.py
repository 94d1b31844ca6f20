"""Which rare words a client's text has, as whoever adds the segments up, or stands beside a client in turn, may tell.

What a word's row of the table does in a round is nearly the same at all clients that lack the word, and different at one
that has it: larger, or in another direction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata

from fedbert_jax.audit.views import Aggregate

RARE = 0.5  # quantile of the words' frequency, of those that occur, below which a word is rare
LITTLE = 0.1  # of a client's typical number: others' numbers are that large, at least, when its own are compared with them
AT_ONCE = 2048  # words


class Guessed(NamedTuple):
    """How well a number for each word tells the words that a client has from those that it hasn't."""

    auc: float  # area under the ROC curve, the mean over clients: .5 is chance
    low: float  # of the clients, the lowest and the highest
    high: float
    floor: float  # by how frequent a word is in everybody's text
    clients: int


def attacks(aggregate: Aggregate) -> list[str]:
    """Returns the names of the attacks that an aggregate allows."""
    return [name for name, (view, _) in ATTACKS.items() if view in aggregate.views]


def guess(aggregate: Aggregate, attack: str, frequencies: np.ndarray) -> Guessed | None:
    """Scores an attack over rare words; None if no client has some of them and lacks others.

    Args:
      aggregate: of a round.
      attack: of `ATTACKS`.
      frequencies: float [V], of words in everybody's text; 0 for what is no word.
    """
    view, found_by = ATTACKS[attack]
    occurs = frequencies > 0
    rare = occurs & (frequencies <= np.quantile(frequencies[occurs], RARE))
    numbers = found_by(aggregate.views[view])
    scores, floors = [], []
    for c, held in enumerate(aggregate.held):
        truth = held[rare]
        if not truth.any() or truth.all():
            continue
        scores.append(auc(numbers[c][rare], truth))
        floors.append(auc(frequencies[rare], truth))
    if not scores:
        return None
    return Guessed(float(np.mean(scores)), min(scores), max(scores), float(np.mean(floors)), len(scores))


# --- attacks: a number for each of C clients and V words, the larger the likelier the client has the word ---


def beside_others(sizes: np.ndarray) -> np.ndarray:
    """Returns sizes [C, V] relative to the middle one of the other clients'."""
    if len(sizes) == 1:
        return sizes
    typical = np.median(sizes, axis=1, keepdims=True)
    return np.asarray(sizes / (others_median(sizes) + LITTLE * typical + 1e-12 * max(float(sizes.max()), 1e-30)))


def by_size(moves: np.ndarray) -> np.ndarray:
    """How far a word's row moves, [C, V] of moves [C, V, D], beside the other clients'."""
    return beside_others(np.linalg.norm(moves, axis=-1))


def by_difference(moves: np.ndarray) -> np.ndarray:
    """How far from where the other clients' rows move, each number's middle one; of two clients, both are as far."""
    if len(moves) == 1:
        return np.linalg.norm(moves, axis=-1)
    parts = (moves[:, i : i + AT_ONCE] for i in range(0, moves.shape[1], AT_ONCE))
    return beside_others(np.concatenate([np.linalg.norm(x - others_median(x), axis=-1) for x in parts], axis=1))


def by_direction(moves: np.ndarray) -> np.ndarray:
    """How far from the way that most of the client's own rows move: an optimizer may make all moves equally long."""
    found = []
    for own in moves:
        ways = own / np.maximum(np.linalg.norm(own, axis=-1, keepdims=True), 1e-30)
        common = ways.mean(axis=0)
        found.append(1 - ways @ common / max(float(np.linalg.norm(common)), 1e-30))
    return np.stack(found)


ATTACKS: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {  # what is seen, of `Aggregate.views`, and the attack
    "gradient": ("gradient", beside_others),
    "moments": ("moments", beside_others),
    "move": ("move", by_size),
    "difference": ("move", by_difference),
    "direction": ("move", by_direction),
}


def others_median(x: np.ndarray) -> np.ndarray:
    """Returns for each of C > 1 clients the median over the others, of numbers [C, ...]."""
    order, others = np.sort(x, axis=0), len(x) - 1

    def place(j: int) -> np.ndarray:  # the number at place j when a client's own is taken out
        return np.where(x <= order[j], order[j + 1], order[j])

    return np.asarray((place((others - 1) // 2) + place(others // 2)) / 2)


def auc(scores: np.ndarray, truth: np.ndarray) -> float:
    """Returns the share of pairs, of one in which `truth` holds and one in which not, that `scores` order rightly."""
    ranks, positive = rankdata(scores), int(truth.sum())
    return float((ranks[truth].sum() - positive * (positive + 1) / 2) / (positive * (len(truth) - positive)))

"""Reading labels without a segment: dL/dz depends on the row of its label, and the cipher names rows of words.

The direction of dL/dz is taken for a linear function of its label's row and of z, with a rest that follows a multivariate t
distribution. That function and the labels are found together, in steps like those of expectation maximisation: the function
is fitted to rows weighted by how likely each is to be the label's; how far it then is from dL/dz, and which words public
text has between the words beside the position, say how likely each is. A position is judged by a function that is fitted to
others, so that a guess confirms itself as little as can be. Labels of known text that have a row stay what they are.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fedbert_jax.audit import cipher, known
from fedbert_jax.audit.decoder import Bigrams
from fedbert_jax.audit.geometry import unit
from fedbert_jax.audit.tables import GUESSES
from fedbert_jax.audit.views import Messages, View

WORDS = 4096  # the most frequent words that a label may be
SWEEPS = 20
HEAT, COOLED = 3.0, 12  # what likelihoods are at first held back by, and the sweeps after which they no longer are
FOLDS = 5  # parts of the positions, each of which is judged by what is fitted to the others
RIDGE = 300.0  # what is added to the squares of each feature, of N positions
SHARED = 0.2  # of the rest's mean variance, that is added in all directions
DEGREES = 30.0  # of freedom, of the t distribution
TOLD = 3.0  # guesses that a known label counts for
AT_ONCE = 256  # positions whose surroundings are looked up at a time


class Asked(NamedTuple):
    """The N positions at which labels are read, of the blocks that are attacked and then of the round's others."""

    z: np.ndarray  # what the head saw, centred and scaled, float32 [N, D]
    dz: np.ndarray  # what came back for it, of norm 1, float32 [N, D]
    words: np.ndarray  # that a label may be, [W]
    rows: np.ndarray  # theirs, centred, with a mean square of 1, float32 [W, D]
    beside: np.ndarray  # what public text says stands between the words beside, as logarithms, float32 [N, W]
    where: list[np.ndarray]  # which of them they are, bool [R, M] for each


class Named(NamedTuple):
    """The words that a log's groups are taken for."""

    names: np.ndarray  # of each group, [K]
    words: np.ndarray  # those that have rows, the most frequent, [W]
    rows: np.ndarray  # theirs, centred, with a mean square of 1, [W, D]


def read_labels(view: View) -> np.ndarray:
    """Returns the likeliest labels, int [R, M, 5], by public text and, if the view has answers, by known text."""
    asked = ask(view)
    labels, sure = np.zeros(len(asked.z), int), np.zeros(len(asked.z), bool)
    if view.answers is not None:
        labels, sure = _told(view, asked.where, asked.words)
    return _best(search(asked, labels, sure), asked.words, asked.where[0])


def read_beside(view: View) -> np.ndarray:
    """Returns the likeliest labels, int [R, M, 5], by the words beside alone: of dL/dz, only where it is 0 is used."""
    named, where = _name(view), _asked(view.messages)
    assert view.text is not None
    beside = _beside(view, view.messages, where, named, Bigrams(view.text, view.public.vocab_size))
    return _best(beside, named.words, where)


def ask(view: View) -> Asked:
    """Returns what is known of a round's positions before any label is guessed."""
    named = _name(view)
    assert view.text is not None
    bigrams = Bigrams(view.text, view.public.vocab_size)
    parts = [view.messages] if view.others is None else [view.messages, view.others]
    where = [_asked(m) for m in parts]
    z, dz = (
        np.concatenate([x[w] for x, w in zip(of, where, strict=True)]) for of in zip(*map(_crossed, parts), strict=True)
    )
    z, dz = (z - z.mean(axis=0)) / (z.std() + 1e-12), unit(dz)
    beside = np.concatenate([_beside(view, m, w, named, bigrams) for m, w in zip(parts, where, strict=True)])
    return Asked(z.astype(np.float32), dz.astype(np.float32), named.words, named.rows.astype(np.float32), beside, where)


def search(asked: Asked, labels: np.ndarray, sure: np.ndarray) -> np.ndarray:
    """Returns the log-probability of each word at each position, up to a constant of the position, [N, W].

    Args:
      asked: what is known of the positions.
      labels: the labels that are known, as places in `asked.rows`, int [N].
      sure: which those are, bool [N].
    """
    chances, width = np.exp(asked.beside), asked.dz.shape[1]
    places = np.flatnonzero(sure)
    chances[places] = 0
    chances[places, labels[places]] = 1
    weights = np.where(sure, TOLD, chances.max(axis=1))
    for sweep in range(SWEEPS):
        squares = distances(asked, chances, weights)
        scores = plausible(squares, width) / max(1.0, HEAT + (1 - HEAT) * sweep / COOLED) + asked.beside
        guessed = np.exp(scores - scores.max(axis=1, keepdims=True))
        guessed /= guessed.sum(axis=1, keepdims=True)
        guessed[places] = chances[places]
        chances = guessed
        weights = np.where(sure, TOLD, 1.0) * (DEGREES + width) / (DEGREES + (chances * squares).sum(axis=1))
    return scores


def plausible(squares: np.ndarray, width: int) -> np.ndarray:
    """Returns the t distribution's log-density at squared distances, in `width` dimensions, up to a constant."""
    return -0.5 * (DEGREES + width) * np.log1p(squares / DEGREES)


def distances(asked: Asked, chances: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns squared Mahalanobis distances of each dL/dz from what each word's row would make it, float32 [N, W].

    Args:
      asked: what is known of the positions.
      chances: of each word to be a position's label, float32 [N, W].
      weights: what each position counts, [N]; not all 0.
    """
    rows, size, width = asked.rows, len(asked.z), asked.dz.shape[1]
    folds = [np.arange(fold, size, FOLDS) for fold in range(FOLDS)]
    around = np.concatenate([asked.z, np.ones((size, 1), np.float32)], axis=1)
    sums = []
    for of in folds:
        features = np.concatenate([chances[of] @ rows, around[of]], axis=1).astype(np.float64)
        heavy = features.T * weights[of]
        products = heavy @ features
        products[:width, :width] += _spread(rows, chances[of], weights[of])
        sums.append((products, heavy @ asked.dz[of]))
    products, targets = (sum(of) for of in zip(*sums, strict=True))
    left, made, spread = [], [], np.zeros((width, width))
    for of, (own, own_targets) in zip(folds, sums, strict=True):
        by = np.linalg.solve(products - own + RIDGE * np.eye(len(products)), targets - own_targets).astype(np.float32)
        left.append(asked.dz[of] - around[of] @ by[width:])
        made.append(rows @ by[:width])
        apart = left[-1] - chances[of] @ made[-1]
        spread += (apart.T * weights[of]) @ apart + _spread(made[-1], chances[of], weights[of])
    spread = spread / weights.sum()
    spread += SHARED * np.trace(spread) / width * np.eye(width)
    whiten = np.linalg.cholesky(np.linalg.inv(spread)).astype(np.float32)
    squares = np.empty_like(chances)
    for of, here, there in zip(folds, left, made, strict=True):
        here, there = here @ whiten, there @ whiten
        between = np.sum(here**2, axis=1, keepdims=True) + np.sum(there**2, axis=1) - 2 * here @ there.T
        squares[of] = np.maximum(between, 0)
    return squares


def _spread(rows: np.ndarray, chances: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns how far rows [W, D] lie about the mean that chances [N, W] make of them, as a weighted sum, [D, D]."""
    means = chances @ rows
    return (rows.T * (weights @ chances)) @ rows - (means.T * weights) @ means


def _crossed(messages: Messages) -> tuple[np.ndarray, np.ndarray]:
    assert messages.z is not None and messages.dz is not None
    return messages.z, messages.dz


def _asked(messages: Messages) -> np.ndarray:
    """Returns which of a block's positions are predicted, bool [R, M]; for the others, padding, nothing came back."""
    return np.any(_crossed(messages)[1] != 0, axis=-1)


def _best(scores: np.ndarray, words: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Returns the best words at the positions that are `where`, int [R, M, 5]; `scores` may go on with other positions."""
    best = words[np.argsort(-scores[: where.sum()], axis=1, kind="stable")[:, :GUESSES]]
    guesses = np.full((*where.shape, GUESSES), best[0, 0])
    guesses[where] = np.pad(best, ((0, 0), (0, GUESSES - best.shape[1])), mode="edge")
    return guesses


def _name(view: View) -> Named:
    """Returns what public text, and known text if the view has answers, calls the groups of its log."""
    groups = view.log.groups
    assert view.text is not None
    if view.answers is None:
        told = np.full(len(groups.means), -1)
        names = view.log.names[:, 0]
    else:
        told = known.words_of(groups, view.log.geometry, view.answers.blocks)
        names = cipher.solve(groups.of, view.text, view.public.vocab_size, told)[:, 0]
    return Named(names, *_rows(view, names, told))


def _rows(view: View, names: np.ndarray, told: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the words that have rows, [W], and their mean rows, centred, with a mean square of 1, [W, D].

    Args:
      view: what is known.
      names: the word of each group, [K].
      told: the word of each group that known text tells, [K]; -1 for the others.
    """
    groups, size = view.log.groups, view.public.vocab_size
    counts = np.bincount(groups.of[groups.of >= 0], minlength=len(groups.means)).astype(np.float64)
    total, sums = np.zeros(size), np.zeros((size, groups.means.shape[1]))
    np.add.at(total, names, counts)
    np.add.at(sums, names, groups.means * counts[:, None])
    frequency = total.copy()
    if view.answers is not None:
        blocks = view.answers.blocks
        tokens, rows = blocks.tokens[blocks.where], view.log.geometry.centred(blocks.h)[blocks.where]
        total[tokens], sums[tokens] = 0, 0  # a guessed name may be wrong
        some = told >= 0
        np.add.at(total, told[some], counts[some])
        np.add.at(sums, told[some], groups.means[some] * counts[some, None])
        alone = ~np.isin(tokens, told)
        np.add.at(total, tokens[alone], 1)
        np.add.at(sums, tokens[alone], rows[alone])
        frequency = np.maximum(frequency, total)
    words = np.flatnonzero(total)
    words = words[np.argsort(-frequency[words], kind="stable")[:WORDS]]
    rows = sums[words] / total[words, None]
    rows -= rows.mean(axis=0)
    return words, rows / (np.sqrt(np.mean(rows**2)) + 1e-12)


def _beside(view: View, messages: Messages, where: np.ndarray, named: Named, bigrams: Bigrams) -> np.ndarray:
    """Returns log-probabilities of words at the places that are `where`, by the words beside them, float32 [N, W]."""
    assert messages.positions is not None
    names, words = named.names, named.words
    tokens = names[view.log.groups.nearest(view.log.geometry.centred(messages.h))]
    tokens = np.pad(np.where(messages.unasked, tokens, -1), ((0, 0), (1, 1)), constant_values=-1)
    block, place = np.nonzero(where)[0], messages.positions[where].astype(np.int64) + 1
    before, after = tokens[block, place - 1], tokens[block, place + 1]
    found = np.empty((len(block), len(words)), np.float32)
    plain = np.broadcast_to(bigrams.log_prior[words], (AT_ONCE, len(words)))
    for start in range(0, len(block), AT_ONCE):
        some = slice(start, start + AT_ONCE)
        left, right = before[some, None], after[some, None]
        follows = np.where(left >= 0, bigrams.after(*np.broadcast_arrays(np.maximum(left, 0), words)), plain[: len(left)])
        leads = bigrams.after(*np.broadcast_arrays(words, np.maximum(right, 0)))
        scores = follows + np.where(right >= 0, leads, 0)
        scores -= scores.max(axis=1, keepdims=True)
        found[some] = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    return found


def _told(view: View, where: list[np.ndarray], words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the known labels, as places in `words` [N], and where there is one, bool [N]."""
    answers, size = view.answers, view.public.vocab_size
    assert answers is not None and len(where) == 2
    labels = np.full(where[1].shape, -1)
    labels[answers.rows] = answers.labels
    found = np.concatenate([np.full(int(where[0].sum()), -1), labels[where[1]]])
    place = np.full(size, -1)
    place[words] = np.arange(len(words))
    found = np.where(found >= 0, place[found], -1)
    return np.maximum(found, 0), found >= 0

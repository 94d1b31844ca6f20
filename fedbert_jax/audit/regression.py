"""Reading labels without a segment: dL/dz depends on the row of its label, and the cipher names rows of words.

Of the positions whose label is known, or guessed, dL/dz is regressed on the label's row and on z; each position then gets
the word whose row explains its dL/dz best, and all is repeated with these: once with each counting the same, and once by how
far its word is ahead of the second, which finds more where there are many. What ends further ahead is taken. The first
guesses are the labels of known text or, without any, what public text says stands between the words beside a position.
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
RIDGE = 100.0
TOLD = 3.0  # mean guesses that a known label counts for
ENOUGH = 100  # known labels, from which on they are a better start alone
FREQUENT = 0.01  # of a logarithm of frequency, and of what the words beside say, that counts as much as a cosine
AT_ONCE = 256  # positions whose surroundings are looked up at a time


class Asked(NamedTuple):
    """The N positions at which labels are read, of the blocks that are attacked and then of the round's others."""

    z: np.ndarray  # what the head saw, [N, D]
    dz: np.ndarray  # what came back for it, of unit size
    words: np.ndarray  # that a label may be, [W]
    rows: np.ndarray  # theirs, [W, D]
    bias: np.ndarray  # added to a word's score, [N, W]
    beside: np.ndarray  # what public text says stands between the words beside, as logarithms, [N, W]
    where: list[np.ndarray]  # which they are: of both, bool [R, M]


def read_labels(view: View) -> np.ndarray:
    """Returns the likeliest labels, int [R, M, 5], by public text and, if the view has answers, by known text."""
    asked = ask(view)
    words, where, count = asked.words, asked.where, int(asked.where[0].sum())
    weights = np.exp(asked.beside.max(axis=1))
    labels, sure = asked.beside.argmax(axis=1), np.zeros(len(asked.z), bool)
    if view.answers is not None:
        found, sure = _told(view, where, words)
        enough = sure.sum() >= ENOUGH
        labels, weights = np.where(sure, found, labels), np.where(sure, TOLD, 0.0 if enough else weights)
    scores = search(asked.z, asked.dz, asked.rows, asked.bias, labels, weights, sure)
    best = words[np.argsort(-scores[:count], axis=1, kind="stable")[:, :GUESSES]]
    guesses = np.full((*where[0].shape, GUESSES), best[0, 0])
    guesses[where[0]] = np.pad(best, ((0, 0), (0, GUESSES - best.shape[1])), mode="edge")
    return guesses


def ask(view: View) -> Asked:
    """Returns what is known of a round's positions before any label is guessed."""
    groups, answers, size = view.log.groups, view.answers, view.public.vocab_size
    assert view.text is not None
    if answers is None:
        names = view.log.names[:, 0]
    else:
        told = known.words_of(groups, view.log.geometry, answers.blocks)
        names = cipher.solve(groups.of, view.text, size, told)[:, 0]
    words, rows = _rows(view, names)
    bigrams = Bigrams(view.text, size)
    parts = [view.messages] if view.others is None else [view.messages, view.others]
    where = [np.any(m.dz != 0, axis=-1) for m in parts]  # elsewhere is padding
    z, dz = (
        np.concatenate([x[w] for x, w in zip(of, where, strict=True)]) for of in zip(*map(_crossed, parts), strict=True)
    )
    z, dz = (z - z.mean(axis=0)) / (z.std() + 1e-12), unit(dz)
    beside = np.concatenate([_beside(view, m, w, names, words, bigrams) for m, w in zip(parts, where, strict=True)])
    return Asked(z, dz, words, rows, FREQUENT * (bigrams.log_prior[words] + beside), beside, where)


def search(
    z: np.ndarray,
    dz: np.ndarray,
    rows: np.ndarray,
    bias: np.ndarray,
    labels: np.ndarray,
    weights: np.ndarray,
    sure: np.ndarray,
) -> np.ndarray:
    """Returns the score of each word at each of N positions, [N, W].

    Args:
      z: what the head saw, [N, D].
      dz: what came back for it, of unit size.
      rows: of the words, [W, D].
      bias: added to a word's score, [N, W].
      labels: the first guesses, as places in `rows`, [N].
      weights: what each of them counts, [N].
      sure: which of them are known, bool [N].
    """
    found = [_sweeps(z, dz, rows, bias, labels, weights, sure, alike) for alike in (True, False)]
    return max(found, key=lambda scores_and_ahead: scores_and_ahead[1])[0]


def _sweeps(
    z: np.ndarray,
    dz: np.ndarray,
    rows: np.ndarray,
    bias: np.ndarray,
    labels: np.ndarray,
    weights: np.ndarray,
    sure: np.ndarray,
    alike: bool,
) -> tuple[np.ndarray, float]:
    """Returns scores, and how far the best are ahead in the mean; `alike`: whether later guesses count the same."""
    for _ in range(SWEEPS):
        scores = fit(z, dz, rows, labels, weights) + bias
        labels = np.where(sure, labels, scores.argmax(axis=1))
        two = np.partition(scores, -2, axis=1)[:, -2:] if len(rows) > 1 else scores
        ahead = two.max(axis=1) - two.min(axis=1)
        weights = np.where(sure, TOLD, 1.0 if alike else ahead / (np.mean(ahead) + 1e-12))
    return scores, float(np.mean(ahead))


def fit(z: np.ndarray, dz: np.ndarray, rows: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns how well each word's row explains each dL/dz, [N, W], by a regression on these labels' rows and z."""
    width = rows.shape[1]
    features = np.concatenate([rows[labels], z, np.ones((len(z), 1))], axis=1)
    heavy = features.T * weights
    by = np.linalg.solve(heavy @ features + RIDGE * np.eye(features.shape[1]), heavy @ dz)
    return unit(dz - features[:, width:] @ by[width:]) @ unit(rows @ by[:width]).T


def _crossed(messages: Messages) -> tuple[np.ndarray, np.ndarray]:
    assert messages.z is not None and messages.dz is not None
    return messages.z, messages.dz


def _rows(view: View, names: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the words that have rows, [W], and their mean rows, of unit size, [W, D]."""
    groups, size = view.log.groups, view.public.vocab_size
    counts = np.bincount(groups.of[groups.of >= 0], minlength=len(groups.means)).astype(np.float64)
    total, sums = np.zeros(size), np.zeros((size, groups.means.shape[1]))
    np.add.at(total, names, counts)
    np.add.at(sums, names, groups.means * counts[:, None])
    if view.answers is not None:
        blocks = view.answers.blocks
        tokens, rows = blocks.tokens[blocks.where], view.log.geometry.centred(blocks.h)[blocks.where]
        total[tokens], sums[tokens] = 0, 0  # what is known needs no guesses
        np.add.at(total, tokens, 1)
        np.add.at(sums, tokens, rows)
    words = np.flatnonzero(total)
    words = words[np.argsort(-total[words], kind="stable")[:WORDS]]
    rows = sums[words] / total[words, None]
    rows -= rows.mean(axis=0)
    return words, rows / (np.sqrt(np.mean(rows**2)) + 1e-12)


def _beside(
    view: View, messages: Messages, where: np.ndarray, names: np.ndarray, words: np.ndarray, bigrams: Bigrams
) -> np.ndarray:
    """Returns log-probabilities of words at the places that are `where`, by the words beside them, float32 [N, W]."""
    assert messages.positions is not None
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

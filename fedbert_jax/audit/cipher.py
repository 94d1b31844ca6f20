"""Reading message 1 with public text alone: rows of the same word lie together, so the log is a substitution cipher.

Rows are gathered into one cluster for each word; clusters are matched with words by how often they stand beside one another
(a graph matching, Vogelstein et al. 2015), and the match is then extended, and mended, by the contexts of what is matched.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment, quadratic_assignment

from fedbert_jax.audit.geometry import Geometry, best, distinct, unit
from fedbert_jax.audit.tables import GUESSES

ALIKE = 0.8  # cosine from which on two rows are the same word's (in the demo, those of different words stay below .78)
MOST = 8192  # clusters that are looked for
ROWS = 4096  # that are gathered at a time
GAPS = (1, 2)  # words to the right whose company is counted
WORDS = 4096  # the most frequent words, and clusters, that are matched
CORE = 400  # those that are matched as a graph
ANCHORS = 400  # matched clusters whose company describes the others
SWEEPS = 7
SPREAD = 0.3  # of the logarithm of a word's frequency between two texts
RARE = 0.02  # how much a difference of frequency, squared and in nats, counts against a match


class Clusters(NamedTuple):
    """Words without names."""

    centres: np.ndarray  # float32 [K, D], unit vectors
    of: np.ndarray  # int [R, T], the cluster of each row; -1 where it is left out


def gather(h: np.ndarray, geometry: Geometry, where: np.ndarray, alike: float = ALIKE) -> Clusters:
    """Gathers the rows h [R, T, D] of a log into clusters; rows that are not at `where` [R, T] are left out."""
    rows, which = distinct(geometry.centred(h), where)
    rows = geometry.whiten(rows - geometry.middle)
    counts = np.bincount(which[which >= 0], minlength=len(rows))
    centres = np.zeros((0, rows.shape[1]), np.float32)
    order = np.argsort(-counts, kind="stable")  # a frequent word's row is a better centre
    for start in range(0, len(order), ROWS):
        left = rows[order[start : start + ROWS]]
        if len(centres):
            left = left[best(left, centres, 1)[1][:, 0] <= alike]
        new: list[np.ndarray] = []
        while len(left) and len(centres) + len(new) < MOST:
            mine = left @ left[0] > alike
            mine[0] = True
            centre = unit(left[mine].mean(axis=0))
            new.append(centre)
            left = left[~(mine | (left @ centre > alike))]
        centres = np.concatenate([centres, np.array(new, np.float32).reshape(-1, rows.shape[1])])
    of = best(rows, centres, 1)[0][:, 0]
    return Clusters(centres, np.where(which >= 0, of[which], -1))


def solve(of: np.ndarray, public: np.ndarray, size: int) -> np.ndarray:
    """Names clusters with words, by the company that both keep.

    Args:
      of: int [R, T], the clusters of a log; -1 where a row is left out.
      public: int [P, T], public text; -1 where a token is left out.
      size: V.

    Returns:
      The likeliest words of each cluster, int [K, 5]. Clusters that were not matched have those of the nearest frequency.
    """
    theirs, ours = _Company(of, int(of.max()) + 1), _Company(public, size)
    core = min(CORE, len(theirs.order), len(ours.order))
    names = ours.order[_match_core(theirs, ours, core)]
    for sweep in range(SWEEPS):
        count = min(WORDS, int(core * 1.5 ** max(sweep - 1, 0)), len(theirs.order), len(ours.order))
        if sweep == SWEEPS - 1:
            count = min(WORDS, len(theirs.order), len(ours.order))
        anchors = min(len(names), ANCHORS)
        mine, words = theirs.order[:count], ours.order[:count]
        alike = theirs.contexts(mine, theirs.order[:anchors]) @ ours.contexts(words, names[:anchors]).T / (2 * len(GAPS))
        alike -= RARE * (theirs.logs[mine][:, None] - ours.logs[words][None]) ** 2
        names = words[linear_sum_assignment(-alike)[1]]
    guesses = np.empty((len(theirs.counts), GUESSES), np.int64)
    near = np.abs(theirs.logs[:, None] - ours.logs[ours.order][None, :WORDS])
    guesses[:] = ours.order[np.argsort(near, axis=1, kind="stable")[:, :GUESSES]]
    ranked = words[np.argsort(-alike, axis=1, kind="stable")[:, :GUESSES]]
    for cluster, name, others in zip(mine, names, ranked, strict=True):
        guesses[cluster] = np.concatenate([[name], others[others != name]])[:GUESSES]
    return guesses


def read_by_public_text(h: np.ndarray, geometry: Geometry, clusters: Clusters, public: np.ndarray, size: int) -> np.ndarray:
    """Returns the likeliest tokens of rows h [R, T, D], int [R, T, 5]; see `solve`."""
    names = solve(clusters.of, public, size)
    return names[best(geometry.words(h), clusters.centres, 1)[0][..., 0]]


class _Company:
    """Which words stand beside which in a text [R, T] of words from 0 to `size` - 1, with -1 where there is none."""

    def __init__(self, text: np.ndarray, size: int):
        self.counts = np.bincount(text[text >= 0], minlength=size)
        self.logs = np.log((self.counts + 1) / self.counts.sum())
        order = np.argsort(-self.counts, kind="stable")
        self.order = order[self.counts[order] > 0]
        self.pairs = []
        for gap in GAPS:
            left, right = text[:, :-gap].ravel(), text[:, gap:].ravel()
            both = (left >= 0) & (right >= 0)
            self.pairs.append((left[both], right[both]))

    def beside(self, rows: np.ndarray, columns: np.ndarray, gap: int) -> np.ndarray:
        """Counts how often words `rows` stand before words `columns`, float32 [len(rows), len(columns)]."""
        place = np.full((2, len(self.counts)), -1)
        place[0, rows], place[1, columns] = np.arange(len(rows)), np.arange(len(columns))
        left, right = (place[n][x] for n, x in enumerate(self.pairs[gap]))
        both = (left >= 0) & (right >= 0)
        found = np.bincount(left[both] * len(columns) + right[both], minlength=len(rows) * len(columns))
        return found.reshape(len(rows), len(columns)).astype(np.float32)

    def contexts(self, words: np.ndarray, anchors: np.ndarray) -> np.ndarray:
        """Describes words by how often each anchor stands after and before them: square roots of shares."""
        found = []
        for gap in range(len(GAPS)):
            for counts in (self.beside(words, anchors, gap), self.beside(anchors, words, gap).T):
                found.append(np.sqrt(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)))
        return np.concatenate(found, axis=1)


def _match_core(theirs: _Company, ours: _Company, count: int) -> np.ndarray:
    """Matches the most frequent clusters with the most frequent words: the word's place for each cluster, int [count]."""
    graphs = []
    for side in (theirs, ours):
        words = side.order[:count]
        graphs.append(np.sqrt(side.beside(words, words, 0) / max(len(side.pairs[0][0]), 1)))
    apart = theirs.logs[theirs.order[:count], None] - ours.logs[None, ours.order[:count]]
    start = np.exp(-(apart**2) / (2 * SPREAD**2)).astype(np.float64) + 1e-6
    for _ in range(3000):  # rows and columns that sum to 1
        start /= start.sum(axis=1, keepdims=True)
        start /= start.sum(axis=0, keepdims=True)
        if np.abs(start.sum(axis=1) - 1).max() < 1e-6:
            break
    options = {"maximize": True, "P0": start, "maxiter": 60, "tol": 1e-4}
    return quadratic_assignment(*graphs, method="faq", options=options).col_ind

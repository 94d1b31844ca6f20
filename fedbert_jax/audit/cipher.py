"""Reading message 1 with public text alone: rows of the same word lie together, so the log is a substitution cipher.

Groups of rows (`groups`) are matched with words by how often they stand beside one another (a graph matching, Vogelstein et
al. 2015), and the match is then extended, and mended, by the contexts of what is matched. Words that known text names are
matched from the start.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment, quadratic_assignment

from fedbert_jax.audit.tables import GUESSES

GAPS = (1, 2)  # words to the right whose company is counted
WORDS = 4096  # the most frequent words, and groups, that are matched
CORE = 400  # of them, those that are matched as a graph
ANCHORS = 400  # matched groups whose company describes the others
ENOUGH = 100  # known groups from which on their company is a better start than a graph's
SWEEPS = 7
SPREAD = 0.3  # of the logarithm of a word's frequency between two texts
RARE = 0.02  # how much a difference of frequency, squared and in nats, counts against a match


def solve(of: np.ndarray, public: np.ndarray, size: int, told: np.ndarray | None = None) -> np.ndarray:
    """Names groups with words, by the company that both keep.

    Args:
      of: int [R, T], the groups of a log; -1 where a row is left out.
      public: int [P, T], public text; -1 where a token is left out.
      size: V.
      told: int [K], the words of groups whose word is known, -1 for the others; None: none is known.

    Returns:
      The likeliest words of each group, int [K, 5]. Groups that were not matched have those of the nearest frequency.
    """
    theirs, ours = _Company(of, int(of.max()) + 1), _Company(public, size)
    told = np.full(len(theirs.counts), -1) if told is None else told
    groups, ours_left = theirs.order[told[theirs.order] < 0], ours.order[~np.isin(ours.order, told)]
    fixed = theirs.order[told[theirs.order] >= 0]
    fixed = fixed[np.sort(np.unique(told[fixed], return_index=True)[1])]  # one group a word, the largest
    core = min(CORE, len(groups), len(ours_left))
    names = ours_left[: 0 if len(fixed) >= ENOUGH else core]
    if len(names):
        names = ours_left[_match_core(theirs, ours, groups[:core], ours_left[:core])]
    for sweep in range(SWEEPS):
        count = min(WORDS, int(core * 1.5 ** max(sweep - 1, 0)), len(groups), len(ours_left))
        if sweep == SWEEPS - 1:
            count = min(WORDS, len(groups), len(ours_left))
        anchors = np.concatenate([fixed, groups[: min(len(names), ANCHORS)]])
        meanings = np.concatenate([told[fixed], names[:ANCHORS]])
        mine, words = groups[:count], ours_left[:count]
        alike = theirs.contexts(mine, anchors) @ ours.contexts(words, meanings).T / (2 * len(GAPS))
        alike -= RARE * (theirs.logs[mine][:, None] - ours.logs[words][None]) ** 2
        names = words[linear_sum_assignment(-alike)[1]]
    guesses = np.empty((len(theirs.counts), GUESSES), np.int64)
    near = np.abs(theirs.logs[:, None] - ours.logs[ours.order][None, :WORDS])
    guesses[:] = ours.order[np.argsort(near, axis=1, kind="stable")[:, :GUESSES]]
    ranked = words[np.argsort(-alike, axis=1, kind="stable")[:, :GUESSES]]
    for group, name, others in zip(mine, names, ranked, strict=True):
        guesses[group] = np.concatenate([[name], others[others != name]])[:GUESSES]
    guesses[told >= 0, 0] = told[told >= 0]
    return guesses


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


def _match_core(theirs: _Company, ours: _Company, groups: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Matches groups with as many words, both in the order of their frequency: the word's place for each group."""
    graphs = []
    for side, chosen in ((theirs, groups), (ours, words)):
        graphs.append(np.sqrt(side.beside(chosen, chosen, 0) / max(len(side.pairs[0][0]), 1)))
    apart = theirs.logs[groups, None] - ours.logs[None, words]
    start = np.exp(-(apart**2) / (2 * SPREAD**2)).astype(np.float64) + 1e-6
    for _ in range(3000):  # rows and columns that sum to 1
        start /= start.sum(axis=1, keepdims=True)
        start /= start.sum(axis=0, keepdims=True)
        if np.abs(start.sum(axis=1) - 1).max() < 1e-6:
            break
    options = {"maximize": True, "P0": start, "maxiter": 60, "tol": 1e-4}
    return quadratic_assignment(*graphs, method="faq", options=options).col_ind

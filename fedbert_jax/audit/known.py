"""Reading message 1 by known text: whoever knows what some blocks said knows how the words in them look."""

from __future__ import annotations

import numpy as np

from fedbert_jax.audit.geometry import Geometry, best
from fedbert_jax.audit.groups import Groups
from fedbert_jax.audit.tables import GUESSES
from fedbert_jax.audit.views import Known


def read_by_known_text(h: np.ndarray, geometry: Geometry, known: Known) -> np.ndarray:
    """Returns the likeliest tokens of rows h [R, T, D], int [R, T, 5].

    Args:
      h: to be read.
      geometry: of a log.
      known: blocks of known text.
    """
    words, rows = known.tokens[known.where], geometry.centred(known.h)[known.where]
    ids, place, count = np.unique(words, return_inverse=True, return_counts=True)
    means = np.zeros((len(ids), rows.shape[1]), np.float32)
    np.add.at(means, place, rows)
    means /= count[:, None]
    found = best(geometry.centred(h), means, min(GUESSES, len(ids)), -0.5 * np.sum(means**2, axis=1))[0]
    guesses = ids[found]
    missing = GUESSES - guesses.shape[-1]
    return np.concatenate([guesses, np.repeat(guesses[..., -1:], missing, axis=-1)], axis=-1) if missing else guesses


def words_of(groups: Groups, geometry: Geometry, known: Known) -> np.ndarray:
    """Returns the word of each group that known text tells, int [K]; -1 for the others.

    A group has a word if most of its rows in the known blocks are that word's.
    """
    of, words = groups.nearest(geometry.centred(known.h))[known.where], known.tokens[known.where]
    pairs, counts = np.unique(np.stack([of, words]), axis=1, return_counts=True)
    found, most = np.full(len(groups.means), -1), np.bincount(of, minlength=len(groups.means)) / 2
    sure = counts > most[pairs[0]]
    found[pairs[0, sure]] = pairs[1, sure]
    return found

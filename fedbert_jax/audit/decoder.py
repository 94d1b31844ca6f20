"""Reading a sentence at once: the likelihoods of single rows, and how words follow one another in public text."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from fedbert_jax.audit.groups import scale
from fedbert_jax.audit.tables import GUESSES, Table
from fedbert_jax.audit.views import View

CANDIDATES = 128
SWEEPS = 2  # over all positions, in which the model predicts each from the others; with more, it believes itself
MASKED = 16  # positions of a block that it predicts at a time
HALF = 0.5  # of what the model says counts where its words and public text's are taken together
AGAIN = 0.1  # of what frequencies say of a word is what the rest of its block has: words come again
AT_ONCE = 16  # blocks that are read at a time, to save memory
LEAST = 0.1  # the standard deviation of rows that are taken to be exact, in root mean squares of rows
SMOOTH = 20.0  # how many sightings of a word count as much as its followers' plain frequency


class Bigrams:
    """How likely each word is, and after which other, in public text: int [P, T], with V words."""

    def __init__(self, public: np.ndarray, size: int):
        counts = np.bincount(public.ravel(), minlength=size) + 0.5
        self.log_prior = np.log(counts / counts.sum())
        self.size = size
        self._plain = counts / counts.sum()
        pairs = public[:, :-1].ravel() * size + public[:, 1:].ravel()
        self._keys, self._counts = np.unique(pairs, return_counts=True)
        firsts = np.bincount(public[:, :-1].ravel(), minlength=size)
        self._lasting, self._firsts = SMOOTH / (firsts + SMOOTH), np.maximum(firsts, 1)

    def after(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Returns the log-probability of `second` after `first`, arrays of one shape."""
        keys = first * self.size + second
        place = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
        seen = np.where(self._keys[place] == keys, self._counts[place], 0)
        plain = self._lasting[first]
        return np.log((1 - plain) * seen / self._firsts[first] + plain * self._plain[second])


def decode(ids: np.ndarray, scores: np.ndarray, bigrams: Bigrams) -> np.ndarray:
    """Returns the likeliest tokens, int [R, T, 5]; the arguments are `likelihoods`'."""
    return _first(ids, likelihoods(ids, scores, bigrams))


def likelihoods(ids: np.ndarray, scores: np.ndarray, bigrams: Bigrams) -> np.ndarray:
    """Returns log-likelihoods of candidates given whole blocks, [R, T, C], by the forward-backward algorithm.

    Args:
      ids: int [R, T, C], candidates for each position.
      scores: [R, T, C], the log-likelihood of the row under each candidate, without a prior.
      bigrams: of public text.
    """
    parts = range(0, len(ids), AT_ONCE)
    return np.concatenate([_likelihoods(ids[i : i + AT_ONCE], scores[i : i + AT_ONCE], bigrams) for i in parts])


def _likelihoods(ids: np.ndarray, scores: np.ndarray, bigrams: Bigrams) -> np.ndarray:
    steps = [
        bigrams.after(*np.broadcast_arrays(ids[:, t, :, None], ids[:, t + 1, None, :])) for t in range(ids.shape[1] - 1)
    ]  # each [R, C, C]
    forward = [scores[:, 0] + bigrams.log_prior[ids[:, 0]]]
    for t, step in enumerate(steps):
        forward.append(scores[:, t + 1] + _log_sum(forward[-1][:, :, None] + step, 1))
    backward = [np.zeros_like(forward[0])]
    for t in range(len(steps) - 1, -1, -1):
        backward.append(_log_sum(steps[t] + (backward[-1] + scores[:, t + 1])[:, None, :], 2))
    return np.stack(forward, axis=1) + np.stack(backward[::-1], axis=1)


def read_with_model(table: Table, h: np.ndarray, view: View) -> np.ndarray:
    """Returns the likeliest tokens of rows h [R, T, D], int [R, T, 5], by rows, the model, and public text.

    The model that the clients train predicts each word from the others, which are taken as the mean of what they may be.
    """
    public, (blocks, length) = view.public, h.shape[:2]
    assert view.text is not None and view.segment is not None
    bigrams = Bigrams(view.text, public.vocab_size)
    spread, few = max(public.noise, LEAST * float(scale(h, public.noise))) ** 2, min(CANDIDATES, public.vocab_size)
    ids, nearness = table.nearest(h, few, spread * bigrams.log_prior)
    scores = nearness / spread - bigrams.log_prior[ids]  # log-likelihoods
    asked = ~view.messages.unasked
    common = np.argsort(-bigrams.log_prior)[:few]
    ids[asked], scores[asked] = common, 0.0  # nothing is known of what [MASK] hides
    rows = np.stack([table.rows(ids[..., c]) for c in range(few)], axis=2)  # [R, T, C, D]
    hidden = jnp.asarray(table.rows(np.full(length, public.mask_id)))

    @jax.jit
    def predict(h: jax.Array, places: jax.Array, ids: jax.Array) -> jax.Array:
        h = jax.vmap(lambda x, p: x.at[p].set(hidden[p]))(h, places)
        z = public.segments.transform(view.body, h.astype(public.segments.dtype), places)
        found = jax.nn.log_softmax(public.segments.predict(view.segment, z), axis=-1)
        return jnp.take_along_axis(found, ids, axis=-1)

    whole, rng = scores + bigrams.log_prior[ids], np.random.default_rng(0)
    if "classifier" in view.segment:  # it predicts no words
        return decode(ids, scores, bigrams)
    again = np.zeros_like(scores)
    for _ in range(SWEEPS):
        chance = _chances(whole)
        prior = np.empty_like(scores)
        mean = np.einsum("rtc,rtcd->rtd", chance, rows).astype(np.float32)
        order = np.argsort(rng.random((blocks, length)), axis=1)
        for start in range(0, length, MASKED):
            places = order[:, start : start + MASKED]
            some = np.take_along_axis(ids, places[..., None], axis=1)
            np.put_along_axis(prior, places[..., None], np.asarray(predict(mean, places, some)), axis=1)
        whole = likelihoods(ids, scores + HALF * (prior - bigrams.log_prior[ids]) + again, bigrams)
        again = repeated(ids, np.where(asked[..., None], 0, _chances(whole)), bigrams)
    return _first(ids, whole)


def repeated(ids: np.ndarray, chance: np.ndarray, bigrams: Bigrams) -> np.ndarray:
    """Returns what is added to log-likelihoods since words come again in a block, [R, T, C].

    Args:
      ids: int [R, T, C], candidates.
      chance: [R, T, C], how likely they are.
      bigrams: of public text.
    """
    found = np.empty_like(chance)
    for row, own, mine in zip(ids, chance, found, strict=True):
        elsewhere = np.bincount(row.ravel(), own.ravel(), minlength=bigrams.size)[row] - own
        share = np.maximum(elsewhere, 0) / max(own.sum(), 1)
        mine[:] = np.log(1 - AGAIN + AGAIN * share / np.exp(bigrams.log_prior[row]))
    return found


def _first(ids: np.ndarray, whole: np.ndarray) -> np.ndarray:
    order = np.argsort(-whole, axis=-1, kind="stable")[..., :GUESSES]
    return np.take_along_axis(ids, order, axis=-1)


def _chances(whole: np.ndarray) -> np.ndarray:
    found = np.exp(whole - whole.max(axis=-1, keepdims=True))
    return np.asarray(found / found.sum(axis=-1, keepdims=True))


def _log_sum(x: np.ndarray, axis: int) -> np.ndarray:
    most = x.max(axis=axis, keepdims=True)
    return np.squeeze(most, axis) + np.log(np.exp(x - most).sum(axis=axis))

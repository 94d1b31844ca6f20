"""Reading message 1 with a table of embeddings: a segment's, an old one's, or one that only the seed knows."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from fedbert_jax.audit.geometry import best, unit, whitening
from fedbert_jax.data.masking import MaskedBatch
from fedbert_jax.federated import wire
from fedbert_jax.models.bert import ClientParams, Segments

GUESSES = 5
TOKENS = 1024  # that are embedded at a time


def clipped_rows(
    segments: Segments, params: ClientParams, tokens: jax.Array, clip: float | None, kind: jax.Array | int = 0
) -> jax.Array:
    """Returns what a segment makes of tokens [R, T] of one kind, clipped as `wire.clip` says: float32 [R, T, D]."""
    batch = MaskedBatch(tokens, tokens, tokens, tokens, jnp.full_like(tokens, kind))
    h = segments.embed(params, batch).astype(jnp.float32)
    return h if clip is None else wire.clip(clip).send(h, None)


class Table:
    """What every token would look like at every position, by a segment without Transformer layers of its own.

    Args:
      segments: the run's.
      params: a client segment's.
      length: T.
      size: V.
      clip: the norm to which rows are clipped before they leave (`wire.clip`).
      kinds: of tokens: 2 where there are sentence pairs.
    """

    def __init__(
        self,
        segments: Segments,
        params: ClientParams,
        length: int,
        size: int,
        clip: float | None = None,
        kinds: int = 1,
    ):
        self._length, self._size, self._kinds = length, size, kinds
        self._embed = jax.jit(lambda tokens, kind: clipped_rows(segments, params, tokens, clip, kind))

    def rows(self, tokens: np.ndarray, kind: int = 0) -> np.ndarray:
        """Returns the rows of tokens [..., T], float32 [..., T, D]."""
        flat = np.asarray(self._embed(tokens.reshape(-1, self._length).astype(np.int32), kind))
        return flat.reshape(*tokens.shape, flat.shape[-1])

    def _parts(self, kind: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        """Yields some tokens' rows [n, T, D] at a time, and the first of these tokens."""
        for start in range(0, self._size, TOKENS):
            ids = np.minimum(np.arange(start, start + TOKENS), self._size - 1)  # always as many
            yield start, self.rows(np.repeat(ids[:, None], self._length, axis=1), kind)[: self._size - start]

    @functools.cached_property
    def words(self) -> np.ndarray:
        """Each token's mean row over positions, float32 [V, D]."""
        return np.concatenate([rows.mean(axis=1) for _, rows in self._parts()])

    def nearest(self, h: np.ndarray, count: int = GUESSES, prior: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Returns the tokens whose rows lie nearest to each row of h [R, T, D], best first, int [R, T, count].

        The scores beside them are minus half the squared distances, plus a `prior` [V] of tokens. With two kinds of
        tokens, a token may be there twice.
        """
        prior = np.zeros(self._size) if prior is None else prior
        ids = np.zeros((*h.shape[:2], 0), np.int64)
        scores = np.zeros(ids.shape, np.float32)
        for start, rows in itertools.chain.from_iterable(map(self._parts, range(self._kinds))):
            bias = prior[start : start + len(rows)][:, None] - 0.5 * np.sum(rows**2, axis=-1)  # [n, T]
            few = min(count, len(rows))
            found = [best(h[:, t], rows[:, t], few, bias[:, t]) for t in range(self._length)]
            ids = np.concatenate([ids, start + np.stack([f[0] for f in found], axis=1)], axis=-1)
            scores = np.concatenate([scores, np.stack([f[1] for f in found], axis=1)], axis=-1)
            order = np.argsort(-scores, axis=-1, kind="stable")[..., :count]
            ids, scores = (np.take_along_axis(x, order, axis=-1) for x in (ids, scores))
        return ids, scores - 0.5 * np.sum(h**2, axis=-1, keepdims=True)


def alike(words: np.ndarray, rows: np.ndarray, white: np.ndarray | None = None) -> np.ndarray:
    """Returns the tokens whose directions, among all words', are most like those of rows [N, D]: int [N, 5].

    A table that training has moved since is still told apart by it: directions in which words have moved together, or which
    frequent words take, weigh no more than others.

    Args:
      words: float32 [V, D], each token's row without its position.
      rows: without their position, about their middle.
      white: [D, D], scales the spread of distinct rows to 1 in every direction; None: it is that of `rows`.
    """
    if white is None:
        rows = rows - rows.mean(axis=0)
        white = whitening(rows)
    return best(unit(rows @ white), unit((words - words.mean(axis=0)) @ white), GUESSES)[0]

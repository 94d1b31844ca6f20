"""What anybody who receives message 1 can work out about its rows: where equal tokens lie, and how to tell words apart."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

SHRINK = 1e-3  # of the mean variance, added to every direction's before it is scaled to 1
AT_ONCE = 8192  # rows that are compared at a time
DISTINCT = 8  # numbers of a row that tell it from another one
LEAST = 1e-12  # variance added in any case, so that rows that are all the same can be described, too


class Geometry(NamedTuple):
    """The rows of a log, described."""

    places: np.ndarray  # float32 [T, D], the mean row at each position
    middle: np.ndarray  # float32 [D], the mean of distinct rows after that
    white: np.ndarray  # float32 [D, D], scales the spread of distinct rows to 1 in every direction

    def centred(self, h: np.ndarray) -> np.ndarray:
        """Takes the position out of rows h [R, T, D]."""
        return h - self.places

    def whiten(self, x: np.ndarray) -> np.ndarray:
        """Returns x [..., D], about the middle, as unit vectors in which no direction weighs more than another.

        Training moves all rare words in the same few directions, by far more than they lie apart; scaled to the same spread,
        these directions no longer hide the differences.
        """
        return unit(x @ self.white)


def unit(x: np.ndarray) -> np.ndarray:
    """Returns x [..., D] with Euclidean norm 1 along the last axis."""
    return (x / (np.linalg.norm(x, axis=-1, keepdims=True) + 1e-9)).astype(np.float32)


def describe(h: np.ndarray, where: np.ndarray) -> Geometry:
    """Describes the rows h [R, T, D] of a log that are at `where`, bool [R, T]."""
    places = np.sum(h * where[..., None], axis=0) / np.maximum(where.sum(axis=0), 1)[:, None]
    rows = distinct(h - places, where)[0]
    middle = rows.mean(axis=0)
    return Geometry(places, middle, whitening(rows - middle))


def whitening(rows: np.ndarray) -> np.ndarray:
    """Returns the matrix [D, D] that scales the spread of rows [N, D], about their mean, to 1 in every direction."""
    spread = np.cov(rows.T.astype(np.float64))
    spread += (SHRINK * np.trace(spread) / len(spread) + LEAST) * np.eye(len(spread))
    return np.linalg.cholesky(np.linalg.inv(spread)).astype(np.float32)


def distinct(x: np.ndarray, where: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the distinct rows of x [R, T, D], position by position, [N, D], and which of them each row is, int [R, T].

    At one position, the same token gives the same row, unless noise is added: so every word counts once there, however
    frequent it is. Rows that are not at `where` [R, T] are left out, and are number -1.
    """
    rows: list[np.ndarray] = []
    size = np.float32(np.sqrt(np.mean(x**2)) + 1e-12)
    which = np.full(x.shape[:2], -1)
    found = 0
    for place in range(x.shape[1]):
        there = np.flatnonzero(where[:, place])
        if not len(there):
            continue
        some = np.ascontiguousarray(np.round(x[there, place, :DISTINCT] / size, 4) + np.float32(0))  # -0 becomes 0
        names = some.view(np.dtype((np.void, some.dtype.itemsize * some.shape[1]))).ravel()
        _, first, number = np.unique(names, return_index=True, return_inverse=True)
        rows.append(x[there[first], place])
        which[there, place] = found + number
        found += len(first)
    return np.concatenate(rows), which


def best(queries: np.ndarray, of: np.ndarray, count: int, bias: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Returns the places and scores of the `count` largest inner products, best first: int and float32 [..., count].

    Args:
      queries: [..., D].
      of: [N, D].
      count: at most N.
      bias: [N], added to each product.
    """
    flat = queries.reshape(-1, queries.shape[-1])
    ids = np.empty((len(flat), count), np.int64)
    values = np.empty((len(flat), count), np.float32)
    for start in range(0, len(flat), AT_ONCE):
        scores = flat[start : start + AT_ONCE] @ of.T
        if bias is not None:
            scores = scores + bias
        some = np.argpartition(-scores, count - 1, axis=1)[:, :count] if count < len(of) else np.argsort(-scores, axis=1)
        found = np.take_along_axis(scores, some, axis=1)
        order = np.argsort(-found, axis=1, kind="stable")
        ids[start : start + AT_ONCE] = np.take_along_axis(some, order, axis=1)
        values[start : start + AT_ONCE] = np.take_along_axis(found, order, axis=1)
    shape = (*queries.shape[:-1], count)
    return ids.reshape(shape), values.reshape(shape)

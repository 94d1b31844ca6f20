"""Gathers the rows of a log into groups, one for each word, by whoever knows no word of it."""

from __future__ import annotations

import heapq
from typing import NamedTuple

import numpy as np

from fedbert_jax.audit.geometry import Geometry, best, distinct, unit, whitening

ALIKE = 0.8  # cosine from which on two exact rows are one word's (in the demo, those of different words stay below .78)
MERGED = 0.6  # the same for the mean rows of two groups, under noise
WITHIN = 1.0  # variance, in mean squares of rows, that rows of one word may have without noise: by position
EDGE = 1.15  # how far beyond the largest variance that noise alone makes a group is divided
FEW = 4  # rows that are not divided
MOST = 12_000  # groups
ROWS = 4096  # that are gathered at a time
SWEEPS = 2
DEEPER = 0.75  # cosine from which on rows are one word's behind layers of a client's (of .7 to .85 the best behind one)
SAMPLE = 16_000  # rows among which such groups are looked for
AROUND = 2500  # such groups


class Groups(NamedTuple):
    """Words without names."""

    means: np.ndarray  # float32 [K, D], rows without their position
    of: np.ndarray  # int [R, T], the group of each row of the log; -1 where it is left out
    bias: np.ndarray  # float32 [K], added to a row's product with the mean

    def nearest(self, rows: np.ndarray) -> np.ndarray:
        """Returns the groups of rows [..., D], without their position: int [...]."""
        return best(rows, self.means, 1, self.bias)[0][..., 0]


def gather(h: np.ndarray, geometry: Geometry, where: np.ndarray, noise: float, layers: int = 0) -> Groups:
    """Gathers the rows h [R, T, D] of a log.

    Args:
      h: rows.
      geometry: of them.
      where: bool [R, T], which rows are gathered.
      noise: the standard deviation of the noise that they have.
      layers: how many of its own the client has put them through, so that rows of a word differ by what stands around it.
    """
    if layers:
        return _in_context(geometry.centred(h), where, noise, DEEPER)
    size = scale(h[where], noise)
    x, noise = (geometry.centred(h) / size).astype(np.float32), noise / float(size)
    if noise > 0:
        rows, which = x[where], np.full(where.shape, -1)
        of = _merged(rows, _divided(rows, noise), noise)
        which[where] = np.arange(len(rows))
    else:
        rows, which = distinct(x, where)
        counts = np.bincount(which[where], minlength=len(rows))
        of = _alike(geometry.whiten(rows * size - geometry.middle), counts)
    counts = np.bincount(which[where], minlength=len(rows))
    means, sizes = _means(rows * size, of, counts)
    bias = -0.5 * np.sum(means**2, axis=1) + (noise * size) ** 2 * np.log(np.maximum(sizes, 1) / sizes.sum())
    return Groups(means, np.where(which >= 0, of[which], -1), bias.astype(np.float32))


def _in_context(x: np.ndarray, where: np.ndarray, noise: float, like: float) -> Groups:
    """Gathers rows x [R, T, D], without their position, whose words' neighbours show in them: by directions alone."""
    rows = unit(x[where])
    # Noise shortens a row's part along its word's direction; a mean row has none.
    kept = float(np.sqrt(np.clip(1 - noise**2 / np.mean(x[where] ** 2), 0.01, 1)))
    left = rows[np.random.default_rng(0).permutation(len(rows))[:SAMPLE]]
    found: list[np.ndarray] = []
    while len(left) and len(found) < AROUND:
        centre, least = left[0], like * kept**2
        for _ in range(2):
            mine = left @ centre > least
            mine[0] = True
            centre, least = unit(left[mine].mean(axis=0)), like * kept
        mine = left @ centre > least
        mine[0] = True
        found.append(centre)
        left = left[~mine]
    centres = np.array(found, np.float32)
    for _ in range(SWEEPS):
        of = best(rows, centres, 1)[0][:, 0]
        means, sizes = _means(rows, _renumbered(of))
        centres = unit(means[sizes > 2]) if (sizes > 2).any() else unit(means)
    taken, of = np.unique(best(rows, centres, 1)[0][:, 0], return_inverse=True)
    which = np.full(where.shape, -1)
    which[where] = of
    return Groups(centres[taken], which, np.zeros(len(taken), np.float32))


def scale(h: np.ndarray, noise: float) -> np.float32:
    """Returns the root mean square of rows [..., D], without their noise: 1 after LayerNorm, less where they are clipped."""
    return np.float32(np.sqrt(max(float(np.mean(h**2)) - noise**2, 1e-12)))


def _means(rows: np.ndarray, of: np.ndarray, counts: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean row of each group, [K, D], and how many rows it has, [K]."""
    counts = np.ones(len(rows), np.int64) if counts is None else counts
    groups = int(of.max()) + 1
    sizes = np.bincount(of, counts, minlength=groups)
    order = np.argsort(of, kind="stable")
    starts = np.searchsorted(of[order], np.arange(groups))
    sums = np.add.reduceat((rows * counts[:, None])[order], starts, axis=0)
    return (sums / np.maximum(sizes, 1)[:, None]).astype(np.float32), sizes


def _alike(rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Groups exact rows, whitened, around the most frequent ones: int [N]."""
    centres = np.zeros((0, rows.shape[1]), np.float32)
    order = np.argsort(-counts, kind="stable")
    for start in range(0, len(order), ROWS):
        left = rows[order[start : start + ROWS]]
        if len(centres):
            left = left[best(left, centres, 1)[1][:, 0] <= ALIKE]
        new: list[np.ndarray] = []
        while len(left) and len(centres) + len(new) < MOST:
            mine = left @ left[0] > ALIKE
            mine[0] = True
            centre = unit(left[mine].mean(axis=0))
            new.append(centre)
            left = left[~(mine | (left @ centre > ALIKE))]
        centres = np.concatenate([centres, np.array(new, np.float32).reshape(-1, rows.shape[1])])
    return _renumbered(best(rows, centres, 1)[0][:, 0])


def _divided(rows: np.ndarray, noise: float) -> np.ndarray:
    """Divides noisy rows in two, again and again, until what a group's rows differ by is noise: int [N].

    Noise alone gives n rows in D dimensions a largest variance of at most noise**2 * (1 + sqrt(D / n))**2 (Marchenko and
    Pastur 1967).
    """
    of, groups = np.zeros(len(rows), np.int64), 0
    # The largest first: where there may be no more groups, small ones stay undivided.
    waiting: list[tuple[int, int, np.ndarray]] = [(-len(rows), 0, np.arange(len(rows)))]
    while waiting:
        _, number, mine = heapq.heappop(waiting)
        side = _sides(rows[mine], noise) if len(mine) >= FEW and groups + len(waiting) < MOST else None
        if side is None:
            of[mine] = groups
            groups += 1
        else:
            for n, part in enumerate((mine[side], mine[~side])):
                heapq.heappush(waiting, (-len(part), 2 * number + n + 1, part))
    return of


def _sides(rows: np.ndarray, noise: float) -> np.ndarray | None:
    """Returns on which of two sides each row is, bool [n]; None if they are one group."""
    count, size = rows.shape
    x = rows - rows.mean(axis=0)
    if count > size:
        values, vectors = np.linalg.eigh(x.T @ x / count)
        top, direction = values[-1], vectors[:, -1]
    else:
        values, vectors = np.linalg.eigh(x @ x.T / count)
        top, direction = values[-1], x.T @ vectors[:, -1]
    if top <= EDGE * noise**2 * (1 + np.sqrt(size / count)) ** 2 + WITHIN:
        return None
    side = x @ direction > 0
    for _ in range(6):  # two means
        if side.all() or not side.any():
            return None
        a, b = x[side].mean(axis=0), x[~side].mean(axis=0)
        moved = x @ (a - b) > (a @ a - b @ b) / 2
        if (moved == side).all():
            break
        side = moved
    return None if side.all() or not side.any() else side


def _merged(rows: np.ndarray, of: np.ndarray, noise: float) -> np.ndarray:
    """Merges groups whose means, whitened, are alike, and gives every row to the group that is likeliest: int [N]."""
    for _ in range(SWEEPS):
        means, sizes = _means(rows, of)
        some = means[sizes > FEW] if (sizes > FEW).sum() > 1 else means
        middle = some.mean(axis=0)
        directions = unit((means - middle) @ whitening(some - middle))
        into, free = np.arange(len(means)), np.ones(len(means), bool)
        for group in np.argsort(-sizes, kind="stable"):
            if free[group]:
                mine = (directions @ directions[group] > MERGED) & free
                mine[group] = True
                into[mine], free[mine] = group, False
        of = _renumbered(into[of])
        means, sizes = _means(rows, of)
        bias = -0.5 * np.sum(means**2, axis=1) + noise**2 * np.log(sizes / sizes.sum())
        of = _renumbered(best(rows, means, 1, bias.astype(np.float32))[0][:, 0])
    return of


def _renumbered(of: np.ndarray) -> np.ndarray:
    return np.unique(of, return_inverse=True)[1]

"""Draws who takes part in a round and which blocks they train on, as pure functions of (seeds, round, step, client).

Nothing is carried from round to round, so a resumed run, or another process, draws the same.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from fedbert_jax.data.streams import Seeds, Stream, generator


def draw_cohort(seeds: Seeds, round: int, num_clients: int, cohort: int) -> np.ndarray:
    """Draws a round's clients, without replacement.

    Returns:
      int32 [C], ascending; all clients when cohort == num_clients.
    """
    if cohort == num_clients:
        return np.arange(num_clients, dtype=np.int32)
    rng = generator(seeds, Stream.COHORT, round)
    return np.sort(rng.choice(num_clients, cohort, replace=False)).astype(np.int32)


def turn_order(seeds: Seeds, round: int, cohort: int) -> np.ndarray:
    """Draws the order in which a sequential round's clients take turns: a permutation, int [C]."""
    return generator(seeds, Stream.ORDER, round).permutation(cohort)


def client_weights(sizes: np.ndarray, clients: np.ndarray, weighting: str) -> np.ndarray:
    """Returns each cohort member's share in the average, float32 [C], summing to 1: by `examples` or `uniform`."""
    weights = sizes[clients].astype(np.float64) if weighting == "examples" else np.ones(len(clients))
    return (weights / weights.sum()).astype(np.float32)


def block_indices(seeds: Seeds, client: int, num_blocks: int, first: int, count: int) -> np.ndarray:
    """Returns entries `first` to `first + count` of a client's endless shuffled stream of its blocks.

    The stream is one random permutation of 0..num_blocks-1 (an epoch) after another, so each block comes once an epoch. A
    step's entries begin at (round * K + step) times the batch size; a client that sits out a round skips its entries.

    Returns:
      int64 [count], in 0..num_blocks-1.
    """
    parts = []
    while count > 0:
        epoch, start = divmod(first, num_blocks)
        part = _permutation(seeds, client, epoch, num_blocks)[start : start + count]
        parts.append(part)
        first, count = first + len(part), count - len(part)
    return np.concatenate(parts)


@lru_cache(maxsize=256)
def _permutation(seeds: Seeds, client: int, epoch: int, num_blocks: int) -> np.ndarray:
    return generator(seeds, Stream.BLOCKS, client, epoch).permutation(num_blocks)

"""Assigns documents to clients: who holds which, what each holds out, and how far their texts differ."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from fedbert_jax.config import PartitionConfig
from fedbert_jax.data.streams import Seeds, Stream, generator
from fedbert_jax.errors import ConfigError


def assign(
    groups: Sequence[str], words: np.ndarray, partition: PartitionConfig, num_clients: int | None, seeds: Seeds
) -> tuple[tuple[str, ...], list[np.ndarray]]:
    """Deals documents to clients.

    `natural`: each group is a client, in order of name; with `num_clients`, only the groups with the most words.
    `iid`: documents are dealt at random, equally many to each client.
    `dirichlet`: each group is divided over the clients in proportions drawn from Dirichlet(alpha, ..., alpha)
    (Hsu et al. 2019, section 3, with the natural groups as classes).

    Args:
      groups: the group of each document.
      words: int [num_documents], words in each document.
      partition: kind and alpha.
      num_clients: N; None only for `natural`.
      seeds: for everything random here.

    Returns:
      The N clients' names, and for each an increasing int64 array of document indices, which may be empty.

    Raises:
      ConfigError: for more clients than there are groups or documents.
    """
    if partition.kind == "natural":
        return _natural(groups, words, num_clients)
    total = len(groups)
    if num_clients is None or num_clients > total:
        raise ConfigError(
            f"config key federated.num_clients={num_clients}: accepted: 1 to {total}, since the source has {total} "
            f"documents to deal (data.partition.kind={partition.kind!r})."
        )
    rng = generator(seeds, Stream.DEAL)
    owner = np.empty(total, dtype=np.int64)
    if partition.kind == "iid":
        owner[rng.permutation(total)] = np.arange(total) % num_clients
    else:
        alphas = np.full(num_clients, partition.alpha)
        for members in _members(groups)[1]:
            counts = rng.multinomial(len(members), rng.dirichlet(alphas))
            owner[rng.permutation(members)] = np.repeat(np.arange(num_clients), counts)
    width = len(str(num_clients - 1))
    names = tuple(f"client-{c:0{width}d}" for c in range(num_clients))
    return names, _split_by(owner, num_clients)


def _natural(groups: Sequence[str], words: np.ndarray, num_clients: int | None) -> tuple[tuple[str, ...], list[np.ndarray]]:
    names, members = _members(groups)
    if num_clients is not None and num_clients > len(names):
        raise ConfigError(
            f"config key federated.num_clients={num_clients}: accepted: 1 to {len(names)}, as many natural clients "
            "as the source has, or data.partition.kind='iid' or 'dirichlet', which make as many as asked for."
        )
    sizes = [int(words[m].sum()) for m in members]
    largest = sorted(range(len(names)), key=lambda g: (-sizes[g], names[g]))[:num_clients]
    chosen = sorted(largest)
    return tuple(names[g] for g in chosen), [members[g] for g in chosen]


def _members(groups: Sequence[str]) -> tuple[list[str], list[np.ndarray]]:
    """Returns the groups' names in alphabetical order, and the documents of each."""
    names = sorted(set(groups))
    index = {name: g for g, name in enumerate(names)}
    return names, _split_by(np.array([index[g] for g in groups], dtype=np.int64), len(names))


def _split_by(owner: np.ndarray, num: int) -> list[np.ndarray]:
    """Returns, for each of `num` owners, the increasing indices of what it owns; sorts once, whatever `num` is."""
    order = np.argsort(owner, kind="stable")
    return np.split(order, np.cumsum(np.bincount(owner, minlength=num))[:-1])


def hold_out(words: np.ndarray, fraction: float, seeds: Seeds, client: int) -> np.ndarray:
    """Draws a client's held-out documents at random, until they hold at least `fraction` of its words.

    At least one document always stays for training, so a client with a single document holds nothing out.

    Args:
      words: int [num_documents], words in each of the client's documents.
      fraction: of the client's words, between 0 and 1.
      seeds: the run's.
      client: the client's index, which gives it draws of its own.

    Returns:
      bool [num_documents], true where held out.
    """
    held = np.zeros(len(words), dtype=bool)
    if len(words) > 1:
        order = generator(seeds, Stream.HOLD_OUT, client).permutation(len(words))
        enough = np.searchsorted(np.cumsum(words[order]), fraction * words.sum()) + 1
        held[order[: min(int(enough), len(words) - 1)]] = True
    return held


def js_divergence(client_counts: Iterable[np.ndarray], pooled: np.ndarray) -> np.ndarray:
    """Measures how far each client's token frequencies are from everybody's, in bits (Lin 1991).

    0 means the same distribution, 1 no token in common. Takes one client at a time, so that N * V counts never need to be in
    memory.

    Args:
      client_counts: N integer arrays [V], each a client's count of each token (an [N, V] array will do).
      pooled: int [V], the count of each token over all clients.

    Returns:
      float64 [N]; 0 for a client without tokens.
    """
    everybody = pooled / max(int(pooled.sum()), 1)
    result = []
    for counts in client_counts:
        present = np.flatnonzero(counts)
        p = counts[present] / max(int(counts.sum()), 1)
        q = everybody[present]
        middle = (p + q) / 2
        # Where p is 0, q * log2(q / (q / 2)) is q, so all such tokens together add the rest of q's sum.
        bits = (p * np.log2(p / middle)).sum() + (1 - q.sum())
        bits += (q * np.log2(np.where(q > 0, q, 1) / middle)).sum()
        result.append(float(np.clip(bits / 2, 0, 1)) if len(present) else 0.0)
    return np.array(result)

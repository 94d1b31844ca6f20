"""The random draws of a run, written again from their definition, for tests to compare the package's draws with.

The server's draws follow from the server's seed, the clients' from the clients'. On the host, a draw comes from numpy's
default generator, seeded by the SHA-256 of "PARTY/SEED/TAG/NUMBER/NUMBER...". Inside a program, it comes from the key
that is the first 8 bytes of the SHA-256 of "PARTY/SEED", into which the tag and the numbers are folded one after another.
"""

from __future__ import annotations

import hashlib

import jax
import numpy as np

COHORT, ORDER, DEAL, EVALUATED, BODY_DROPOUT = 3, 4, 5, 6, 2  # the server's
SEGMENT_DROPOUT, MASK, BLOCKS, SCORED_BLOCKS, EVAL_MASK, NOISE = 17, 18, 19, 21, 22, 25  # the clients'


def generator(party: str, seed: int, tag: int, *numbers: int) -> np.random.Generator:
    name = "/".join([party, *(str(number) for number in (seed, tag, *numbers))])
    return np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest(), "little"))


def key(party: str, seed: int, tag: int, *numbers: int) -> jax.Array:
    words = np.frombuffer(hashlib.sha256(f"{party}/{seed}".encode()).digest()[:8], "<u4")
    result = jax.random.wrap_key_data(words.astype(np.uint32), impl="threefry2x32")
    for number in (tag, *numbers):
        result = jax.random.fold_in(result, number)
    return result


def cohort(seed: int, round: int, num_clients: int, size: int) -> list[int]:
    if size == num_clients:
        return list(range(num_clients))
    return sorted(generator("server", seed, COHORT, round).choice(num_clients, size, replace=False).tolist())


def turns(seed: int, round: int, clients: list[int]) -> list[int]:
    return [clients[n] for n in generator("server", seed, ORDER, round).permutation(len(clients))]


def blocks(seed: int, client: int, num_blocks: int, first: int, count: int) -> list[int]:
    """Places `first` to `first + count` of one shuffled epoch after another."""
    epochs = range((first + count) // num_blocks + 1)
    stream = [n for e in epochs for n in generator("client", seed, BLOCKS, client, e).permutation(num_blocks).tolist()]
    return stream[first : first + count]

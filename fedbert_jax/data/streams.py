"""Every stream of random numbers in a run: who draws it, and what it is a function of.

A draw depends on what its party knows: the server's draws on one secret, the clients' on another. Given the secret, a draw
is a function of its stream and of that stream's numbers (round, step, client, ...) alone, so nothing depends on what was
drawn before it, on what was resumed, or on how a run is spread over devices.

Host draws come from `generator`, those inside a compiled program from `key`. No two streams share a number: a generator is
seeded by a hash of everything that names it, and keys branch by the stream first and then by exactly as many numbers as the
stream has.
"""

from __future__ import annotations

import hashlib
from enum import Enum
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedbert_jax.config import Config

Party = Literal["server", "client"]


class Stream(Enum):
    """A stream: its tag, its party, and the numbers it is a function of. Tags never change, since they decide the draws."""

    # The server's draws, and those that the simulation makes for everybody.
    BODY = 1, "server", ()  # the body's initial values
    BODY_DROPOUT = 2, "server", ("round", "step", "client")
    COHORT = 3, "server", ("round",)  # who takes part
    ORDER = 4, "server", ("round",)  # the order of a sequential round's turns
    DEAL = 5, "server", ()  # which client holds which document, if that isn't natural
    EVALUATED = 6, "server", ()  # the clients who are evaluated
    DP_NOISE = 7, "server", ("round",)  # added to the average of the clients' clipped moves
    # The clients' draws.
    SEGMENT = 16, "client", ()  # the client segment's initial values
    SEGMENT_DROPOUT = 17, "client", ("round", "step", "client")
    MASK = 18, "client", ("round", "step", "client")
    BLOCKS = 19, "client", ("client", "epoch")  # the order in which a client's blocks are trained on
    HOLD_OUT = 20, "client", ("client",)  # which of its documents are held out
    SCORED_BLOCKS = 21, "client", ("client",)  # which of its held-out blocks are evaluated
    EVAL_MASK = 22, "client", ("client", "block")
    EXAMPLES = 23, "client", ("client", "epoch")  # fine-tuning: the order of a client's examples
    TASK_HOLD_OUT = 24, "client", ()  # fine-tuning: the training examples kept back to judge by
    NOISE = 25, "client", ("round", "step", "client")  # added to what leaves the client
    EVAL_NOISE = 26, "client", ("round", "client", "batch")  # the same at an evaluation, over a network

    @property
    def tag(self) -> int:
        return self.value[0]

    @property
    def party(self) -> Party:
        return self.value[1]  # type: ignore[return-value]

    @property
    def numbers(self) -> tuple[str, ...]:
        return self.value[2]


class Seeds(NamedTuple):
    """A run's two secrets, as whole numbers of any size."""

    server: int
    client: int

    def of(self, party: Party) -> int:
        """Returns a party's secret."""
        return self.server if party == "server" else self.client


class Secrets(NamedTuple):
    """The two secrets as PRNG keys, each a scalar, or [S] for several runs side by side."""

    server: jax.Array
    client: jax.Array


def seeds_of(config: Config) -> Seeds:
    """Returns a run's secrets; unless `privacy.client_seed` is set, both are `seed`."""
    client = config.privacy.client_seed
    return Seeds(config.seed, config.seed if client is None else client)


def generator(seeds: Seeds, stream: Stream, *numbers: int) -> np.random.Generator:
    """Returns the generator of a host draw.

    Args:
      seeds: the run's.
      stream: which stream.
      numbers: one for each of `stream.numbers`.
    """
    _check(stream, numbers)
    name = _hash(stream.party, seeds.of(stream.party), stream.tag, *map(int, numbers))
    return np.random.default_rng(int.from_bytes(name, "little"))


def secrets(seeds: Seeds) -> Secrets:
    """Returns the secrets as keys: 64 bits of a hash, so that any whole number is a seed and the parties share no key."""

    def one(party: Party) -> jax.Array:
        words = np.frombuffer(_hash(party, seeds.of(party))[:8], np.uint32)
        return jax.random.wrap_key_data(jnp.asarray(words), impl="threefry2x32")

    return Secrets(one("server"), one("client"))


def key(of: Secrets, stream: Stream, *numbers: jax.Array | int) -> jax.Array:
    """Returns the PRNG key of a draw inside a compiled program; numbers may be traced.

    `jax.random.split` of a key equals `fold_in` by 0, 1, .... So keys are only folded on the way here, and whoever draws
    either folds or splits the key that this returns, never both.
    """
    _check(stream, numbers)
    result = of.server if stream.party == "server" else of.client
    for number in (stream.tag, *numbers):
        result = jax.random.fold_in(result, number)
    return result


def _check(stream: Stream, numbers: tuple[object, ...]) -> None:
    if len(numbers) != len(stream.numbers):
        raise ValueError(f"{stream.name} is a function of {stream.numbers}, and was given {len(numbers)} numbers")


def _hash(*name: object) -> bytes:
    return hashlib.sha256("/".join(map(str, name)).encode()).digest()

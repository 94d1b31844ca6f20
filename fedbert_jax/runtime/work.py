"""The server's arithmetic, as its service needs it: `engine.Engine`, or a test's toy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from fedbert_jax.runtime.frames import Schema, Tensors
from fedbert_jax.runtime.turns import Barrier, Compute


class Lost(Exception):
    """No client has what a round ended with, so the round begins again."""


class Work(Protocol):
    """The server's arithmetic, as the service needs it (`engine.Engine`)."""

    def weights(self, members: Sequence[str], blocks: Mapping[str, int]) -> Sequence[float]:
        """Returns the shares of the clients of a round, which they are told."""
        ...

    def begin(self, round: int, members: tuple[str, ...], blocks: Mapping[str, int]) -> None:
        """Begins a round, anew or again."""
        ...

    def schema(self, barrier: Barrier) -> Schema:
        """Returns what is expected of a message at a barrier."""
        ...

    def compute(self, what: Compute) -> tuple[Mapping[str, Tensors], Callable[[], None]]:
        """Computes a barrier; returns answers, and what keeps the result. Raises `Lost` if the round has to begin again."""
        ...

    def finish_round(self) -> None:
        """Ends a round."""
        ...

    def segment(self) -> Tensors:
        """Returns the client segment."""
        ...

    def transform(self, tensors: Tensors) -> Tensors:
        """Runs the body for an evaluation."""
        ...

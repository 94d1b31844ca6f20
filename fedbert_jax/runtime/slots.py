"""Where a round's clients stand in the server's stacks of arrays [C, ...], and what stands where nobody is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fedbert_jax.runtime.payloads import stacked, zeros_like


class Slots(NamedTuple):
    """The places of a round's clients. C doesn't change when clients are absent or drop out, so nothing is recompiled."""

    members: tuple[str, ...]  # who is in the round
    size: int  # C
    in_turn: bool  # whether clients take turns: then C is 1, for whoever's turn it is

    def names(self, turn: Sequence[str]) -> list[str]:
        """Returns whose slot each is, of those whose turn it is; an empty one repeats the first name, with weight 0."""
        if self.in_turn:
            return list(turn)
        return [*self.members, *[self.members[0]] * (self.size - len(self.members))]

    def fill(self, given: Mapping[str, Any]) -> Any:
        """Stacks payloads, at least one, at their slots, [C, ...], with zeros where nobody is."""
        if self.in_turn:
            return stacked(list(given.values()))
        if len(given) == len(self.members) == self.size:
            return stacked([given[c] for c in self.members])
        zero = zeros_like(next(iter(given.values())))
        rows = [given.get(c, zero) for c in self.members]
        return stacked(rows + [zero] * (self.size - len(rows)))

    def at(self, shares: Mapping[str, float]) -> np.ndarray:
        """Returns numbers of clients at their slots, float32 [C]; 0 where nobody is."""
        weights = np.zeros(self.size, np.float32)
        for n, c in enumerate(self.members[: self.size] if not self.in_turn else list(shares)):
            weights[n] = shares.get(c, 0.0)
        return weights

    def of(self, stack: Any, client: str) -> Any:
        """Returns a client's part of a stack [C, ...]."""
        n = 0 if self.in_turn else self.members.index(client)
        return jax.tree.map(lambda x: x[n], stack)

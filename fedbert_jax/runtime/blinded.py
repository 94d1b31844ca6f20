"""Averaging that the server can't read: what a client sends and makes of the answer, and what the server answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import jax
import numpy as np

from fedbert_jax.config import Arrangement
from fedbert_jax.errors import UserError
from fedbert_jax.federated.state import Averaging
from fedbert_jax.federated.wire import num_bytes
from fedbert_jax.privacy.pads import NONCE, SEAL, Pads
from fedbert_jax.runtime import frames
from fedbert_jax.runtime.frames import Schema, Tensors, TensorSpec
from fedbert_jax.runtime.parties import ClientPrograms
from fedbert_jax.runtime.payloads import from_tensors, merged, schema_of, to_tensors
from fedbert_jax.runtime.shapes import Shapes
from fedbert_jax.runtime.turns import Id

PADDED, SUM = "padded", "padded_sum"  # numbers under a pad, and their sum
SNAPSHOT, ROUND = "snapshot", "round"  # what a client has sealed, and which round begins with it


class Poster(Protocol):
    """What carries a message (`member.Wire`)."""

    def post(self, id: Id, tensors: Tensors) -> Future[Tensors]:
        """Sends a message; the future has its answer."""
        ...


class Blinded:
    """A client's side.

    Args:
      pads: its own.
      programs: its arithmetic.
      shapes: what crosses.
      index: its place in the roster.
    """

    def __init__(self, pads: Pads, programs: ClientPrograms, shapes: Shapes, index: int):
        self._pads, self._programs, self._shapes, self._index = pads, programs, shapes, index
        self._first = False  # whether this client was the first of those who were in the last sum

    def mean(
        self, numbers: Any, state: Averaging, weight: float, id: Id, norm: np.ndarray, wire: Poster
    ) -> tuple[Any, Averaging]:
        """Returns the clients' weighted mean of their gradients, or of their moves, and what averaging carries on then.

        Raises:
          UserError: for an answer that can't be one, or pads that were used before.
        """
        like, programs = self._shapes.contribution, self._programs
        whole = to_tensors(PADDED, programs.whole(numbers, state.ranges, np.float32(weight)))
        answer = wire.post(id, self._pads.hide(whole, id, self._index) | {"norm": norm}).result()
        slots = answer["places"].size if "places" in answer else 0
        if why := frames.check(answer, answer_schema(like, slots)):
            raise UserError(f"the server's sum isn't one: {why}.")
        there = answer["places"] >= 0
        places = answer["places"][there].tolist()
        total = {name: x for name, x in answer.items() if name.startswith(SUM)}
        total = self._pads.show(total, id, places, answer["nonces"][there])
        self._first = bool(places) and places[0] == self._index
        mean, ranges = programs.mean_of(from_tensors(SUM, like, total), state.ranges, answer["share"])
        return mean, state._replace(ranges=ranges)

    def keep(self, held: Any, round: int, id: Id, wire: Poster) -> None:
        """Leaves with the server what a round begins with, sealed, if this client is the one to do so."""
        sealed = self.sealed(held, round)[SNAPSHOT] if self._first else np.zeros(0, np.uint8)
        wire.post(id, {SNAPSHOT: sealed}).result()

    def sealed(self, held: Any, round: int) -> Tensors:
        """Returns what a round begins with, for other clients to open; and which round that is."""
        snapshot = self._pads.seal([np.asarray(x) for x in jax.tree.leaves(held)], round)
        return {SNAPSHOT: snapshot, ROUND: np.asarray(round, np.int32)}

    def opened(self, tensors: Tensors, how: Arrangement) -> Any:
        """Returns what another client has sealed: what `kept` makes.

        Raises:
          UserError: if it can't be opened, or is of another round than it says.
        """
        if why := frames.check(tensors, schema_of("segment", sealed_shapes(self._shapes, how))):
            raise UserError(f"the server's segment isn't one that clients have sealed: {why}.")
        return opened(self._pads, from_tensors("segment", {SNAPSHOT: 0, ROUND: 0}, tensors), self._shapes, how)


def message_schema(shapes: Shapes) -> Schema:
    """Returns what is expected of a client's numbers under a pad."""
    return merged(schema_of(PADDED, shapes.contribution), {"nonce": TensorSpec("uint8", (NONCE,))})


def kept(segment: Any, opt: Any, averaging: Averaging, how: Arrangement) -> Any:
    """Returns what of a client's state all of them have the same: what a snapshot is of."""
    return segment, opt if how.averages_gradients else (), averaging


def opened(pads: Pads, sealed: Tensors, shapes: Shapes, how: Arrangement) -> Any:
    """Returns what `kept` made of a client's state, from what `Blinded.sealed` made of that."""
    leaves, treedef = jax.tree.flatten(kept(shapes.segment, shapes.segment_opt, shapes.averaging, how))
    return jax.tree.unflatten(treedef, pads.unseal(sealed[SNAPSHOT], leaves, int(sealed[ROUND])))


def sealed_shapes(shapes: Shapes, how: Arrangement) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a sealed snapshot, and of the round that it says it is of."""
    size = num_bytes(kept(shapes.segment, shapes.segment_opt, shapes.averaging, how))
    return {SNAPSHOT: jax.ShapeDtypeStruct((size + SEAL,), np.uint8), ROUND: jax.ShapeDtypeStruct((), np.int32)}


def snapshot_schema(shapes: Shapes, how: Arrangement) -> Schema:
    """Returns what is expected of who leaves a snapshot, or leaves that to another."""
    return {SNAPSHOT: TensorSpec("uint8", ((0, *sealed_shapes(shapes, how)[SNAPSHOT].shape),))}


def answer_schema(like: Any, slots: int) -> Schema:
    """Returns what is expected of a sum, and of the list of what it is the sum of."""
    beside = {
        "places": TensorSpec("int32", (slots,)),
        "nonces": TensorSpec("uint8", (slots, NONCE)),
        "share": TensorSpec("float32", ()),
    }
    return merged(schema_of(SUM, like), beside)


def answer(
    total: Any, messages: Mapping[str, Tensors], roster: Sequence[str], slots: int, shares: Sequence[float]
) -> Tensors:
    """Returns what the server answers: the sum, whose numbers with which nonces are in it, and the sum of their shares.

    Args:
      total: the sum, modulo 2**32.
      messages: what it is the sum of, by client.
      roster: the clients.
      slots: C; places of clients that are not there are -1.
      shares: of those that are.
    """
    places, nonces = np.full(slots, -1, np.int32), np.zeros((slots, NONCE), np.uint8)
    for n, (client, message) in enumerate(messages.items()):
        places[n], nonces[n] = roster.index(client), message["nonce"]
    beside: Tensors = {"places": places, "nonces": nonces, "share": np.asarray(np.sum(shares), np.float32)}
    return to_tensors(SUM, total) | beside

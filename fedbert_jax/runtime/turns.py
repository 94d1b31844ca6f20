"""The words of a federation's session: states, ids, barriers, what is to be computed, and what a client is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

ENROLLING, ROUND, DONE = "enrolling", "round", "done"
FORWARD, BACKWARD, CONTRIBUTE, UPLOAD, HAND_ON, SCORES = "forward", "backward", "contribute", "upload", "hand on", "scores"
KEEP = "keep"  # blinded averaging: one of the clients leaves with the server what the next round begins with, sealed
PHASES = (FORWARD, BACKWARD, CONTRIBUTE, UPLOAD, HAND_ON, KEEP, SCORES)


class Id(NamedTuple):
    """Which message of a client this is."""

    epoch: int  # grows whenever a round begins, again or anew, and whenever the server starts
    round: int  # from 0
    at: int  # the barrier's place in the round's script


class Barrier(NamedTuple):
    """A point of a round at which certain clients send a message, and the server answers them all."""

    phase: str  # such as "forward"
    step: int  # from 0
    who: tuple[str, ...]  # in the roster's order
    part: int = 0  # which of a step's microbatches


class Refused(NamedTuple):
    """Why a call is not answered. The codes are gRPC's."""

    code: str  # PERMISSION_DENIED, ALREADY_EXISTS, FAILED_PRECONDITION, INVALID_ARGUMENT, ABORTED
    text: str


class Reply(NamedTuple):
    """A message's answer."""

    payload: Any


class Compute(NamedTuple):
    """What the server has to compute now: a barrier at which all messages are there."""

    id: Id
    barrier: Barrier
    members: tuple[str, ...]  # who is in the round
    messages: Mapping[str, Any]  # payloads, by client: of those who answered at this barrier


class Turn(NamedTuple):
    """What a client that asks for the next round is told."""

    state: str  # ROUND: take part; DONE: training is over; ENROLLING: wait, for those in `missing`
    epoch: int = 0
    round: int = 0
    members: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    within: float | None = None  # seconds after which the round begins without those; None: it doesn't
    since: int = 0  # the epoch in which the round before ended


@dataclass(frozen=True)
class Rules:
    """How long a federation waits, and for how many."""

    quorum: int | None  # clients without whom a round neither begins nor goes on; None: all who are drawn and have not left
    deadline: float  # seconds that a barrier waits for the last client
    join_grace: float  # seconds that a round's beginning waits for clients who are not there; anew each round
    window: int = 1  # barriers that a client may be ahead: microbatches

"""The server's side of a federation as a state machine: calls and the clock go in, what is to be done comes out.

It has no I/O, no threads and no JAX, so its faults are tested in microseconds and are the same over every transport.
A round is a script of barriers: at each, certain clients send a message; when all of them have, the server computes
once and answers each.

    ENROLLING --all, or a quorum after the grace--> ROUND --script done--> ENROLLING, for the next round ... --> DONE

A message has an id (epoch, round, barrier) and a digest. The same id with the same content gets the same answer
again, so a lost reply may be asked for any number of times and an update happens exactly once. The unit of recovery
is the round: where a client comes back from a crash in the midst of one, the round is begun again, for all, under a
new epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedbert_jax.runtime.turns import DONE, ENROLLING, ROUND, Barrier, Compute, Id, Refused, Reply, Rules, Turn


@dataclass
class _Client:
    incarnation: str  # of the process: another one has lost what a round keeps
    blocks: int  # how much text it declared
    heard: float  # when it last called


@dataclass
class Session:
    """A federation's server, as far as it decides anything.

    Args:
      roster: who may take part, in the order that decides every sum's.
      rounds: in all.
      rules: see `Rules`.
      cohort_of: (round) -> the clients drawn for it, in the order of their turns where they take turns.
      script: (members, round) -> the round's barriers.
      epoch, round, gone, since: where an earlier session stood, who had left for good, when its last round had ended.
    """

    roster: tuple[str, ...]
    rounds: int
    rules: Rules
    cohort_of: Callable[[int], Sequence[str]]
    script: Callable[[tuple[str, ...], int], Sequence[Barrier]]
    epoch: int = 0
    round: int = 0
    gone: set[str] = field(default_factory=set)
    since: int = 0  # the epoch in which the round before ended

    state: str = field(default=ENROLLING, init=False)
    members: tuple[str, ...] = field(default=(), init=False)  # of the round
    cast: dict[str, int] = field(default_factory=dict, init=False)  # with whom the epoch began, in order, and their blocks
    at: int = field(default=0, init=False)
    draining: bool = field(default=False, init=False)
    events: list[dict[str, Any]] = field(default_factory=list, init=False)  # for the log; whoever reads them clears them
    _clients: dict[str, _Client] = field(default_factory=dict, init=False)
    _replaced: set[str] = field(default_factory=set, init=False)  # incarnations whose place another has taken
    _barriers: tuple[Barrier, ...] = field(default=(), init=False)
    _inbox: dict[tuple[str, int], Any] = field(default_factory=dict, init=False)  # payloads that wait, by (client, barrier)
    _mail: dict[tuple[str, Id], tuple[str, Any]] = field(default_factory=dict, init=False)  # digest; Reply, or None
    _begun: set[str] = field(default_factory=set, init=False)  # who has sent anything in this epoch
    _busy: bool = field(default=False, init=False)
    _since: float | None = field(default=None, init=False)  # when the barrier, or the enrolment, began

    # --- calls of clients ---

    def join(self, client: str, incarnation: str, blocks: int, now: float) -> Refused | None:
        """A client's process says that it is there. After a crash it is another process: its round begins again."""
        if client not in self.roster:
            return Refused("PERMISSION_DENIED", f"{client!r} is not in the roster")
        if client in self.gone:
            return Refused("PERMISSION_DENIED", f"{client!r} has left this federation for good")
        if incarnation in self._replaced:
            return Refused("PERMISSION_DENIED", f"another process has joined as {client!r} since, and takes its place")
        known = self._clients.get(client)
        if known is not None and known.incarnation == incarnation:
            known.heard = now
            return None
        if known is not None and known.blocks != blocks:
            return Refused(
                "FAILED_PRECONDITION", f"{client!r} had {known.blocks:,} blocks and now has {blocks:,}: its text must stay"
            )
        if known is not None:
            self._replaced.add(known.incarnation)
        self._clients[client] = _Client(incarnation, blocks, now)
        self._note("joined", client=client, here=len(self._clients))
        if known is not None and self.state == ROUND and client in self.members:
            self._restart(now, f"{client} came back")
        elif self.state == ENROLLING:
            self._begin(now)
        return None

    def leave(self, client: str, now: float) -> None:
        """A client leaves for good, or has no place here any more: no round waits for it from now on."""
        if client in self.gone or client not in self.roster:
            return
        self.gone.add(client)
        self._clients.pop(client, None)
        self._note("left", client=client)
        if self.state == ROUND and client in self.members:
            self._drop([client], now, "left")
        elif self.state == ENROLLING:
            self._begin(now)

    def next_turn(self, client: str, incarnation: str, now: float) -> Turn | Refused:
        """A client asks what to do. It takes part if a round of its stands at its beginning."""
        known = self._clients.get(client)
        if known is None or known.incarnation != incarnation:
            return Refused("FAILED_PRECONDITION", f"{client!r} has to join first")
        known.heard = now
        if self.state == DONE:
            return Turn(DONE, self.epoch, self.round)
        if self.state == ROUND and client in self.members and not self._touched(client):
            return Turn(ROUND, self.epoch, self.round, tuple(self.cast), since=self.since)
        return Turn(ENROLLING, self.epoch, self.round, missing=self.missing(), within=self.within(now))

    def message(self, client: str, id: Id, payload: Any, digest: str, now: float) -> Refused | None:
        """A client sends a message. Its answer is in `poll`, once all others have sent theirs."""
        if client not in self.roster:
            return Refused("PERMISSION_DENIED", f"{client!r} is not in the roster")
        if client in self._clients:
            self._clients[client].heard = now
        seen = self._mail.get((client, id))
        if seen is not None:
            return None if seen[0] == digest else Refused("ALREADY_EXISTS", f"{_name(id)} was sent with other content")
        if refused := self._misplaced(client, id):
            return refused
        self._mail[client, id] = (digest, None)
        self._begun.add(client)
        self._inbox[client, id.at] = payload
        return None

    def expected(self, client: str, id: Id) -> Barrier | None:
        """Returns the barrier at which a message of this id would be taken now; None if it would not be."""
        return None if client not in self.roster or self._misplaced(client, id) else self._barriers[id.at]

    def poll(self, client: str, id: Id) -> Reply | Refused | None:
        """Returns the answer to a message that was sent; None while it is waited for."""
        seen = self._mail.get((client, id))
        if seen is not None and seen[1] is not None:
            return seen[1]
        if seen is not None and id.epoch == self.epoch and client in self.members:
            return None
        return self._misplaced(client, id) or Refused("FAILED_PRECONDITION", f"{_name(id)} was not sent")

    # --- the server's own ---

    def tick(self, now: float) -> None:
        """Looks at the clock: lets a round begin without those who are not there, or go on without those who are late."""
        if self.state == ENROLLING:
            self._begin(now)
        elif self.state == ROUND and not self._busy and self._since is not None:
            if not (late := self.late()) or now - self._since < self.rules.deadline:
                return
            if len(self.members) - len(late) < self._needed(self.round):
                # Fewer than the quorum would stay: those who are late are waited for, and the round is not spoiled.
                self._since = now
                self._note("waiting", clients=late)
                return
            self._drop(late, now, f"late at {self._where()}")

    def due(self) -> Compute | None:
        """Returns what is to be computed now, if anything is; it is under way until `computed` or `lost`."""
        if self.state != ROUND or self._busy or self.at >= len(self._barriers):
            return None
        barrier = self._barriers[self.at]
        who = tuple(c for c in barrier.who if c in self.members)
        if any((c, self.at) not in self._inbox for c in who):
            return None
        self._busy = True
        messages = {c: self._inbox.pop((c, self.at)) for c in who}
        return Compute(Id(self.epoch, self.round, self.at), barrier, self.members, messages)

    def computed(self, what: Compute, replies: Mapping[str, Any], now: float) -> bool:
        """Takes the result of `due`: answers go out, and the next barrier is waited at.

        Returns:
          Whether it counts. If not, the round was begun again in the meantime, and nothing of this result may be kept.
        """
        if what.id.epoch != self.epoch:
            return False
        self._busy = False
        for client in what.messages:
            digest, _ = self._mail[client, what.id]
            self._mail[client, what.id] = (digest, Reply(replies.get(client)))
        self.at += 1
        self._since = now
        self._forget()
        self._skip()
        if self.at >= len(self._barriers):
            self._note("round", round=self.round, members=self.members)
            self.round, self.since = self.round + 1, self.epoch
            self.state = DONE if self.round >= self.rounds or self.draining else ENROLLING
            if self.state == ENROLLING:
                self._since = now
                self._begin(now)
        return True

    def lost(self, what: Compute, why: str, now: float) -> None:
        """Takes it that nothing comes of what was to be computed: the round begins again."""
        if what.id.epoch == self.epoch:
            self._restart(now, why)

    def drain(self) -> None:
        """Lets the round under way be the last one."""
        self.draining, self.state = True, DONE if self.state == ENROLLING else self.state

    # --- what others may ask ---

    def here(self) -> tuple[str, ...]:
        """Returns who has joined, in the roster's order."""
        return tuple(c for c in self.roster if c in self._clients)

    def missing(self) -> tuple[str, ...]:
        """Returns who of the next round's cohort is not there."""
        drawn = self.cohort_of(self.round) if self.round < self.rounds else ()
        return tuple(c for c in drawn if c not in self._clients and c not in self.gone)

    def late(self) -> tuple[str, ...]:
        """Returns who of the round has not sent what the barrier waits for."""
        if self.state != ROUND or self._busy or self.at >= len(self._barriers):
            return ()
        return tuple(c for c in self._barriers[self.at].who if c in self.members and (c, self.at) not in self._inbox)

    def within(self, now: float) -> float | None:
        """Returns in how many seconds it goes on without those who are missing or late; None: it doesn't."""
        if self._since is None or self.state == DONE:
            return None
        begins = self.state == ENROLLING
        stay = len(self.cohort_of(self.round)) - len(self.missing()) if begins else len(self.members) - len(self.late())
        if stay < self._needed(self.round):
            return None
        return max(0.0, self._since + (self.rules.join_grace if begins else self.rules.deadline) - now)

    def blocks(self) -> dict[str, int]:
        """Returns how much text each client has declared."""
        return {c: self._clients[c].blocks for c in self.here()}

    def held(self) -> int:
        """Returns how many payloads and answers are held: it doesn't grow with the rounds."""
        return len(self._inbox) + len(self._mail)

    # --- how it goes on ---

    def _begin(self, now: float) -> None:
        """Begins the round if everybody drawn is there, or a quorum is and the others have had their grace."""
        if self.state != ENROLLING:
            return
        # A round whose clients have left for good can never begin: the next one that can takes its place.
        possible = (r for r in range(self.round, self.rounds) if len(self._left(r)) >= self._needed(r))
        ahead = None if self.draining else next(possible, None)
        if ahead is None:
            self.state = DONE
            return
        while self.round < ahead:
            self._note("skipped", round=self.round)
            self.round += 1
        if self._since is None:
            self._since = now
        there = tuple(c for c in self.cohort_of(self.round) if c in self._clients)
        if len(there) < self._needed(self.round) or (self.missing() and now - self._since < self.rules.join_grace):
            return
        self.members, self.state = there, ROUND
        self._start(now)
        self._note("begins", round=self.round, members=there, absent=self.missing())

    def _left(self, round: int) -> tuple[str, ...]:
        """Returns who of a round's cohort has not left for good."""
        return tuple(c for c in self.cohort_of(round) if c not in self.gone)

    def _needed(self, round: int) -> int:
        """Returns how many clients a round needs."""
        return max(1, len(self._left(round)) if self.rules.quorum is None else self.rules.quorum)

    def _start(self, now: float) -> None:
        self.epoch += 1
        self.at, self._busy, self._since = 0, False, now
        self._begun.clear()
        self._barriers = tuple(self.script(self.members, self.round))
        self.cast = {c: self._clients[c].blocks for c in self.members}
        self._inbox.clear()
        # Of the round before, the last answers are kept: one of them may have been lost.
        self._mail = {key: value for key, value in self._mail.items() if value[1] is not None}
        self._forget()

    def _restart(self, now: float, why: str) -> None:
        """Begins the round again, for all in it."""
        self._mail = {key: value for key, value in self._mail.items() if key[1].epoch != self.epoch}
        self._start(now)
        self._note("again", round=self.round, why=why)

    def _drop(self, clients: Sequence[str], now: float, why: str) -> None:
        """Goes on without clients: they come back with the next round. A turn that breaks off has never been."""
        alone = self._barriers[self.at].who if self.at < len(self._barriers) else ()
        broken = [c for c in clients if alone == (c,) and self._touched(c)]
        self.members = tuple(c for c in self.members if c not in clients)
        for client in clients:
            self._inbox = {key: value for key, value in self._inbox.items() if key[0] != client}
            self._note("dropped", client=client, round=self.round, at=self.at, why=why)
        self._since = now
        if len(self.members) < self._needed(self.round):
            self.state, self.epoch, self._busy = ENROLLING, self.epoch + 1, False  # the round begins again, with enough
            self._inbox.clear()
            self._begin(now)
        elif broken:
            self._restart(now, f"the turn of {broken[0]} broke off")
        elif not self._busy:
            self._skip()
            if self.at >= len(self._barriers):  # its turn was the last: nobody is left whose message would end the round
                self._restart(now, f"{clients[0]} had the last turn")

    def _skip(self) -> None:
        """Passes over barriers at which nobody is left to send anything."""
        while self.at < len(self._barriers) and not any(c in self.members for c in self._barriers[self.at].who):
            self.at += 1

    def _misplaced(self, client: str, id: Id) -> Refused | None:
        if id.epoch != self.epoch or id.round != self.round or self.state != ROUND:
            return Refused("ABORTED", f"{_name(id)} is over, or was begun again; ask for the next turn")
        if client not in self.members:
            return Refused("ABORTED", f"{client} was left out of round {self.round + 1}, and comes back with the next one")
        here = self.at <= id.at < min(self.at + self.rules.window, len(self._barriers))
        if not here or client not in self._barriers[id.at].who:
            return Refused("FAILED_PRECONDITION", f"expected {self._where()}, got {_name(id)}")
        return None

    def _touched(self, client: str) -> bool:
        """Whether a client has sent anything in this epoch: then it is in the midst of its round."""
        return client in self._begun

    def _forget(self) -> None:
        """Keeps the answers that may still be asked for: those of the last barriers that a client can have waited at."""
        newest = sorted({id for _, id in self._mail})[-(self.rules.window + 1) :]
        self._mail = {key: value for key, value in self._mail.items() if key[1] in newest or value[1] is None}

    def _where(self) -> str:
        barrier = self._barriers[self.at] if self.at < len(self._barriers) else None
        said = f" ({barrier.phase}, step {barrier.step})" if barrier else ""
        return f"{_name(Id(self.epoch, self.round, self.at))}{said}"

    def _note(self, event: str, **what: Any) -> None:
        self.events.append({"event": event, **what})


def _name(id: Id) -> str:
    return f"message {id.at} of round {id.round + 1} (epoch {id.epoch})"

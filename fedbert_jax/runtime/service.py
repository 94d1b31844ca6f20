"""The server as its transports see it: a call of a client goes in, with its name and its bytes, and bytes come out.

Every transport brings the same calls here. Handlers run in the transport's threads and wait; the arithmetic runs in one
thread, outside the lock, so that a call is heard while the server computes.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Hashable
from typing import Any

from fedbert_jax.runtime import frames
from fedbert_jax.runtime.calls import HEADER, METHODS, Abort, Hello
from fedbert_jax.runtime.changes import Changes
from fedbert_jax.runtime.frames import FrameError, Schema, Tensors
from fedbert_jax.runtime.session import Session
from fedbert_jax.runtime.turns import DONE, PHASES, Barrier, Compute, Id, Refused, Reply, Turn
from fedbert_jax.runtime.work import Lost, Work

WORK, TURN = "work", "turn"  # what a thread waits for, beside the answer to a message


class Service:
    """A federation's server, without a transport.

    Args:
      session: who is waited for.
      work: what is computed.
      hello: what clients must agree with; its `secret` is the first client's.
      transform: what is expected of a call for evaluation.
      evaluates: (round) -> whether it ends with an evaluation.
      segment: what is expected of the segment that the first client brings; None if the server has one.
      on_segment: takes it.
      on_round: called when a round is over, with its number and its members.
      on_end: called when training is over, before any client is told: what they then leave behind has to be safe.
      in_turn: whether clients take turns, each beginning with what the one before it has handed on.
      body: (): what clients get when training is over; None: nothing.
      run: the training's name, which clients are told.
      clock: seconds, from anywhere.
    """

    def __init__(
        self,
        session: Session,
        work: Work,
        hello: Hello,
        transform: Schema,
        evaluates: Callable[[int], bool] = lambda round: False,
        segment: Schema | None = None,
        on_segment: Callable[[Tensors], None] = lambda tensors: None,
        on_round: Callable[[int, tuple[str, ...]], None] = lambda round, members: None,
        on_end: Callable[[], None] = lambda: None,
        in_turn: bool = False,
        body: Callable[[], Tensors] | None = None,
        run: str = "",
        clock: Callable[[], float] = time.monotonic,
    ):
        self.session, self.work, self.hello, self.clock = session, work, hello, clock
        self._transform, self._evaluates = transform, evaluates
        self._segment, self._take_segment, self._on_round, self._on_end = segment, on_segment, on_round, on_end
        # It stays when there is a segment: another client may be on its way with one, or the same one for the second time.
        self._largest_segment = 4 * HEADER + (frames.size_of(segment) if segment else 0)
        self._in_turn, self._body, self._run = in_turn, body, run
        self._changed = Changes()
        self._secret, self._epoch = hello.secret, -1  # the epoch that the work has begun
        self._stop = self._over = False
        self._dismissed: set[str] = set()
        self.received = self.sent = 0  # bytes of frames
        self.failure: BaseException | None = None

    # --- calls ---

    def call(self, method: str, client: str, data: bytes, alive: Callable[[], bool] = lambda: True) -> bytes:
        """Answers a client's call; waits as long as it takes, or until the client has gone.

        Raises:
          Abort: with a gRPC code and a sentence.
        """
        handler = getattr(self, f"_on_{method}", None) if method in METHODS else None
        if handler is None:
            raise Abort("UNIMPLEMENTED", f"there is no call {method!r}")
        if client not in self.session.roster and method != "status":
            raise Abort("PERMISSION_DENIED", f"{client!r} is not in the roster")
        try:
            meta, tensors = frames.decode(data, self.limit(method))
        except FrameError as error:
            raise Abort(error.code, f"{method}: {error}") from None
        with self._changed:
            self.received += len(data)
        try:
            answer = handler(client, meta, tensors, data, alive)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise Abort("INVALID_ARGUMENT", f"{method}: the meta data is not as expected ({type(error).__name__})") from None
        with self._changed:
            self.sent += len(answer)
        return answer

    def limit(self, method: str) -> int:
        """Returns how many bytes a call's frame may have."""
        if method == "message":
            return HEADER + self._largest
        if method == "transform":
            return HEADER + frames.size_of(self._transform)
        return self._largest_segment if method == "bring" else HEADER

    @functools.cached_property
    def _largest(self) -> int:
        """Bytes of the tensors of a round's largest message. Every call asks, so this is worked out once."""
        sizes = [0]
        for phase in PHASES:
            with contextlib.suppress(KeyError):  # a message that rounds of this kind don't have
                sizes.append(frames.size_of(self.work.schema(Barrier(phase, 0, ()))))
        return max(sizes)

    def _on_join(self, client: str, meta: Any, tensors: Tensors, data: bytes, alive: Any) -> bytes:
        theirs = Hello(meta["config"], meta["tokenizer"], meta["secret"], meta["version"])
        if theirs.version != self.hello.version:
            said = f"fedbert_jax {theirs.version} here, {self.hello.version} at the server: both need the same"
            raise Abort("FAILED_PRECONDITION", said)
        ours = self.hello.config
        different = [key for key in ours if theirs.config.get(key) != ours[key]] + sorted(theirs.config.keys() - ours.keys())
        if different:
            shown = ", ".join(f"{k}={theirs.config.get(k)!r} (the server has {ours.get(k)!r})" for k in different[:5])
            raise Abort("FAILED_PRECONDITION", f"the configs differ: {shown}")
        if theirs.tokenizer != self.hello.tokenizer:
            raise Abort("FAILED_PRECONDITION", "the tokenizers differ: data.tokenizer must be the same files on all sides")
        blocks = meta["blocks"]
        if type(blocks) is not int or not 0 < blocks < 2**40:
            raise Abort("INVALID_ARGUMENT", f"{client!r} declares {blocks!r} blocks of text; accepted: at least 1")
        with self._changed:
            if self._secret and theirs.secret != self._secret:
                raise Abort("FAILED_PRECONDITION", "privacy.client_seed differs from the other clients': all need the same")
            self._secret = theirs.secret
            refused = self.session.join(client, str(meta["incarnation"]), blocks, self.clock())
            self._changed.tell()
            if refused:
                raise Abort(*refused)
            answer = {"epoch": self.session.epoch, "round": self.session.round, "bring": self._segment is not None}
        return frames.encode(answer)

    def _on_bring(self, client: str, meta: Any, tensors: Tensors, data: bytes, alive: Any) -> bytes:
        """A client brings the segment that all of them have drawn: the server, which can't draw it, has none yet."""
        with self._changed:
            wanted = self._segment
        if wanted is not None:
            if why := frames.check(tensors, wanted):
                raise Abort("INVALID_ARGUMENT", f"bring: {why}")
            with self._changed:
                if self._segment is not None:
                    self._take_segment({name: x.copy() for name, x in tensors.items()})
                    self._segment = None
                self._changed.tell()
        return frames.encode({})

    def _on_turn(self, client: str, meta: Any, tensors: Tensors, data: bytes, alive: Any) -> bytes:
        """What to do next: waits up to `patience` seconds for something else than waiting."""
        end = self.clock() + min(float(meta["patience"]), 60.0)
        with self._changed:
            while True:
                turn = self.session.next_turn(client, str(meta["incarnation"]), self.clock())
                if isinstance(turn, Refused):
                    raise Abort(*turn)
                if self._segment is not None and turn.state != DONE:
                    turn = Turn("enrolling", missing=("the first segment",))
                if turn.state == DONE and not self._over:
                    turn = Turn("enrolling", turn.epoch, turn.round, missing=("the server's last checkpoint",))
                if turn.state != "enrolling" or self.clock() >= end or not alive() or self._stop:
                    break
                self._changed.wait(TURN)
            if turn.state == DONE and turn.round < self.session.rounds:
                self._dismissed.add(client)  # it comes back when the server does, and has nothing to fetch
            shares = self.work.weights(turn.members, self.session.cast) if turn.members else ()
            share = dict(zip(turn.members, map(float, shares), strict=True))
            evaluates = turn.state == "round" and self._evaluates(turn.round)
        return frames.encode(turn._asdict() | {"weight": share.get(client, 0.0), "evaluates": evaluates})

    def _on_segment(self, client: str, meta: Any, tensors: Tensors, data: bytes, alive: Any) -> bytes:
        """The segment that a round, or a turn, begins with; when training is over, the last one."""
        id = Id(*map(int, meta["id"]))
        with self._changed:
            if self.session.state == DONE:
                return frames.encode({}, self.work.segment())
            while self._in_turn and self.session.at < id.at and (id.epoch, id.round) == self._place() and alive():
                self._wait(TURN)
            if (id.epoch, id.round) != self._place():
                raise Abort("ABORTED", f"round {id.round + 1} (epoch {id.epoch}) is over, or was begun again")
            while self._epoch != id.epoch and alive() and (id.epoch, id.round) == self._place():
                self._wait(TURN)  # the work hasn't begun it yet
            found = self.work.segment()
        return frames.encode({}, found)

    def _on_message(self, client: str, meta: Any, tensors: Tensors, data: bytes, alive: Any) -> bytes:
        id = Id(*map(int, meta["id"]))
        with self._changed:
            barrier = self.session.expected(client, id)
        if barrier is not None and (why := frames.check(tensors, self.work.schema(barrier))):
            raise Abort("INVALID_ARGUMENT", f"{barrier.phase}, step {barrier.step} of round {id.round + 1}: {why}")
        digest = frames.digest(data)
        with self._changed:
            refused = self.session.message(client, id, tensors, digest, self.clock())
            self._changed.tell(WORK)
            if refused:
                raise Abort(*refused)
            while True:
                answer = self.session.poll(client, id)
                if isinstance(answer, Refused):
                    raise Abort(*answer)
                if isinstance(answer, Reply):
                    break
                if not alive():
                    raise Abort("CANCELLED", f"{client} has gone")
                self._wait(id.at)
        return frames.encode({}, answer.payload or {})

    def _on_transform(self, client: str, meta: Any, tensors: Tensors, data: bytes, alive: Any) -> bytes:
        id = Id(*map(int, meta["id"]))
        if why := frames.check(tensors, self._transform):
            raise Abort("INVALID_ARGUMENT", f"evaluation after round {id.round + 1}: {why}")
        with self._changed:
            barrier = self.session.expected(client, id)
            if barrier is None or barrier.phase != "scores":
                raise Abort("ABORTED", f"round {id.round + 1} (epoch {id.epoch}) is not being evaluated")
        return frames.encode({}, self.work.transform(tensors))

    def _on_body(self, client: str, meta: Any, tensors: Tensors, data: bytes, alive: Any) -> bytes:
        with self._changed:
            if self.session.state != DONE or self.session.round < self.session.rounds:
                raise Abort("FAILED_PRECONDITION", "training isn't over")
        if self._body is None:
            raise Abort("PERMISSION_DENIED", "the server keeps the body (network.release_body)")
        return frames.encode({}, self._body())

    def _on_leave(self, client: str, meta: Any, tensors: Tensors, data: bytes, alive: Any) -> bytes:
        self.remove(client)
        return frames.encode({})

    def remove(self, client: str) -> None:
        """Goes on without a client whose place here is no more."""
        with self._changed:
            self.session.leave(client, self.clock())
            self._changed.tell()

    def _on_enrol(self, client: str, meta: Any, tensors: Tensors, data: bytes, alive: Any) -> bytes:
        return frames.encode({"roster": list(self.session.roster), "run": self._run})

    def _on_status(self, client: str, meta: Any, tensors: Tensors, data: bytes, alive: Any) -> bytes:
        with self._changed:
            return frames.encode(self.status())

    def status(self) -> dict[str, Any]:
        """Returns where the federation stands: what `python -m fedbert_jax.status` shows."""
        s = self.session
        return {
            "state": s.state,
            "round": s.round,
            "rounds": s.rounds,
            "roster": list(s.roster),
            "here": list(s.here()),
            "members": list(s.members) if s.state == "round" else [],
            "late": list(s.late()),
            "missing": list(s.missing()) if s.state == "enrolling" else [],
            "within": s.within(self.clock()),
            "received_bytes": self.received,
            "sent_bytes": self.sent,
        }

    def _on_bye(self, client: str, meta: Any, tensors: Tensors, data: bytes, alive: Any) -> bytes:
        with self._changed:
            self._dismissed.add(client)
            self._changed.tell()
        return frames.encode({})

    def farewell(self, seconds: float) -> None:
        """Waits until all clients have got what is theirs and said goodbye, but not for ever: one may be on its way back."""
        end = self.clock() + seconds
        with self._changed:
            while set(self.session.roster) - self.session.gone - self._dismissed and self.clock() < end:
                self._changed.wait(TURN)

    def _place(self) -> tuple[int, int]:
        return self.session.epoch, self.session.round

    def _wait(self, about: Hashable) -> None:
        if self._stop:
            raise Abort("UNAVAILABLE", "the server is stopping")
        self._changed.wait(about)

    # --- the work ---

    def run(self, watch: Callable[[Session], None] = lambda session: None) -> None:
        """Computes what is due until training is over, or `stop`; `watch` is called with the session every now and then."""
        while not self._stop:
            with self._changed:
                self.session.tick(self.clock())
                if self.session.state == DONE:
                    break
                begins = self.session.state == "round" and self._epoch != self.session.epoch and self._segment is None
                epoch, round, cast = self.session.epoch, self.session.round, self.session.cast
                what = None if self._segment is not None or begins else self.session.due()
                if what is None and not begins:
                    self._changed.wait(WORK)
            watch(self.session)
            if begins:
                self.work.begin(round, tuple(cast), cast)
                with self._changed:
                    self._epoch = epoch
                    self._changed.tell()
            elif what is not None:
                self._do(what)
        if not self._stop:
            self._on_end()
            with self._changed:
                self._over = True
                self._changed.tell()

    def _do(self, what: Compute) -> None:
        try:
            answers, keep = self.work.compute(what)
        except Lost as error:
            with self._changed:
                self.session.lost(what, str(error), self.clock())
                self._changed.tell()
            return
        with self._changed:
            round = self.session.round
            if self.session.computed(what, answers, self.clock()):
                keep()
            over = self.session.round > round
            self._changed.tell(*(() if over else (what.id.at, TURN)))
        if over:
            # Clients may be on their way to the next round; it begins when this one is kept.
            self.work.finish_round()
            self._on_round(what.id.round, what.members)

    def drain(self) -> None:
        """Lets the round under way be the last one."""
        with self._changed:
            self.session.drain()
            self._changed.tell()

    def stop(self) -> None:
        """Ends `run`, and every call that waits."""
        with self._changed:
            self._stop = True
            self._changed.tell()

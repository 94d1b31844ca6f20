"""A client's way through a federation: it joins, takes its turns, comes back after an outage, and ends with the others."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from fedbert_jax.errors import UserError
from fedbert_jax.runtime import frames
from fedbert_jax.runtime.calls import Abort, Hello
from fedbert_jax.runtime.frames import FrameError, Tensors
from fedbert_jax.runtime.member import Ended, Held, Part
from fedbert_jax.runtime.turns import DONE, ROUND, Id

FIRST_PAUSE, LONGEST_PAUSE = 0.2, 5.0  # seconds between two tries to reach the server
PROBE = 10.0  # seconds that a server which is there needs at most to say so
# What may go well another time: the server isn't there, doesn't answer, or a frame was damaged on its way to either side.
PASSING = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "DATA_LOSS")


class Transport(Protocol):
    """What brings a call to the server. It raises `calls.Abort`; UNAVAILABLE is that it can't be reached."""

    where: str  # the server's address, to be shown

    def call(self, method: str, data: bytes, timeout: float) -> bytes:
        """Sends a frame and returns the answer's."""
        ...

    def close(self) -> None:
        """Ends the connection."""
        ...


class Line:
    """A client's messages over a transport (`member.Wire`): what isn't answered is sent again, with the same id.

    Args:
      transport: what carries them.
      parts: how many may be on their way at once.
      limit: bytes that an answer may have.
      patience: seconds for which an unreachable server is called again.
      timeout: seconds that one call may take.
      say: called with a sentence when the server can't be reached, and when it can again.
      stop: whether to give up calling a server that can't be reached.
    """

    def __init__(
        self,
        transport: Transport,
        parts: int,
        limit: int,
        patience: float,
        timeout: float,
        say: Callable[[str], None] = lambda text: None,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
        stop: Callable[[], bool] = lambda: False,
    ):
        self.stop = stop
        self._transport, self._limit, self._patience, self._timeout = transport, limit, patience, timeout
        self._say, self._sleep, self._clock = say, sleep, clock
        self._pool = ThreadPoolExecutor(parts, thread_name_prefix="fedbert-line") if parts > 1 else None
        self.id = Id(0, 0, 0)  # of the evaluation under way
        self.sent = self.received = 0  # bytes of frames
        self._counting = threading.Lock()  # several messages may be under way at once
        self._asking: float | None = None  # since when an answer has been waited for

    def ask(self, method: str, meta: dict[str, Any], tensors: Tensors | None = None) -> tuple[dict[str, Any], Tensors]:
        """Calls the server, again and again while it can't be reached.

        Raises:
          Abort: with what the server refuses, or UNAVAILABLE after `patience` seconds or where `stop` says so.
        """
        data, pause = frames.encode(meta, tensors), FIRST_PAUSE
        since: float | None = None  # when the server was first not reached
        while True:
            try:
                answer = self._call(method, data)
                found = self._decoded(method, answer)
            except Abort as error:
                if error.code not in PASSING:
                    self._reached(since)
                    raise
                if error.code == "DEADLINE_EXCEEDED" and self.status() is not None:
                    self._reached(since)
                    since = None  # it waits for others, which may take any time
                    continue
                if since is None:
                    since = self._clock()
                    self._say(f"no answer from the server ({error.text}); trying again for at most {self._patience:.0f} s")
                elif self._clock() - since > self._patience or self.stop():
                    raise
                self._sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
                continue
            self._reached(since)
            with self._counting:
                self.sent, self.received = self.sent + len(data), self.received + len(answer)
            return found

    def _reached(self, since: float | None) -> None:
        if since is not None:
            self._say("the server answers again")

    def status(self) -> dict[str, Any] | None:
        """Returns where the federation stands, if the server says so at once."""
        try:
            return self._decoded("status", self._transport.call("status", frames.encode({}), min(self._timeout, PROBE)))[0]
        except Abort:
            return None

    def asked_for(self) -> float | None:
        """Returns for how many seconds the answer to a message has been waited for; None if none is."""
        since = self._asking
        return None if since is None else self._clock() - since

    def _call(self, method: str, data: bytes) -> bytes:
        if method != "message":
            return self._transport.call(method, data, self._timeout)
        self._asking = self._clock()
        try:
            return self._transport.call(method, data, self._timeout)
        finally:
            self._asking = None

    def _decoded(self, method: str, answer: bytes) -> tuple[dict[str, Any], Tensors]:
        try:
            return frames.decode(answer, self._limit)
        except FrameError as error:
            raise Abort(error.code, f"the answer to {method}: {error}") from None

    def post(self, id: Id, tensors: Tensors) -> Future[Tensors]:
        """Sends a message of a round."""
        if self._pool is not None:
            return self._pool.submit(lambda: self.ask("message", {"id": list(id)}, tensors)[1])
        future: Future[Tensors] = Future()
        future.set_result(self.ask("message", {"id": list(id)}, tensors)[1])
        return future

    def segment(self, id: Id) -> Tensors:
        """Asks for the segment as it is at a barrier."""
        return self.ask("segment", {"id": list(id)})[1]

    def transform(self, tensors: Tensors) -> Tensors:
        """Asks for the body's output."""
        return self.ask("transform", {"id": list(self.id)}, tensors)[1]

    def close(self) -> None:
        """Ends the threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)


class Participant:
    """One client of a federation, from joining to the end.

    Args:
      member: its arithmetic.
      line: what carries its messages.
      name: in the roster.
      hello: what it says of itself.
      blocks: how much training text it has.
      held: what it holds, of an earlier process; None before the first.
      wait: seconds that it asks for the next turn at a time.
      recall: (round) -> what it held at that round's beginning, if it kept that; asked when the server has gone back.
      fresh: what becomes of the segment that it begins with: a checkpoint's values, say.
    """

    def __init__(
        self,
        member: Part,
        line: Line,
        name: str,
        hello: Hello,
        blocks: int,
        held: Held | None = None,
        wait: float = 20.0,
        recall: Callable[[int], Held | None] = lambda round: None,
        fresh: Callable[[Held], Held] | None = None,
    ):
        self.member, self.line, self.name, self.hello, self.blocks = member, line, name, hello, blocks
        self.held, self.wait, self._recall, self._fresh = held, wait, recall, fresh
        self.incarnation = uuid.uuid4().hex
        self.over_at = 0  # the round after which the server ended

    def join(self) -> dict[str, Any]:
        """Says that it is there; brings the first segment, if the server has none.

        Raises:
          UserError: if the server refuses it.
          Abort: if it can't be reached, and the line's `stop` says so.
        """
        meta = self.hello._asdict() | {"incarnation": self.incarnation, "blocks": self.blocks}
        try:
            answer, _ = self.line.ask("join", meta)
            if answer["bring"]:
                self.line.ask("bring", {}, self.member.brought(self._first()))
        except Abort as error:
            if error.code in PASSING and self.line.stop():
                raise
            raise UserError(f"the server refuses {self.name!r}: {error.text}.") from error
        return answer

    def _first(self) -> Held:
        """Returns what it holds before the first round."""
        held = self.member.fresh()
        return held if self._fresh is None else self._fresh(held)

    def run(
        self,
        on_round: Callable[[int, Ended], None] = lambda round, ended: None,
        on_wait: Callable[[dict[str, Any]], None] = lambda turn: None,
        stop: Callable[[], bool] = lambda: False,
        on_join: Callable[[], None] = lambda: None,
    ) -> bool:
        """Takes part until training is over.

        Args:
          on_round: called at the end of each round.
          on_wait: called with the turn that says for whom the federation waits.
          stop: whether to take no other turn.
          on_join: called when the server has taken it.

        Returns:
          Whether training is over; False if `stop` said so.
        """
        joined = False
        while not stop():
            try:
                if not joined:
                    self.join()
                    joined = True
                    on_join()
                turn, _ = self.line.ask("turn", {"incarnation": self.incarnation, "patience": self.wait})
                if turn["state"] == DONE:
                    self.over_at = turn["round"]
                    return True
                if turn["state"] != ROUND:
                    on_wait(turn)
                    continue
                ended = self._round(turn)
            except Abort as error:
                if stop():
                    break
                if error.code == "FAILED_PRECONDITION":  # a server that came back knows of nobody
                    joined = False
                elif error.code in PASSING:
                    raise UserError(
                        f"the server can't be reached any more ({error.text}); the same command goes on when it is back."
                    ) from error
                elif error.code != "ABORTED":
                    raise UserError(f"the server ends {self.name!r}'s part: {error.text}.") from error
                continue
            self.held = ended.held
            on_round(turn["round"], ended)
        return False

    def _round(self, turn: dict[str, Any]) -> Ended:
        id, members = Id(turn["epoch"], turn["round"], 0), tuple(turn["members"])
        held, since = self.held, turn["since"]
        # What is held of this round's beginning is none of it if the server has gone back, and made it again, meanwhile.
        if held is None or (held.round, held.since) != (id.round, since) or self.member.in_turn:
            at = self.member.first_message(members, self.name)
            tensors = self.line.segment(id._replace(at=at))
            if held is None or held.round != id.round:
                held = self._recall(id.round) or held
            held = self.member.received(tensors, held, id.round)._replace(since=since)
        self.line.id = id._replace(at=self.member.scores_at(members))
        return self.member.run_round(held, id, members, self.name, turn["weight"], turn["evaluates"], self.line)

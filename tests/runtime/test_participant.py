"""A client's line: what isn't answered is asked for again for as long as the server may be away, and little is said."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from fedbert_jax.runtime.calls import Abort
from fedbert_jax.runtime.frames import encode
from fedbert_jax.runtime.participant import Line
from fedbert_jax.runtime.turns import Id


class Clocked:
    """A transport with a clock of its own, whose calls end as a script says: (seconds, code or bytes)."""

    def __init__(self, *script: tuple[float, Any], status: Any = "UNAVAILABLE"):
        self.script, self.status, self.now = list(script), status, 0.0
        self.calls: list[str] = []

    def call(self, method: str, data: bytes, timeout: float) -> bytes:
        self.calls.append(method)
        seconds, end = (0.1, self.status) if method == "status" else self.script.pop(0)
        self.now += seconds
        if isinstance(end, bytes):
            return end
        raise Abort(end, f"as {end} says")

    def line(self, said: list[str], parts: int = 1) -> Line:
        def sleep(seconds: float) -> None:
            self.now += seconds

        return Line(self, parts, 1 << 16, 30.0, 60.0, said.append, sleep, lambda: self.now)


ANSWER = encode({"n": 1})


def test_a_server_that_comes_back_in_time_is_two_sentences():
    said: list[str] = []
    transport = Clocked((0, "UNAVAILABLE"), (0, "UNAVAILABLE"), (5, "DATA_LOSS"), (0, ANSWER))
    assert transport.line(said).ask("turn", {})[0] == {"n": 1}
    assert said == [
        "no answer from the server (as UNAVAILABLE says); trying again for at most 30 s",
        "the server answers again",
    ]


def test_one_that_stays_away_is_given_up_after_the_patience():
    said: list[str] = []
    transport = Clocked(*[(0, "UNAVAILABLE")] * 50)
    with pytest.raises(Abort, match="as UNAVAILABLE says"):
        transport.line(said).ask("turn", {})
    assert len(said) == 1 and 30 < transport.now < 40


def test_patience_begins_when_the_server_was_first_not_reached():
    transport = Clocked((59, "UNAVAILABLE"), (0, ANSWER))  # it had the message for nearly a minute, and then fell
    assert transport.line([]).ask("message", {})[0] == {"n": 1}


def test_a_wait_for_others_may_take_longer_than_any_call_and_any_patience():
    said: list[str] = []
    transport = Clocked(*[(60, "DEADLINE_EXCEEDED")] * 9, (1, ANSWER), status=ANSWER)
    assert transport.line(said).ask("message", {})[0] == {"n": 1}
    assert transport.now > 9 * 60 and transport.calls.count("status") == 9 and said == []


def test_a_server_that_is_silent_altogether_is_given_up():
    transport = Clocked(*[(60, "DEADLINE_EXCEEDED")] * 9)
    with pytest.raises(Abort, match="as DEADLINE_EXCEEDED says"):
        transport.line([]).ask("message", {})
    assert transport.calls.count("message") == 2


@pytest.mark.parametrize("code", ["PERMISSION_DENIED", "ABORTED", "FAILED_PRECONDITION", "INVALID_ARGUMENT", "INTERNAL"])
def test_a_refusal_is_not_tried_again(code):
    said: list[str] = []
    transport = Clocked((0, code))
    with pytest.raises(Abort, match=f"as {code} says"):
        transport.line(said).ask("turn", {})
    assert said == [] and transport.calls == ["turn"]


def test_a_refusal_of_a_server_that_came_back_is_an_answer_too():
    said: list[str] = []
    with pytest.raises(Abort, match="as ABORTED says"):
        Clocked((0, "UNAVAILABLE"), (0, "ABORTED")).line(said).ask("message", {})
    assert said[1:] == ["the server answers again"]


def test_an_answer_that_was_damaged_is_asked_for_again_and_one_that_is_none_is_an_error():
    damaged = bytearray(encode({"n": 2}))
    damaged[-1] ^= 1
    transport = Clocked((0, bytes(damaged)), (0, b"x"), (0, ANSWER))
    assert transport.line([]).ask("turn", {})[0] == {"n": 1}
    long = encode({}, {"x": np.zeros(1 << 16, np.uint8)})
    with pytest.raises(Abort, match="the answer to turn: 65,") as refused:
        Clocked((0, long)).line([]).ask("turn", {})
    assert refused.value.code == "INVALID_ARGUMENT"


def test_messages_on_their_way_at_once_leave_no_thread():
    before = set(threading.enumerate())
    line = Clocked(*[(0, ANSWER)] * 2).line([], parts=2)
    futures = [line.post(Id(0, 0, n), {}) for n in range(2)]
    assert [future.result(20) for future in futures] == [{}, {}]
    pool = set(threading.enumerate()) - before
    line.close()
    for thread in pool:
        thread.join(20)
    assert pool and not any(thread.is_alive() for thread in pool)

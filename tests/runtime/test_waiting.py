"""A client that waits says for whom, for how long so far, and how long at most."""

from __future__ import annotations

import threading
import time
from typing import Any

import toy
from toy import NAMES, Part

from fedbert_jax.runtime.participant import Line
from fedbert_jax.runtime.waiting import Waiting, Watch


class Told:
    """A `Waiting` with a clock of the test's, and what it says and shows."""

    def __init__(self) -> None:
        self.now, self.said, self.shown = 0.0, list[str](), list[str]()
        self.waiting = Waiting(self.said.append, self.shown.append, lambda: self.now)


def test_a_wait_is_told_when_it_begins_and_more_and_more_rarely_while_it_lasts():
    told = Told()
    for told.now in range(0, 1000, 5):
        new = told.waiting.waits("round 3", ["jefferson"], max(0.0, 300.0 - told.now))
        assert new == (told.now == 0)
    assert told.said == [
        "round 3 waits for jefferson; it goes on without in 300 s",
        "round 3 waits for jefferson, 60 s so far; it goes on without in 240 s",
        "round 3 waits for jefferson, 120 s so far; it goes on without in 180 s",
        "round 3 waits for jefferson, 240 s so far; it goes on without in 60 s",
        "round 3 waits for jefferson, 480 s so far; it goes on without in 0 s",
        "round 3 waits for jefferson, 960 s so far; it goes on without in 0 s",
    ]
    assert len(told.shown) == 200 and told.shown[1] == "waits for jefferson, 5 s so far; it goes on without in 295 s"


def test_another_wait_is_told_at_once_and_counted_anew():
    told = Told()
    told.waiting.waits("round 3", ["jefferson"], None)
    told.now = 30
    told.waiting.waits("round 3", ["adams", "washington"], None)
    told.now = 40
    told.waiting.waits("round 3", ["adams", "washington"], None)
    told.waiting.over()
    told.waiting.waits("round 3", ["adams", "washington"], None)
    assert told.said == [
        "round 3 waits for jefferson; it doesn't go on without",
        "round 3 waits for adams, washington; it doesn't go on without",
        "round 3 waits for adams, washington; it doesn't go on without",
    ]
    assert told.shown[2] == "waits for adams, washington, 10 s so far; it doesn't go on without"


def test_of_many_three_are_named_and_nobody_is_the_others():
    told = Told()
    told.waiting.waits("round 1", list("abcde"), 7.4)
    told.waiting.waits("round 1", [], 7.4)
    assert told.said == ["round 1 waits for a, b, c and 2 more; it goes on without in 7 s", "round 1 waits for the others"]


def test_a_client_in_the_midst_of_a_round_asks_for_whom_it_waits():
    """Adams holds a round up; jefferson, whose message is not answered, hears of it from the server."""
    service, _ = toy.make(deadline=300.0, quorum=2)
    transports = {name: toy.Local(service, name) for name in NAMES}
    heard, said = threading.Event(), list[str]()

    def hold(phase: str, round: int, step: int) -> None:
        if (phase, round, step) == ("backward", 1, 1):
            assert heard.wait(60)

    def say(text: str) -> None:
        said.append(text)
        heard.set()

    class Watched(Part):
        """Jefferson's, with a watch on its line; `wire` is the line that carries its messages."""

        def run_round(self, held: Any, id: Any, members: Any, me: str, weight: float, evaluates: bool, wire: Line) -> Any:
            with Watch(wire, me, Waiting(say, lambda text: None), look=0.02, after=0.1):
                return super().run_round(held, id, members, me, weight, evaluates, wire)

    ends = toy.run(service, transports, {"adams": Part("adams", hold), "jefferson": Watched("jefferson")})
    assert ends == dict.fromkeys(NAMES)
    assert [text.split(";")[0].split(",")[0] for text in said][:1] == ["round 2 waits for adams"]
    assert "; it goes on without in 2" in said[0] or "; it goes on without in 300 s" in said[0]
    until = time.monotonic() + 20
    while any(thread.name == "fedbert-watch" for thread in threading.enumerate()) and time.monotonic() < until:
        time.sleep(0.01)
    assert not any(thread.name == "fedbert-watch" for thread in threading.enumerate())

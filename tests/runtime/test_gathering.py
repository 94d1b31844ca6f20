"""Before the clients are known: who comes first takes part, who goes again doesn't, and nobody waits in vain."""

from __future__ import annotations

import contextlib
import threading

import pytest

from fedbert_jax.runtime import frames
from fedbert_jax.runtime import gathering as gathering_lib
from fedbert_jax.runtime import gathering as module
from fedbert_jax.runtime.calls import Abort
from fedbert_jax.runtime.gathering import Gathering

ENROL = frames.encode({})


def enrol(gathering: Gathering, name: str, alive=lambda: True) -> dict:
    return frames.decode(gathering.call("enrol", name, ENROL, alive), 1 << 16)[0]


def waiting(gathering: Gathering, name: str, alive: threading.Event) -> threading.Thread:
    """Lets a client call, and returns when it is known that it waits."""

    def call() -> None:
        with contextlib.suppress(Abort):
            enrol(gathering, name, alive.is_set)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    while name not in gathering.waiting:
        thread.join(0.01)
    return thread


def test_the_roster_is_whole_when_enough_have_come_in_the_order_of_their_names():
    gathering, here = Gathering((), 2, run="r1"), threading.Event()
    here.set()
    waiting(gathering, "south", here)
    assert gathering.names() is None
    thread = waiting(gathering, "north", here)
    assert gathering.names() == ("north", "south")
    thread.join(20)
    assert enrol(gathering, "south") == {"roster": ["north", "south"], "run": "r1"}
    with pytest.raises(Abort, match="'west' is not in the roster"):
        enrol(gathering, "west")


def test_who_waits_is_told_for_how_many_and_who_is_there(monkeypatch):
    monkeypatch.setattr(module, "TELL", 0.0)
    gathering = Gathering((), 3, run="r1")
    assert enrol(gathering, "south") == {"roster": [], "run": "r1", "here": ["south"], "wanted": 3}
    assert enrol(gathering, "north") == {"roster": [], "run": "r1", "here": ["north", "south"], "wanted": 3}
    gathering.stop()
    with pytest.raises(Abort, match="is stopping") as refused:
        enrol(gathering, "north")
    assert refused.value.code == "UNAVAILABLE"


def test_who_has_gone_again_takes_nobodys_place():
    gathering, here = Gathering((), 2), threading.Event()
    here.set()
    thread = waiting(gathering, "north", here)
    here.clear()  # killed
    thread.join(20)
    assert not thread.is_alive() and gathering.waiting == ()
    still = threading.Event()
    still.set()
    waiting(gathering, "west", still)
    waiting(gathering, "south", still)
    assert gathering.names() == ("south", "west")


def test_before_the_roster_is_whole_everything_else_is_too_early():
    with pytest.raises(Abort, match="waits for its clients") as refused:
        Gathering(("north",), 0).call("join", "north", ENROL)
    assert refused.value.code == "UNAVAILABLE"


def test_one_more_than_wanted_comes_too_late():
    gathering, here = Gathering((), 1), threading.Event()
    here.set()
    waiting(gathering, "north", here)
    with pytest.raises(Abort, match="'south' comes too late: 1 clients are there already"):
        enrol(gathering, "south")


def test_who_waited_and_calls_no_more_takes_nobodys_place(monkeypatch):
    """A client that is ended between two calls says nothing: its call has been answered."""
    monkeypatch.setattr(gathering_lib, "TELL", 0.0)
    monkeypatch.setattr(gathering_lib, "LOST", 0.0)
    gathering = Gathering((), 2)
    assert enrol(gathering, "nort")["roster"] == []
    assert gathering.waiting == () and gathering.names() is None
    monkeypatch.setattr(gathering_lib, "LOST", 60.0)
    assert gathering.waiting == ("nort",)
    enrol(gathering, "south")
    assert gathering.names() == ("nort", "south")

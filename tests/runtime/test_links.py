"""What links between machines do, done to a federation over gRPC: whatever it is, the run ends as if nothing had been.

A proxy (tests/proxy.py) stands between one client and the server; arithmetic stands in for the model (tests/toy.py).
"""

from __future__ import annotations

import contextlib
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import toy
from provisioned import provisioned
from proxy import DOWN, UP, Proxy
from toy import NAMES, ROUNDS, STEPS, Part

from fedbert_jax.runtime import grpc as transport
from fedbert_jax.runtime.credentials import load_credentials, load_roster
from fedbert_jax.runtime.frames import TensorSpec
from fedbert_jax.runtime.grpc import Client, Server

FRAME = 4 * 4 * toy.SIZE  # bytes of a message's tensor
IN_A_TENSOR = b'["x","float32",[4,%d]]]}' % toy.SIZE  # what a frame's tensor comes after


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return provisioned(tmp_path_factory.mktemp("credentials"), NAMES)


@pytest.fixture(scope="module")
def quiet() -> toy.Work:
    """The work of a federation in which nothing went wrong."""
    service, work = toy.make()
    assert toy.run(service, {name: toy.Local(service, name) for name in NAMES}) == dict.fromkeys(NAMES)
    return work


Fault = Callable[[Proxy], None]


class Linked:
    """A federation in which adams is behind a proxy."""

    def __init__(self, folders: Path | None = None, **rules: Any):
        self.service, self.work = toy.make(**rules)
        own = lambda name: load_credentials(folders / name, name) if folders else None  # noqa: E731
        roster = (lambda: load_roster(folders / "server")) if folders else None
        self.server = Server(self.service, "127.0.0.1", 0, own("server"), roster)
        self.proxy = Proxy(self.server.port).__enter__()
        port = lambda name: self.proxy.port if name == "adams" else self.server.port  # noqa: E731
        self.clients = {name: Client("127.0.0.1", port(name), name, own(name), 1 << 20) for name in NAMES}

    def run(self, fault: Fault, spot: tuple[str, int, int] = ("backward", 1, 1), **options: Any) -> None:
        """Trains; the fault is set before adams sends a certain message."""

        def trouble(phase: str, round: int, step: int) -> None:
            if (phase, round, step) == spot:
                fault(self.proxy)

        self.ends = toy.run(self.service, self.clients, {"adams": Part("adams", trouble)}, **options)

    def close(self) -> None:
        for client in self.clients.values():
            client.close()
        self.server.stop(0)
        self.proxy.__exit__()


@pytest.fixture
def link() -> Iterator[Callable[..., Linked]]:
    made: list[Linked] = []

    def make(*args: Any, **options: Any) -> Linked:
        made.append(Linked(*args, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def undisturbed(linked: Linked, quiet: toy.Work) -> bool:
    """Whether it ended with the same bits, without beginning a round again or leaving anybody out."""
    happened = {e["event"] for e in linked.service.session.events} - {"joined", "begins", "round"}
    assert linked.ends == dict.fromkeys(NAMES) and not happened, (linked.ends, happened)
    return toy.same(linked.work, quiet) and linked.work.history == quiet.history


FAULTS: dict[str, tuple[Fault, list[str]]] = {
    "a reset in a message": (lambda p: p.reset_within(UP, FRAME // 2), ["reset"]),
    "a reset in an answer": (lambda p: p.reset_within(DOWN, FRAME // 2), ["reset"]),
    "an end in a message": (lambda p: p.truncate_within(UP, FRAME // 2), ["end"]),
    "an end in an answer": (lambda p: p.truncate_within(DOWN, FRAME // 2), ["end"]),
    "an outage": (lambda p: p.outage(0.7), ["down", "up again"]),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("tls", [False, True], ids=["clear", "tls"])
def test_a_cut_link_changes_nothing(link, quiet, folders, fault, tls):
    linked = link(folders if tls else None)
    cut, met = FAULTS[fault]
    linked.run(cut)
    assert undisturbed(linked, quiet) and linked.proxy.met == met


@pytest.mark.parametrize("direction", [UP, DOWN])
def test_a_changed_byte_of_a_tensor_is_noticed_and_asked_for_again(link, quiet, direction):
    """In clear, neither TCP nor HTTP/2 notices it: the frame does."""
    linked = link()
    linked.run(lambda p: p.change_after(direction, IN_A_TENSOR, FRAME // 2 + 2))  # a float32 becomes some percent another
    assert undisturbed(linked, quiet) and linked.proxy.met == ["changed"]


@pytest.mark.parametrize("direction", [UP, DOWN])
def test_a_changed_byte_under_tls_ends_the_connection_and_nothing_else(link, quiet, folders, direction):
    linked = link(folders)
    linked.run(lambda p: p.change_within(direction, FRAME // 2))
    assert undisturbed(linked, quiet) and linked.proxy.met == ["changed"]


def test_a_slow_link_is_waited_for(link, quiet):
    linked = link()

    def slow(proxy: Proxy) -> None:
        proxy.latency = 0.05

    began = time.monotonic()
    linked.run(slow, ("forward", 1, 0))
    assert undisturbed(linked, quiet)
    assert time.monotonic() - began > (ROUNDS - 1) * (2 * STEPS + 1) * 2 * 0.05  # it was slow


# --- links that nobody hears of ---------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "OPTIONS", toy.notice_soon(transport.OPTIONS))


@pytest.mark.slow
def test_a_black_hole_is_noticed_and_what_it_swallowed_is_sent_again(link, quiet, quick):
    """The connection stays, and so does each new one, until the hole closes: nothing comes through, and nobody says so."""
    linked = link()

    def hole(proxy: Proxy) -> None:
        proxy.swallow()
        threading.Timer(4.0, proxy.recover).start()

    linked.run(hole)
    assert undisturbed(linked, quiet) and linked.proxy.met == ["black hole", "recovered"]


@pytest.mark.slow
def test_a_black_hole_at_one_client_keeps_the_others_no_longer_than_the_deadline(link, quick):
    linked = link(quorum=2, deadline=1.0)

    def hole(proxy: Proxy) -> None:
        proxy.swallow()
        threading.Timer(4.0, proxy.recover).start()

    linked.run(hole)
    dropped = [(e["client"], e["round"]) for e in linked.service.session.events if e["event"] == "dropped"]
    assert dropped[0] == ("adams", 1) and linked.ends == dict.fromkeys(NAMES)
    assert linked.work.history[9 + 3] == ("backward", 1, NAMES[1:])


@pytest.mark.slow
def test_a_wait_of_many_pings_is_no_reason_to_cut_a_client_off(link, quick):
    """Others may let it wait for minutes; the server's library would count its pings and end the connection."""
    linked, said = link(), list[str]()
    holding = linked.clients["adams"]
    one = toy.participant("adams", holding)
    one.line._say = said.append
    one.join()
    for name in NAMES[1:2]:
        toy.participant(name, linked.clients[name]).join()
    answer, _ = one.line.ask("turn", {"incarnation": one.incarnation, "patience": 7.0})
    assert answer["state"] == "enrolling" and answer["missing"] == ["washington"] and said == []


# --- what is left behind ----------------------------------------------------------------------------------------------


def left() -> tuple[list[str], int]:
    """This process's threads and sockets."""
    gc.collect()
    sockets = 0
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the listing's own is closed by now
            sockets += os.readlink(f"/proc/self/fd/{number}").startswith("socket:")
    return sorted(thread.name for thread in threading.enumerate()), sockets


def test_no_thread_and_no_port_is_left(quiet, folders):
    def once(port: int) -> int:
        service, work = toy.make()
        own = lambda name: load_credentials(folders / name, name)  # noqa: E731
        server = Server(service, "127.0.0.1", port, own("server"), lambda: load_roster(folders / "server"))
        clients = {name: Client("127.0.0.1", server.port, name, own(name), 1 << 20) for name in NAMES}
        assert toy.run(service, clients) == dict.fromkeys(NAMES) and toy.same(work, quiet)
        for client in clients.values():
            client.close()
        server.stop()
        return server.port

    port = once(0)  # after which gRPC has whatever it keeps for good
    before = left()
    for _ in range(3):
        assert once(port) == port  # which was let go of
    until = time.monotonic() + 20
    while left() != before and time.monotonic() < until:
        time.sleep(0.05)
    assert left() == before


@pytest.mark.slow
def test_memory_is_flat_over_two_hundred_rounds(monkeypatch):
    """Over gRPC, with messages of 128 KiB: in a hundred rounds, 236 MB cross."""
    monkeypatch.setattr(toy, "STEPS", 1)
    monkeypatch.setattr(toy, "SIZE", 8192)
    monkeypatch.setattr(toy, "X", {"x": TensorSpec("float32", (4, toy.SIZE))})
    service, work = toy.make(rounds=200)
    server = Server(service, "127.0.0.1", 0)
    clients = {name: Client("127.0.0.1", server.port, name, None, 1 << 20) for name in NAMES}
    resident, finish = list[int](), work.finish_round

    def finish_round() -> None:
        finish()
        work.history.clear()
        service.session.events.clear()
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))

    work.finish_round = finish_round  # type: ignore[method-assign]
    assert toy.run(service, clients) == dict.fromkeys(NAMES) and len(resident) == 200
    for client in clients.values():
        client.close()
    server.stop(0)
    crossed = (service.received + service.sent) / 2
    assert crossed > 200e6 and max(resident[150:]) - max(resident[50:100]) < 0.1 * crossed, resident

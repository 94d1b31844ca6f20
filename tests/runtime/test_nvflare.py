"""Over NVFlare's cells it is the same federation; only the job's clients are heard, and of them no more than bytes that fit.

Each test runs over tests/flare.py, and over NVFlare's own cells where it is installed (`.[nvflare]`).
"""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import flare
import numpy as np
import pytest
import toy
from federation import Local
from processes import free_port
from toy import NAMES

from fedbert_jax.runtime import nvflare
from fedbert_jax.runtime.calls import HEADER, Abort
from fedbert_jax.runtime.frames import decode, encode
from fedbert_jax.runtime.gathering import Gathering
from fedbert_jax.runtime.nvflare import Client, Server

LIMIT = 1 << 20
EMPTY = encode({})


def installed() -> bool:
    return importlib.util.find_spec("nvflare") is not None


@pytest.fixture(params=["rebuilt", "nvflare"])
def cells(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """A function that makes a cell; the first one is the server's, called "server"."""
    made: list[Any] = []
    if request.param == "rebuilt":
        flare.install(monkeypatch)
        net: dict[str, Any] = {}
        make = lambda name: flare.Cell(name, net)  # noqa: E731
    else:
        if not installed():
            pytest.skip("NVFlare is not installed: pip install '.[nvflare]'")
        from nvflare.fuel.f3.cellnet.cell import Cell

        url = f"tcp://localhost:{free_port()}"

        def make(name: str) -> Any:
            cell = Cell(name, url, False, {})
            cell.core_cell.start()
            return cell

    def call(name: str) -> Any:
        made.append(make(name))
        return made[-1]

    yield call
    for cell in reversed(made):
        cell.core_cell.stop()
    if request.param == "nvflare":
        from nvflare.fuel.f3.cellnet.core_cell import CoreCell
        from nvflare.fuel.f3.stats_pool import StatsPoolManager

        for known in (CoreCell.ALL_CELLS, StatsPoolManager.pools):  # which have no place for another cell of a name
            known.clear()


@pytest.fixture
def connect(cells: Callable[[str], Any]) -> Iterator[Callable[..., Any]]:
    """A function that lets a service answer at the server's cell; returns the server and its clients' transports."""
    servers: list[Server] = []

    def call(service: Any, names: tuple[str, ...] = NAMES, **options: Any) -> tuple[Server, dict[str, Client]]:
        server = Server(service, cells("server"), {name: name for name in NAMES}, **options)
        servers.append(server)
        return server, {name: Client(cells(name), "server", LIMIT) for name in names}

    yield call
    for server in servers:
        server.stop()


def refused(transport: Client, method: str = "turn", data: Any = EMPTY, timeout: float = 20.0) -> Abort:
    with pytest.raises(Abort) as found:
        transport.call(method, data, timeout)
    return found.value


class Answers:
    """A service that answers by a function, and counts what it was asked."""

    def __init__(self, answer: Callable[..., bytes]):
        self.answer, self.asked = answer, list[str]()

    def limit(self, method: str) -> int:
        return HEADER

    def call(self, method: str, client: str, data: bytes, alive: Callable[[], bool]) -> bytes:
        assert type(data) is bytes
        self.asked.append(client)
        return self.answer(data, alive)

    def stop(self) -> None:
        pass


def test_it_ends_with_the_same_bits(connect):
    quiet, local = toy.make()
    toy.run(quiet, {name: Local(quiet, name) for name in NAMES})
    service, work = toy.make()
    _, transports = connect(service)
    assert toy.run(service, transports) == dict.fromkeys(NAMES)
    assert work.history == local.history and work.round == toy.ROUNDS
    assert np.array_equal(work.body, local.body) and np.array_equal(work.client, local.client)


def test_a_frame_of_several_chunks_comes_whole_both_ways(connect):
    sent = np.random.default_rng(0).bytes(5 * 2**20 + 7)
    service = Answers(lambda data, alive: data[::-1])
    service.limit = lambda method: len(sent)  # type: ignore[method-assign]
    _, transports = connect(service, NAMES[:1])
    transports["adams"]._limit = len(sent)
    assert transports["adams"].call("bring", sent, 20.0) == sent[::-1]


# --- who is heard, and of what -----------------------------------------------------------------------------------------


def test_a_caller_is_who_its_cell_is_and_a_stranger_is_not_heard(connect):
    service = Answers(lambda data, alive: b"yes")
    _, transports = connect(service, ("adams", "hamilton"))
    error = refused(transports["hamilton"])
    assert error.code == "PERMISSION_DENIED" and "hamilton is no client of this job" in error.text
    assert transports["adams"].call("turn", encode({"client": "washington"}), 20.0) == b"yes"
    assert service.asked == ["adams"]


def test_what_is_too_large_is_refused_at_its_first_chunk(connect):
    service, _ = toy.make()
    server, transports = connect(service, NAMES[:1])
    server._take = None  # type: ignore[assignment]  # nothing gets that far
    for method, size in (("turn", HEADER + 1), ("message", service.limit("message") + 1), ("nonsense", HEADER + 1)):
        error = refused(transports["adams"], method, bytes(size))
        assert error.code == "RESOURCE_EXHAUSTED" and f"{size - 1:,} bytes that this message may have" in error.text
    assert service.received == 0


def test_an_object_is_not_decoded(connect):
    service = Answers(lambda data, alive: b"yes")
    _, transports = connect(service, NAMES[:1])
    error = refused(transports["adams"], data={"a": 1})
    assert error.code == "INVALID_ARGUMENT" and "nothing that has to be decoded" in error.text and not service.asked


def test_to_a_gathering_what_is_too_early_is_no_fault(connect):
    _, transports = connect(Gathering(NAMES, 3), NAMES[:1])
    assert refused(transports["adams"], "message", bytes(5 * 2**20)).code == "UNAVAILABLE"
    assert decode(transports["adams"].call("enrol", encode({}), 20.0), LIMIT)[0]["roster"] == list(NAMES)


# --- what goes wrong ---------------------------------------------------------------------------------------------------


def test_a_refusal_comes_with_its_code_and_its_sentence(connect):
    service, _ = toy.make()
    _, transports = connect(service, NAMES[:1])
    error = refused(transports["adams"], data=encode({"incarnation": "1", "patience": 0}))
    assert (error.code, error.text) == ("FAILED_PRECONDITION", "'adams' has to join first")
    assert refused(transports["adams"], "nonsense").code == "UNIMPLEMENTED"


def test_a_fault_of_the_server_is_no_outage(connect):
    def fail(data: bytes, alive: Any) -> bytes:
        raise ZeroDivisionError

    _, transports = connect(Answers(fail), NAMES[:1])
    assert refused(transports["adams"]).code == "UNKNOWN"


def test_a_server_that_is_not_there_is_an_outage(cells):
    cells("server")
    transport = Client(cells("adams"), "server.job", LIMIT)
    assert refused(transport, timeout=2.0).code in ("UNAVAILABLE", "DEADLINE_EXCEEDED")


def test_a_cell_that_has_stopped_is_an_outage():
    class Stopped:
        def send_request(self, **request: Any) -> Any:
            raise RuntimeError("Messenger is not running")

    pytest.importorskip("nvflare") if installed() else None
    with pytest.MonkeyPatch.context() as patch:
        if not installed():
            flare.install(patch)
        error = refused(Client(Stopped(), "server", LIMIT))
    assert error.code == "UNAVAILABLE" and "Messenger is not running" in error.text


def test_an_answer_that_is_too_large_is_refused(connect):
    _, transports = connect(Answers(lambda data, alive: bytes(LIMIT + 1)), NAMES[:1])
    assert refused(transports["adams"]).code == "RESOURCE_EXHAUSTED"


def test_a_call_is_kept_as_long_as_its_caller_waits(connect, monkeypatch):
    """And hardly longer: callers that ask again and again would fill the server's threads."""
    monkeypatch.setattr(nvflare, "SLACK", 1.0)
    let_go = threading.Event()

    def wait(data: bytes, alive: Callable[[], bool]) -> bytes:
        while alive():
            time.sleep(0.01)
        let_go.set()
        return b""

    _, transports = connect(Answers(wait), NAMES[:1])
    assert refused(transports["adams"], timeout=0.5).code == "DEADLINE_EXCEEDED"
    assert let_go.wait(20)


def test_when_the_job_ends_so_do_calls_and_the_service(connect):
    service, _ = toy.make()
    end = threading.Event()
    _, transports = connect(service, ended=end.is_set)
    server = threading.Thread(target=service.run, daemon=True)
    server.start()
    for name in NAMES:
        meta = toy.HELLO._asdict() | {"incarnation": "1", "blocks": toy.BLOCKS[name]}
        transports[name].call("join", encode(meta), 20.0)
    turn, _ = decode(transports["adams"].call("turn", encode({"incarnation": "1", "patience": 20}), 20.0), LIMIT)
    message = encode({"id": [turn["epoch"], 0, 0]}, {"x": np.zeros((4, toy.SIZE), np.float32)})
    errors: list[Abort] = []
    caller = threading.Thread(target=lambda: errors.append(refused(transports["adams"], "message", message)), daemon=True)
    caller.start()
    while "jefferson" not in service.session.late() or "adams" in service.session.late():
        time.sleep(0.01)
    assert server.is_alive() and caller.is_alive()
    end.set()
    server.join(20)
    caller.join(20)
    assert not server.is_alive() and errors[0].code == "UNAVAILABLE" and "stopping" in errors[0].text


def test_a_client_whose_job_is_aborted_waits_no_longer(connect, cells):
    asked, signal = threading.Event(), flare.Signal()

    def wait(data: bytes, alive: Callable[[], bool]) -> bytes:
        asked.set()
        while alive():
            time.sleep(0.01)
        return b""

    connect(Answers(wait), ())
    transport = Client(cells("adams"), "server", LIMIT, signal)
    ends: list[str] = []
    thread = threading.Thread(target=lambda: ends.append(refused(transport, timeout=600.0).code), daemon=True)
    thread.start()
    assert asked.wait(20)
    signal.trigger(True)
    thread.join(20)
    assert ends == ["CANCELLED"]
    assert refused(transport).code == "CANCELLED"


def test_the_server_knows_of_whom_it_has_not_heard(connect):
    now = 100.0
    server, transports = connect(Answers(lambda data, alive: b"yes"), clock=lambda: now)
    now = 104.0
    transports["jefferson"].call("turn", EMPTY, 20.0)
    assert server.silent(5.0) == []
    now = 105.0
    assert server.silent(5.0) == ["adams", "washington"]


def test_a_client_gives_signs_of_life_until_it_is_closed(connect, monkeypatch):
    monkeypatch.setattr(nvflare, "BEAT", 0.02)
    service = Answers(lambda data, alive: b"yes")
    _, transports = connect(service, NAMES[:1])
    transports["adams"].beat()
    while len(service.asked) < 3:
        time.sleep(0.01)
    transports["adams"].close()
    before = -1
    while before != len(service.asked):  # the last one may be on its way
        before = len(service.asked)
        time.sleep(0.3)


def test_after_the_end_there_is_no_answer(connect):
    server, transports = connect(Answers(lambda data, alive: b"yes"), NAMES[:1])
    server.stop()
    error = refused(transports["adams"])
    assert error.code == "UNAVAILABLE" and "stopping" in error.text

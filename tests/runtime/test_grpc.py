"""Over gRPC it is the same federation: the same bits as by function calls, and nobody without a certificate gets a byte."""

from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import jax
import numpy as np
import pytest
import toy
from federation import NAMES, Federation
from provisioned import provisioned
from tiny import tiny_config

from fedbert_jax.errors import UserError
from fedbert_jax.runtime import participant
from fedbert_jax.runtime.calls import Abort
from fedbert_jax.runtime.credentials import load_credentials, load_roster
from fedbert_jax.runtime.frames import decode, encode
from fedbert_jax.runtime.gathering import Gathering
from fedbert_jax.runtime.grpc import CHUNK, Client, Server

CONFIG = tiny_config(federated=dict(rounds=2))
LIMIT = 1 << 24


@pytest.fixture(scope="module")
def local() -> Federation:
    """The federation by function calls, trained."""
    federation = Federation(CONFIG)
    federation.run()
    return federation


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of credentials: the authority's `ca`, `server` and every client's."""
    return provisioned(tmp_path_factory.mktemp("credentials"), NAMES)


def same(a: Any, b: Any) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(np.array_equal(x, y) for x, y in pairs)


def trained(federation: Federation, server: Server, client: Any) -> None:
    try:
        federation.run(transport=client)
    finally:
        server.stop(0)


def test_in_clear_on_the_loopback_it_ends_with_the_same_bits(local):
    federation = Federation(CONFIG)
    server = Server(federation.service, "127.0.0.1", 0)
    trained(federation, server, lambda name: Client("127.0.0.1", server.port, name, None, LIMIT))
    assert same(federation.engine.state, local.engine.state) and federation.rounds == local.rounds


def test_with_certificates_it_ends_with_the_same_bits(local, folders):
    federation = Federation(CONFIG)
    roster = lambda: load_roster(folders / "server")  # noqa: E731
    server = Server(federation.service, "127.0.0.1", 0, load_credentials(folders / "server", "server"), roster)
    assert roster().clients == NAMES
    clients = lambda name: Client("127.0.0.1", server.port, "", load_credentials(folders / name, name), LIMIT)  # noqa: E731
    trained(federation, server, clients)
    assert same(federation.engine.state, local.engine.state)


class Forgetful:
    """A transport that loses every third answer, after the server has given it."""

    def __init__(self, client: Client):
        self.client, self.calls, self.lost = client, 0, 0

    def call(self, method: str, data: bytes, timeout: float) -> bytes:
        answer = self.client.call(method, data, timeout)
        self.calls += 1
        if self.calls % 3 == 0:
            self.lost += 1
            raise Abort("UNAVAILABLE", "the answer got lost")
        return answer


def test_with_lost_answers_it_ends_with_the_same_bits(local, monkeypatch):
    """Every update of the real model happens once, however often it is asked for."""
    monkeypatch.setattr(participant, "FIRST_PAUSE", 0.01)
    federation = Federation(CONFIG)
    server, forgetful = Server(federation.service, "127.0.0.1", 0), list[Forgetful]()

    def transport(name: str) -> Forgetful:
        forgetful.append(Forgetful(Client("127.0.0.1", server.port, name, None, LIMIT)))
        return forgetful[-1]

    trained(federation, server, transport)
    assert all(one.lost >= 5 for one in forgetful)
    assert same(federation.engine.state, local.engine.state) and federation.rounds == local.rounds


# --- addresses and sizes ---------------------------------------------------------------------------------------------


def test_nothing_listens_to_others_in_clear():
    service, _ = toy.make()
    for host in ("0.0.0.0", "::", "192.0.2.1"):
        with pytest.raises(UserError, match=r"network\.host=.*without network\.credentials"):
            Server(service, host, 0)
        with pytest.raises(UserError, match=r"network\.host="):
            Client(host, 1, "adams", None, LIMIT)


def test_a_port_in_use_is_said_in_a_sentence():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"network\.port={port}: another program"):
            Server(toy.make()[0], "127.0.0.1", port)


class Unread:
    """A service that reads no frame of `message`, until it may."""

    def __init__(self) -> None:
        self.asked, self.may = threading.Semaphore(0), threading.Event()

    def limit(self, method: str) -> int:
        if method == "message":
            self.asked.release()
            self.may.wait(60)
        return LIMIT

    def call(self, method: str, client: str, data: bytes, alive: Any) -> bytes:
        return str(len(data)).encode()

    def stop(self) -> None:
        self.may.set()


def test_frames_leave_one_after_another_in_the_order_of_their_calls():
    """Two calls at once: gRPC may take the chunks of the second one first, and gets none before the first one has left."""
    client, given = Client("127.0.0.1", 1, "adams", None, LIMIT), {}
    begun, order = threading.Event(), []

    def take(chunks: Any, timeout: float, metadata: Any) -> Any:
        given[timeout] = chunks
        begun.set()
        over[timeout].wait(20)
        answer = MagicMock()
        answer.__iter__.return_value = iter([b""])
        return answer

    over = {1.0: threading.Event(), 2.0: threading.Event()}
    client._calls = dict.fromkeys(client._calls, take)
    calls = []
    for n in (1.0, 2.0):
        calls.append(threading.Thread(target=client.call, args=("message", bytes(int(n) * 2 * CHUNK), n)))
        calls[-1].start()
        assert begun.wait(20)
        begun.clear()

    def second() -> None:
        order.extend(("second", len(chunk)) for chunk in given[2.0])
        begun.set()

    taking = threading.Thread(target=second)
    taking.start()
    assert not begun.wait(0.2)
    order.append(("first", len(next(given[1.0]))))
    assert not begun.wait(0.2)
    order.extend(("first", len(chunk)) for chunk in given[1.0])
    assert begun.wait(20)
    assert order == [("first", CHUNK)] * 2 + [("second", CHUNK)] * 4
    for one in over.values():
        one.set()
    for thread in (*calls, taking):
        thread.join(20)
    assert not client._leaving
    client.close()


@pytest.mark.parametrize(("at_once", "size", "streams"), [(1, CHUNK, False), (1, CHUNK + 1, True), (2, CHUNK, True)])
def test_only_a_long_frame_or_one_of_several_at_once_takes_a_thread_to_be_sent(monkeypatch, at_once, size, streams):
    service, given = Unread(), []
    service.may.set()
    server = Server(service, "127.0.0.1", 0)  # type: ignore[arg-type]
    client = Client("127.0.0.1", server.port, "adams", None, LIMIT, at_once)
    in_turn = client._in_turn
    monkeypatch.setattr(client, "_in_turn", lambda turn, data: given.append(data) or in_turn(turn, data))
    assert client.call("message", bytes(size), 20) == str(size).encode()
    assert bool(given) == streams and not client._leaving
    client.close()
    server.stop(0)


def test_a_frame_that_gets_stuck_holds_up_nobody_for_longer_than_its_call():
    service = Unread()
    server = Server(service, "127.0.0.1", 0)
    client = Client("127.0.0.1", server.port, "adams", None, LIMIT)
    codes = []

    def send(timeout: float) -> None:
        with pytest.raises(Abort) as refused:
            client.call("message", bytes(8 * CHUNK), timeout)
        codes.append(refused.value.code)

    stuck = threading.Thread(target=send, args=(2.0,))  # in the midst of its frame
    stuck.start()
    assert service.asked.acquire(timeout=20)
    waits = threading.Thread(target=send, args=(0.5,))  # for the other one, and gives up before it
    waits.start()
    waits.join(20)
    stuck.join(20)
    assert codes == ["DEADLINE_EXCEEDED"] * 2
    assert client.call("status", bytes(3 * CHUNK), 20) == str(3 * CHUNK).encode()
    client.close()
    server.stop(0)


class Meeting:
    """A service that answers nobody before `count` calls have come."""

    def __init__(self, count: int):
        self.barrier = threading.Barrier(count)

    def limit(self, method: str) -> int:
        return LIMIT

    def call(self, method: str, client: str, data: bytes, alive: Any) -> bytes:
        self.barrier.wait(30)
        return b"all"

    def stop(self) -> None:
        self.barrier.abort()


def test_a_server_of_many_clients_hears_all_of_them_at_once():
    server = Server(Meeting(100), "127.0.0.1", 0, clients=25)  # type: ignore[arg-type]
    client = Client("127.0.0.1", server.port, "adams", None, LIMIT)
    with ThreadPoolExecutor(100) as pool:
        assert list(pool.map(lambda _: client.call("turn", b"x", 30), range(100))) == [b"all"] * 100
    client.close()
    server.stop(0)


def test_a_frame_that_is_too_long_is_cut_off_while_it_comes():
    service, _ = toy.make()
    server = Server(service, "127.0.0.1", 0)
    client = Client("127.0.0.1", server.port, "adams", None, LIMIT)
    with pytest.raises(Abort, match="more than the") as refused:
        client.call("join", bytes(3 * CHUNK), 5)
    assert refused.value.code == "RESOURCE_EXHAUSTED" and service.received == 0
    for data in (b"", b"\x80\x04.", encode({}) + b"x"):
        with pytest.raises(Abort) as refused:
            client.call("join", data, 5)
        assert refused.value.code == "DATA_LOSS"
    client.close()
    server.stop(0)


def test_a_fault_of_the_servers_own_is_not_taken_for_a_broken_link(monkeypatch):
    """A client would else call it for ten minutes."""
    service, _ = toy.make()
    monkeypatch.setattr(service, "_on_turn", lambda *_: 1 / 0)
    server = Server(service, "127.0.0.1", 0)
    client = Client("127.0.0.1", server.port, "adams", None, LIMIT)
    with pytest.raises(Abort, match="division by zero") as refused:
        client.call("turn", encode({}), 5)
    assert refused.value.code == "INTERNAL"
    client.close()
    server.stop(0)


def test_to_a_server_that_has_just_come_back_everything_but_enrolling_is_too_early_and_nothing_too_large():
    """A client of before is in the midst of a round: what it sends is tried again, until the round begins again."""
    server = Server(Gathering(NAMES, 3, "run"), "127.0.0.1", 0)
    client = Client("127.0.0.1", server.port, "adams", None, LIMIT)
    for method, data in (("message", bytes(3 * CHUNK)), ("bring", bytes(3 * CHUNK)), ("turn", encode({}))):
        with pytest.raises(Abort, match="waits for its clients") as refused:
            client.call(method, data, timeout=5)
        assert refused.value.code == "UNAVAILABLE"
    assert decode(client.call("enrol", encode({}), timeout=5), LIMIT)[0] == {"roster": list(NAMES), "run": "run"}
    with pytest.raises(Abort, match="more than the") as refused:
        client.call("enrol", bytes(3 * CHUNK), timeout=5)
    assert refused.value.code == "RESOURCE_EXHAUSTED"
    client.close()
    server.stop(0)

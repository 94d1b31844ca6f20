"""What others see of a federation's server: its status, gRPC's health check, and the numbers for Prometheus."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import grpc
import pytest
import toy
from grpc_health.v1 import health_pb2, health_pb2_grpc
from processes import free_port
from provisioned import provisioned
from toy import NAMES

from fedbert_jax import status
from fedbert_jax.errors import UserError
from fedbert_jax.runtime.calls import Abort
from fedbert_jax.runtime.credentials import load_credentials, load_roster
from fedbert_jax.runtime.frames import encode
from fedbert_jax.runtime.gathering import Gathering
from fedbert_jax.runtime.grpc import Client, Server
from fedbert_jax.runtime.prometheus import Exporter

HEALTHY, STOPPED = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
def server() -> Iterator[Server]:
    """A server in the midst of its first round, which waits for washington."""
    service, _ = toy.make(quorum=2, deadline=300.0)
    made = Server(service, "127.0.0.1", 0)
    for name in NAMES:
        client = Client("127.0.0.1", made.port, name, None, 1 << 20)
        toy.participant(name, client).join()
        client.close()
    for name in NAMES[:2]:
        id = toy.Id(service.session.epoch, 0, 0)
        assert service.session.message(name, id, {}, "digest", service.clock()) is None
    yield made
    made.stop(0)


def test_the_status_is_said_in_a_few_lines(server, capsys):
    assert status.main([f"127.0.0.1:{server.port}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [
        "round, round 0 of 3",
        "here (3 of 3): adams, jefferson, washington",
        "members: adams, jefferson, washington",
        "late: washington",
    ]
    assert re.fullmatch(r"it goes on without them in (300|29\d) s", lines[4]) and len(lines) == 5


def test_as_json_a_program_can_read_it(server, capsys):
    assert status.main([f"127.0.0.1:{server.port}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["state"], found["round"], found["rounds"], found["late"]) == ("round", 0, 3, ["washington"])
    assert found["here"] == found["members"] == found["roster"] == list(NAMES) and 200 < found["within"] <= 300


def test_before_the_roster_is_whole_it_says_who_has_come(capsys):
    gathering = Gathering((), 2)
    server = Server(gathering, "127.0.0.1", 0)
    client = Client("127.0.0.1", server.port, "north", None, 1 << 16)

    def enrol() -> None:
        with contextlib.suppress(Abort):
            client.call("enrol", encode({}), 20)

    thread = threading.Thread(target=enrol, daemon=True)
    thread.start()
    while gathering.waiting != ("north",):
        time.sleep(0.01)
    assert status.main([f"127.0.0.1:{server.port}"]) == 0
    assert capsys.readouterr().out == "gathering\nhere (1 of 2): north\n"
    client.close()
    thread.join(20)
    server.stop(0)


@pytest.mark.parametrize("address", ["", "127.0.0.1", "127.0.0.1:", ":8476", "127.0.0.1:x", "127.0.0.1:0", "a:65536", "a:²"])
def test_an_address_that_is_none_is_refused_in_a_sentence(address):
    with pytest.raises(UserError, match=r"accepted: HOST:PORT, such as 127\.0\.0\.1:8476\.$"):
        status.main([address])


def test_a_server_that_is_not_there_or_is_something_else_is_said_in_a_sentence():
    with pytest.raises(UserError, match=r"^the server at 127\.0\.0\.1:\d+ doesn't answer \([^\n]+\)\.$") as refused:
        status.main([f"127.0.0.1:{free_port()}"])
    assert refused.value.exit_code == 2
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()

        def answer() -> None:
            one, _ = other.accept()
            one.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            one.close()

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(UserError, match=r"doesn't answer \([^\n]+\)\.$"):
            status.main([f"127.0.0.1:{other.getsockname()[1]}"])
    with pytest.raises(UserError, match=r"network\.host='192\.0\.2\.1'"):  # in clear, off this machine
        status.main(["192.0.2.1:8476"])


def test_with_certificates_only_a_client_is_told(tmp_path, capsys):
    folders = provisioned(tmp_path, NAMES[:1])
    service, _ = toy.make()
    own, roster = load_credentials(folders / "server", "server"), load_roster(folders / "server")
    server = Server(service, "127.0.0.1", 0, own, lambda: roster)
    capsys.readouterr()
    at = f"127.0.0.1:{server.port}"
    assert status.main([at, "--credentials", str(folders / "adams"), "--name", "adams"]) == 0
    assert capsys.readouterr().out.startswith("enrolling, round 0 of 3\n")
    with pytest.raises(UserError, match="doesn't answer"):
        status.main([at])
    assert status.main([at, "--credentials", str(folders / "adams")]) == 0  # whose the only certificate there is
    with pytest.raises(UserError, match=r"monroe\.crt"):
        status.main([at, "--credentials", str(folders / "adams"), "--name", "monroe"])
    with pytest.raises(UserError, match="0 certificates of clients are there; give one with --name"):
        status.main([at, "--credentials", str(tmp_path / "none")])
    server.stop(0)


def test_grpcs_health_check_is_answered_until_the_server_stops(server):
    channel = grpc.insecure_channel(f"127.0.0.1:{server.port}")
    stub, asked = health_pb2_grpc.HealthStub(channel), health_pb2.HealthCheckRequest(service="fedbert.Federation")
    assert stub.Check(asked, timeout=20).status == HEALTHY
    watching = stub.Watch(asked)
    assert next(watching).status == HEALTHY
    threading.Thread(target=server.stop, daemon=True).start()
    assert next(watching).status == STOPPED
    channel.close()


def scraped(port: int) -> dict[str, float]:
    """The numbers at an endpoint, as Prometheus reads them."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
        assert answer.status == 200 and answer.headers["Content-Type"].startswith("text/plain")
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, value in (line.split() for line in lines if line[:1] != "#")}


def test_prometheus_finds_the_numbers():
    port = free_port()
    exporter = Exporter(port)
    assert set(scraped(port).values()) == {0.0}
    exporter.set({"round": 7, "train_loss": 2.5, "eval_loss": None, "members": ["adams"]})
    found = scraped(port)
    assert found["fedbert_round"] == 7 and found["fedbert_train_loss"] == 2.5 and found["fedbert_eval_loss"] == 0
    assert found.keys() >= {f"fedbert_{key}" for key in ("clients_here", "clients_late", "received_bytes", "sent_bytes")}
    with pytest.raises(UserError, match=rf"^config key network\.metrics_port={port}: it can't be had \(.*\)\.$"):
        Exporter(port)
    exporter.close()
    with pytest.raises(urllib.error.URLError):
        scraped(port)
    Exporter(port).close()  # it was let go of


def test_the_endpoint_is_for_this_machine_alone(monkeypatch):
    at = list[tuple[int, str]]()
    import prometheus_client

    begin = prometheus_client.start_http_server
    monkeypatch.setattr(prometheus_client, "start_http_server", lambda p, a, r: (at.append((p, a)), begin(p, a, r))[1])
    port = free_port()
    Exporter(port).close()
    assert at == [(port, "127.0.0.1")]

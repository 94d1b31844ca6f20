"""Over gRPC it is the same federation: the same bits as by function calls, and nobody without a certificate gets a byte."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import grpc
import jax
import numpy as np
import pytest
from federation import HELLO, NAMES, Federation
from provisioned import provisioned
from tiny import tiny_config

from fedbert_jax import provision
from fedbert_jax.errors import UserError
from fedbert_jax.runtime.calls import Abort
from fedbert_jax.runtime.credentials import load_credentials, load_roster, open_group_secret
from fedbert_jax.runtime.frames import decode, encode
from fedbert_jax.runtime.grpc import CHUNK, NAME, Client, Server

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


def test_the_clients_have_a_secret_that_the_server_lacks(folders):
    secrets = {open_group_secret(folders / name, name) for name in NAMES}
    assert secrets == {int.from_bytes((folders / "ca" / "group.secret").read_bytes(), "big")}
    assert not (folders / "server" / "group.sealed").exists()


# --- who is refused --------------------------------------------------------------------------------------------------


@pytest.fixture
def guarded(folders):
    """A server with certificates, and a function that calls it with some credentials."""
    federation = Federation(CONFIG)
    here = load_credentials(folders / "server", "server")
    server = Server(federation.service, "127.0.0.1", 0, here, lambda: load_roster(folders / "server"))

    def call(credentials: Any, method: str = "join", data: bytes = encode({})) -> bytes:
        client = Client("127.0.0.1", server.port, "adams", credentials, LIMIT)
        try:
            return client.call(method, data, timeout=5)
        finally:
            client.close()

    yield call, server, federation
    server.stop(0)


def test_without_a_certificate_nothing_is_answered(guarded):
    call, server, federation = guarded
    with pytest.raises(Abort) as refused:
        call(None)
    assert refused.value.code == "UNAVAILABLE"
    channel = grpc.secure_channel(f"127.0.0.1:{server.port}", grpc.ssl_channel_credentials())
    with pytest.raises(grpc.RpcError):
        list(channel.stream_stream(f"/{NAME}/join")(iter([b"x"]), timeout=2))
    channel.close()
    assert federation.service.received == federation.service.sent == 0


def test_another_federations_certificate_is_refused(guarded, tmp_path):
    call, _, federation = guarded
    provision.main(["init", str(tmp_path / "ca")])
    provision.main(["request", "adams", "--into", str(tmp_path / "adams")])
    provision.main(["approve", str(tmp_path / "ca"), str(tmp_path / "adams" / "adams.csr")])
    for file in (tmp_path / "ca" / "issued" / "adams").iterdir():
        (tmp_path / "adams" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(Abort) as refused:
        call(load_credentials(tmp_path / "adams", "adams"))
    assert refused.value.code == "UNAVAILABLE" and federation.service.received == 0


def test_a_server_is_no_client_and_a_client_no_server(guarded, folders):
    call, _, federation = guarded
    with pytest.raises(Abort, match=r"roster|handshake|reset|reach|connect|certificate") as refused:
        call(load_credentials(folders / "server", "server"))
    assert refused.value.code in ("PERMISSION_DENIED", "UNAVAILABLE") and federation.service.received == 0
    impostor = Federation(CONFIG)
    own = load_credentials(folders / "adams", "adams")
    server = Server(impostor.service, "127.0.0.1", 0, own, lambda: load_roster(folders / "server"))
    client = Client("127.0.0.1", server.port, "", load_credentials(folders / "jefferson", "jefferson"), LIMIT)
    with pytest.raises(Abort) as refused:
        client.call("join", encode({}), timeout=5)
    assert refused.value.code == "UNAVAILABLE" and impostor.service.received == 0
    client.close()
    server.stop(0)


def test_a_revoked_client_is_refused_at_once(folders, tmp_path):
    federation = Federation(CONFIG)
    roster = [load_roster(folders / "server")]
    server = Server(federation.service, "127.0.0.1", 0, load_credentials(folders / "server", "server"), lambda: roster[0])
    client = Client("127.0.0.1", server.port, "", load_credentials(folders / "adams", "adams"), LIMIT)
    meta = HELLO._asdict() | {"incarnation": "1", "blocks": 7}
    assert decode(client.call("join", encode(meta), 5), LIMIT)[0]["bring"]
    roster[0] = type(roster[0])(tuple(e for e in roster[0].entries if e.name != "adams"))
    with pytest.raises(Abort, match="not that of a client in the roster") as refused:
        client.call("turn", encode({"incarnation": "1", "patience": 0}), 5)
    assert refused.value.code == "PERMISSION_DENIED"
    client.close()
    server.stop(0)


def test_a_roster_that_somebody_changed_is_refused(folders, tmp_path):
    for file in ("ca.crt", "roster.json", "roster.sig"):
        (tmp_path / file).write_bytes((folders / "server" / file).read_bytes())
    assert load_roster(tmp_path).clients == NAMES
    text = (tmp_path / "roster.json").read_text()
    (tmp_path / "roster.json").write_text(text.replace("jefferson", "jeffersen"))
    with pytest.raises(UserError, match=r"not signed by ca\.crt"):
        load_roster(tmp_path)


# --- addresses and sizes ---------------------------------------------------------------------------------------------


def test_nothing_listens_to_others_in_clear():
    federation = Federation(CONFIG)
    for host in ("0.0.0.0", "::", "192.0.2.1"):
        with pytest.raises(UserError, match=r"network\.host=.*without network\.credentials"):
            Server(federation.service, host, 0)
        with pytest.raises(UserError, match=r"network\.host="):
            Client(host, 1, "adams", None, LIMIT)


def test_a_port_in_use_is_said_in_a_sentence():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"network\.port={port}: another program"):
            Server(Federation(CONFIG).service, "127.0.0.1", port)


def test_a_frame_that_is_too_long_is_cut_off_while_it_comes(guarded, folders):
    call, _, federation = guarded
    adams = load_credentials(folders / "adams", "adams")
    with pytest.raises(Abort, match="more than the") as refused:
        call(adams, "join", bytes(3 * CHUNK))
    assert refused.value.code == "RESOURCE_EXHAUSTED" and federation.service.received == 0
    for data in (b"", b"\x80\x04.", encode({}) + b"x"):
        with pytest.raises(Abort) as refused:
            call(adams, "join", data)
        assert refused.value.code == "DATA_LOSS"

"""Nobody without the right certificate gets a byte of a tensor, and each is told why in a sentence.

Over gRPC with mutual TLS; arithmetic stands in for the model (tests/toy.py).
"""

from __future__ import annotations

import contextlib
import datetime
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import toy
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from provisioned import provisioned, request, send
from proxy import DOWN, Proxy
from toy import NAMES, ROUNDS, Part

from fedbert_jax import provision
from fedbert_jax.errors import UserError
from fedbert_jax.runtime.calls import METHODS, Abort
from fedbert_jax.runtime.credentials import CLIENT, SERVER, Credentials, load_credentials, load_roster, open_group_secret
from fedbert_jax.runtime.frames import encode
from fedbert_jax.runtime.grpc import Client, Server

DAY = datetime.timedelta(days=1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of credentials: the authority's `ca`, `server` and every client's."""
    return provisioned(tmp_path_factory.mktemp("credentials"), NAMES)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those of another federation, with the same names."""
    return provisioned(tmp_path_factory.mktemp("others"), NAMES)


def dated(folders: Path, name: str, begins: datetime.timedelta, ends: datetime.timedelta) -> bytes:
    """A party's certificate, signed by its authority, with other dates: from now."""
    authority = x509.load_pem_x509_certificate((folders / "ca" / "ca.crt").read_bytes())
    key: Any = serialization.load_pem_private_key((folders / "ca" / "ca.key").read_bytes(), None)
    old = x509.load_pem_x509_certificate((folders / name / f"{name}.crt").read_bytes())
    now = datetime.datetime.now(datetime.UTC)
    made = x509.CertificateBuilder().subject_name(old.subject).issuer_name(authority.subject).public_key(old.public_key())
    made = made.serial_number(x509.random_serial_number()).not_valid_before(now + begins).not_valid_after(now + ends)
    for extension in old.extensions:
        made = made.add_extension(extension.value, extension.critical)
    return made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


class Recorded:
    """A service, of which everything is kept that it answers."""

    def __init__(self, service: Any):
        self.service, self.answers = service, list[tuple[str, str, bytes]]()
        self.limit, self.stop = service.limit, service.stop

    def call(self, method: str, client: str, data: bytes, alive: Callable[[], bool]) -> bytes:
        answer = self.service.call(method, client, data, alive)
        self.answers.append((client, method, answer))
        return answer


class Guarded:
    """A server with certificates behind a proxy that counts what it sends, in the midst of a federation's life."""

    def __init__(self, folders: Path, **options: Any):
        self.service, self.work = toy.make(**options.pop("rules", {}))
        self.recorded, self.roster = Recorded(self.service), load_roster(folders / "server")
        own = options.pop("own", None) or load_credentials(folders / "server", "server", SERVER)
        self.server = Server(self.recorded, "127.0.0.1", 0, own, lambda: self.roster, **options)  # type: ignore[arg-type]
        self.proxy = Proxy(self.server.port).__enter__()
        self.open: list[Client] = []

    def client(self, credentials: Credentials | None) -> Client:
        self.open.append(Client("127.0.0.1", self.proxy.port, "adams", credentials, 1 << 20))
        return self.open[-1]

    def close(self) -> None:
        for client in self.open:
            client.close()
        self.server.stop(0)
        self.proxy.__exit__()


@pytest.fixture
def guarded(folders: Path) -> Iterator[Callable[..., Guarded]]:
    made: list[Guarded] = []

    def make(**options: Any) -> Guarded:
        made.append(Guarded(folders, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def intruders(folders: Path, others: Path) -> dict[str, tuple[Credentials | None, str, str]]:
    """Whom nobody lets in: credentials, and the code and the words with which each call ends."""
    right, wrong = load_credentials(folders / "adams", "adams"), load_credentials(others / "adams", "adams")
    closed = "closes every connection: .* not accept this certificate"
    return {
        "nobody, in clear": (None, "UNAVAILABLE", closed),
        "of another authority": (Credentials(right.authority, wrong.certificate, wrong.key), "UNAVAILABLE", closed),
        "of another federation": (wrong, "UNAUTHENTICATED", "not of the federation of ca.crt"),
        "expired": (
            Credentials(right.authority, dated(folders, "adams", -2 * DAY, -DAY / 24), right.key),
            "UNAVAILABLE",
            closed,
        ),
        "not yet valid": (
            Credentials(right.authority, dated(folders, "adams", DAY, 2 * DAY), right.key),
            "UNAVAILABLE",
            closed,
        ),
        "the server itself": (load_credentials(folders / "server", "server"), "UNAVAILABLE", closed),
        "not in the roster": (
            Credentials(right.authority, dated(folders, "adams", -DAY, DAY), right.key),  # signed, and never approved
            "PERMISSION_DENIED",
            "not that of a client in the roster",
        ),
    }


KINDS = (
    *("nobody, in clear", "of another authority", "of another federation", "expired", "not yet valid"),
    *("the server itself", "not in the roster"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_who_has_no_right_certificate_gets_nothing(guarded, folders, others, kind):
    """While others train: no call is answered, and all that goes out are a handshake and a refusal, of no tensor's size."""
    one = guarded()
    for name in NAMES:
        member = toy.participant(name, one.client(load_credentials(folders / name, name)))
        member.join()
    assert one.service.session.state == "round"
    answered, sent = len(one.recorded.answers), one.service.sent
    given = intruders(folders, others)
    assert given.keys() == set(KINDS)
    credentials, code, words = given[kind]
    intruder, before = one.client(credentials), one.proxy.passed[DOWN]
    for method in METHODS:
        with pytest.raises(Abort, match=words) as refused:
            intruder.call(method, encode({"id": [one.service.session.epoch, 0, 0], "incarnation": "x", "patience": 0}), 20)
        assert refused.value.code == code and "\n" not in refused.value.text
    assert len(one.recorded.answers) == answered and one.service.sent == sent
    assert one.proxy.passed[DOWN] - before < 4096 * len(METHODS)
    participant = toy.participant("adams", intruder, patience=0.1)
    with pytest.raises(UserError, match=rf"the server refuses 'adams': .*{words}"):
        participant.join()


def heard(port: int, folders: Path, certificate: Path | None, say: bytes) -> bytes:
    """What a server sends over TLS to whoever shows it a certificate of adams', or none; until it ends, or is silent."""
    context = ssl.create_default_context(cafile=str(folders / "ca" / "ca.crt"))
    context.set_alpn_protocols(["h2"])
    if certificate is not None:
        context.load_cert_chain(certificate, folders / "adams" / "adams.key")
    found, until = b"", time.monotonic() + 20
    with (
        socket.create_connection(("127.0.0.1", port), 20) as raw,
        context.wrap_socket(raw, server_hostname=Credentials.SERVER) as tls,
        contextlib.suppress(ssl.SSLError, ConnectionError, TimeoutError),
    ):
        tls.sendall(say)
        tls.settimeout(1.0 if certificate is not None and certificate.suffix == ".crt" else 5.0)
        while (data := tls.recv(1 << 16)) and time.monotonic() < until:
            found += data
    return found


def test_a_client_without_a_certificate_of_its_own_gets_not_a_byte_over_tls(guarded, folders):
    """Read by Python's own TLS, which shows what a server sends: an end, or an alert, and nothing before it."""
    one, preface = guarded(), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
    path = folders / "adams" / "expired.pem"
    path.write_bytes(dated(folders, "adams", -2 * DAY, -DAY / 24))
    certificates = {"none": None, "expired": path, "good": folders / "adams" / "adams.crt"}
    sent = {kind: heard(one.server.port, folders, certificate, preface) for kind, certificate in certificates.items()}
    assert sent["none"] == sent["expired"] == b"" and sent["good"] != b""
    channel = grpc.secure_channel(f"127.0.0.1:{one.server.port}", grpc.ssl_channel_credentials())
    with pytest.raises(grpc.RpcError):
        list(channel.stream_stream("/fedbert.Federation/join")(iter([b"x"]), timeout=20))
    channel.close()
    assert one.recorded.answers == [] and one.service.received == one.service.sent == 0


@pytest.mark.parametrize(
    "kind, words",
    [
        ("expired", "the server's certificate has expired"),
        ("a client", "what answers there has no certificate of a server"),
        ("another federation", "the server's certificate is not of the federation of ca.crt"),
    ],
)
def test_a_server_without_the_right_certificate_hears_nothing(guarded, folders, others, kind, words):
    """And its clients are told at once: they don't call it until their patience ends."""
    right = load_credentials(folders / "server", "server")
    own = {
        "expired": Credentials(right.authority, dated(folders, "server", -2 * DAY, -DAY / 24), right.key),
        "a client": load_credentials(folders / "adams", "adams"),
        "another federation": load_credentials(others / "server", "server"),
    }[kind]
    one = guarded(own=own)
    with pytest.raises(UserError, match=f"^the server refuses 'jefferson': {words}\\.$"):
        toy.participant("jefferson", one.client(load_credentials(folders / "jefferson", "jefferson")), patience=600).join()
    assert one.recorded.answers == [] and one.service.received == 0


# --- what happens while it runs ---------------------------------------------------------------------------------------


def trained_without(one: Guarded, folders: Path, change: Callable[[], None]) -> dict[str, Any]:
    """Trains; before adams sends a message of the second round, something changes. Returns how the clients ended."""

    def trouble(phase: str, round: int, step: int) -> None:
        if (phase, round, step) == ("backward", 1, 1):
            change()

    clients = {name: one.client(load_credentials(folders / name, name)) for name in NAMES}
    return toy.run(one.service, clients, {"adams": Part("adams", trouble)})


def test_a_client_that_is_revoked_while_it_runs_is_out_with_its_next_call(guarded, folders):
    """The others go on, as a quorum; it is told, and gets nothing more."""
    one = guarded(rules=dict(quorum=2, deadline=3.0))
    at = list[int]()

    def revoke() -> None:
        one.roster = type(one.roster)(tuple(e for e in one.roster.entries if e.name != "adams"))
        at.append(len([who for who, _, _ in one.recorded.answers if who == "adams"]))

    # A refused client ends, and its thread would stop the server for the others' sake; here they are to go on.
    service_stop, one.service.stop = one.service.stop, lambda: None
    ends = trained_without(one, folders, revoke)
    one.service.stop = service_stop
    assert (
        str(ends.pop("adams")) == "the server ends 'adams''s part: this certificate is not that of a client in the roster."
    )
    assert ends == dict.fromkeys(NAMES[1:]) and one.work.round == ROUNDS
    assert at == [len([who for who, _, _ in one.recorded.answers if who == "adams"])]
    assert {who for _, _, who in one.work.history[9 + 3 :]} == {NAMES[1:]}


def test_a_certificate_that_expires_while_it_runs_is_out_with_its_next_call(guarded, folders):
    """TLS alone would let the connection live on for as long as nothing cuts it."""
    later = list[datetime.timedelta]()
    one = guarded(rules=dict(quorum=2, deadline=3.0), now=lambda: datetime.datetime.now(datetime.UTC) + sum(later, 0 * DAY))
    short = dated(folders, "adams", -DAY, DAY)
    entries = [e if e.name != "adams" else type(e)(e.name, e.role, e.index, x509_print(short)) for e in one.roster.entries]
    one.roster = type(one.roster)(tuple(entries))
    own = load_credentials(folders / "adams", "adams")
    service_stop, one.service.stop = one.service.stop, lambda: None
    clients = {name: one.client(load_credentials(folders / name, name)) for name in NAMES[1:]}
    clients["adams"] = one.client(Credentials(own.authority, short, own.key))

    def trouble(phase: str, round: int, step: int) -> None:
        if (phase, round, step) == ("backward", 1, 1):
            later.append(2 * DAY)  # all others' are good for a year

    ends = toy.run(one.service, clients, {"adams": Part("adams", trouble)})
    one.service.stop = service_stop
    assert "the certificate of 'adams' has expired (20" in str(ends.pop("adams"))
    assert ends == dict.fromkeys(NAMES[1:]) and one.work.round == ROUNDS


def x509_print(certificate: bytes) -> str:
    return x509.load_pem_x509_certificate(certificate).fingerprint(hashes.SHA256()).hex()


def test_a_roster_that_is_being_replaced_stops_nobody(guarded, folders, monkeypatch):
    """It and its signature are two files: between the two, they don't fit, and a client asks again."""
    one, times = guarded(), list[int]()
    right = one.roster

    def roster() -> Any:
        times.append(1)
        if len(times) % 10 == 0:
            raise UserError("roster.json is not signed by ca.crt")
        return right

    monkeypatch.setattr(one.server, "_roster", roster)
    assert trained_without(one, folders, lambda: None) == dict.fromkeys(NAMES) and len(times) > 50


def test_of_two_processes_with_one_certificate_the_later_one_stays(guarded, folders):
    """The earlier one is told so, ends, and gets nothing more; the round is done again with the other."""
    one = guarded()
    clients = {name: one.client(load_credentials(folders / name, name)) for name in NAMES}
    twin, ends = one.client(load_credentials(folders / "adams", "adams")), dict[str, Any]()

    def run(which: str, client: Client, part: Part) -> None:
        try:
            toy.participant("adams", client, part).run()
            ends[which] = None
        except UserError as error:
            ends[which] = str(error)

    def another(phase: str, round: int, step: int) -> None:
        if (phase, round, step) == ("forward", 1, 1):
            threading.Thread(target=run, args=("later", twin, Part("adams")), daemon=True).start()
            until = time.monotonic() + 20
            while not one.service.session._replaced and time.monotonic() < until:
                time.sleep(0.01)

    thread = threading.Thread(target=run, args=("earlier", clients["adams"], Part("adams", another)), daemon=True)
    thread.start()
    assert toy.run(one.service, {name: clients[name] for name in NAMES[1:]}) == dict.fromkeys(NAMES[1:])
    thread.join(20)
    quiet, work = toy.make()
    toy.run(quiet, {name: toy.Local(quiet, name) for name in NAMES})
    assert toy.same(one.work, work)
    assert "another process has joined as 'adams' since, and takes its place" in ends["earlier"]


# --- what a party's own folder says, before it calls anybody ----------------------------------------------------------


def test_credentials_that_the_other_side_would_refuse_are_refused_at_home(folders, others, tmp_path):
    def folder(**files: bytes) -> Path:
        for file in ("ca.crt", "adams.crt", "adams.key"):
            (tmp_path / file).write_bytes((folders / "adams" / file).read_bytes())
        for name, data in files.items():
            (tmp_path / name.replace("_", ".")).write_bytes(data)
        return tmp_path

    read = lambda name, file: (folders / name / file).read_bytes()  # noqa: E731
    assert load_credentials(folder(), "adams", CLIENT) == load_credentials(folders / "adams", "adams")
    for files, words in (
        (
            dict(adams_crt=dated(folders, "adams", -2 * DAY, -DAY)),
            r"adams\.crt has expired \(20.* UTC\): ask who runs .* to renew it",
        ),
        (dict(adams_crt=dated(folders, "adams", DAY, 2 * DAY)), r"adams\.crt is good from .* on, and this machine's clock"),
        (dict(adams_key=read("jefferson", "jefferson.key")), r"adams\.key is not the key of adams\.crt"),
        (dict(ca_crt=(others / "ca" / "ca.crt").read_bytes()), r"adams\.crt is not signed by ca\.crt"),
        (dict(adams_crt=b"x"), "is damaged"),
        (dict(adams_key=b""), "is damaged"),
        (
            dict(adams_crt=read("jefferson", "jefferson.crt"), adams_key=read("jefferson", "jefferson.key")),
            r"adams\.crt is the certificate of 'jefferson'",
        ),
    ):
        with pytest.raises(UserError, match=rf"^config key network\.credentials='.*': .*{words}[^\n]*\.$"):
            load_credentials(folder(**files), "adams", CLIENT)
    with pytest.raises(UserError, match=r"adams\.crt is not the certificate of a server"):
        load_credentials(folder(), "adams", SERVER)
    with pytest.raises(UserError, match=r"server\.crt is not the certificate of a client"):
        load_credentials(folders / "server", "server", CLIENT)


def test_a_client_that_nobody_approved_has_no_certificate(folders):
    request(folders, "hamilton")
    with pytest.raises(
        UserError, match=r"ca\.crt can't be read .*; accepted: a folder of .* hamilton\.crt and hamilton\.key"
    ):
        load_credentials(folders / "hamilton", "hamilton")


def test_the_clients_have_a_secret_that_the_server_lacks(folders):
    secrets = {open_group_secret(folders / name, name) for name in NAMES}
    assert secrets == {int.from_bytes((folders / "ca" / "group.secret").read_bytes(), "big")}
    assert not (folders / "server" / "group.sealed").exists()


def test_a_roster_that_somebody_changed_is_refused(folders, tmp_path):
    for file in ("ca.crt", "roster.json", "roster.sig"):
        (tmp_path / file).write_bytes((folders / "server" / file).read_bytes())
    assert load_roster(tmp_path).clients == NAMES
    text = (tmp_path / "roster.json").read_text()
    (tmp_path / "roster.json").write_text(text.replace("jefferson", "jeffersen"))
    with pytest.raises(UserError, match=r"not signed by ca\.crt"):
        load_roster(tmp_path)
    (tmp_path / "roster.json").write_text(text)
    assert load_roster(tmp_path).clients == NAMES
    (tmp_path / "roster.sig").write_bytes(bytes(70))  # what was signed once is asked for again whenever a byte differs
    with pytest.raises(UserError, match=r"not signed by ca\.crt"):
        load_roster(tmp_path)
    (tmp_path / "ca.crt").write_bytes(b"x")
    with pytest.raises(UserError, match=r"ca\.crt is no certificate"):
        load_roster(tmp_path)


def test_a_certificate_is_renewed_for_its_own_key_alone(tmp_path):
    """The party keeps its key and its place; the certificate before it is out."""
    folders = provisioned(tmp_path, NAMES)
    before, roster = (folders / "adams" / "adams.crt").read_bytes(), load_roster(folders / "ca")
    provision.main(["approve", str(folders / "ca"), str(folders / "adams" / "adams.csr"), "--days", "9"])
    send(folders, "adams")
    credentials, renewed = load_credentials(folders / "adams", "adams", CLIENT), load_roster(folders / "ca")
    assert credentials.certificate != before and renewed.clients == roster.clients == NAMES
    assert renewed.client_of(credentials.certificate) == "adams" and renewed.client_of(before) is None
    assert open_group_secret(folders / "adams", "adams") == open_group_secret(folders / "jefferson", "jefferson")
    request(folders / "thief", "adams")  # somebody else's, of that name
    for name, role in (("adams", "client"), ("server", "server")):
        if name == "server":
            request(folders / "thief", name, role)
        with pytest.raises(UserError, match=f"'{name}' is, or was, in the roster of .*; accepted: another name, or the req"):
            provision.main(["approve", str(folders / "ca"), str(folders / "thief" / name / f"{name}.csr")])
    provision.main(["revoke", str(folders / "ca"), "adams"])
    with pytest.raises(UserError, match="'adams' is, or was, in the roster"):
        provision.main(["approve", str(folders / "ca"), str(folders / "adams" / "adams.csr")])


def test_a_revoked_client_is_not_in_the_next_roster(others):
    provision.main(["revoke", str(others / "ca"), "washington"])
    assert load_roster(others / "ca").clients == NAMES[:2]


def test_a_server_is_not_revoked_as_if_that_kept_it_out(others):
    """Clients go by ca.crt alone, so the roster without it would change nothing."""
    before = (others / "ca" / "roster.json").read_bytes()
    with pytest.raises(UserError, match=r"'server' is a server: .* make a new authority\.$"):
        provision.main(["revoke", str(others / "ca"), "server"])
    assert (others / "ca" / "roster.json").read_bytes() == before

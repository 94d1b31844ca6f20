"""The gRPC transport: a service's calls over HTTP/2, with mutual TLS wherever more than this machine can reach it.

Frames travel in chunks of 1 MiB, so that a cap is checked before memory is taken. There is no generated code, and gRPC
retries nothing: `participant.Line` asks again for what isn't answered, by id.
"""

from __future__ import annotations

import contextlib
import datetime
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import Any

import grpc
import grpc.experimental
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from fedbert_jax.config.network import CLIENT_NAME
from fedbert_jax.errors import UserError
from fedbert_jax.runtime.calls import METHODS, Abort
from fedbert_jax.runtime.credentials import Credentials, Roster, expiry
from fedbert_jax.runtime.gathering import Gathering
from fedbert_jax.runtime.service import Service

NAME = "fedbert.Federation"
CHUNK = 1 << 20
LOOPBACK = ("127.0.0.1", "::1", "localhost")
ACCEPTED = {code.name: code for code in grpc.StatusCode}
REFUSED = "fedbert-refused"  # the key in the trailing metadata that tells a service's refusals from gRPC's own errors
# What gRPC says where a client refuses the server's certificate. The other way round, a connection is closed without a word.
REFUSALS = {
    "certificate has expired": "the server's certificate has expired",
    "unsupported certificate purpose": "what answers there has no certificate of a server",
    "Hostname Verification Check failed": "what answers there has no certificate of a server",
    "CERTIFICATE_VERIFY_FAILED": "the server's certificate is not of the federation of ca.crt",
}
OPTIONS = [
    ("grpc.max_receive_message_length", 2 * CHUNK),
    ("grpc.max_send_message_length", 2 * CHUNK),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),  # shorter ones cut slow sends off
    ("grpc.http2.ping_timeout_ms", 20_000),  # without it, a peer that was stopped isn't noticed
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.keepalive_permit_without_calls", 1),
]
# Without it, a server takes the pings of a client that waits for others for an attack, and cuts it off after two minutes.
SERVER_OPTIONS = [("grpc.so_reuseport", 0), ("grpc.http2.min_ping_interval_without_data_ms", 100)]
CLIENT_OPTIONS = [
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2000),
    ("grpc.enable_retries", 0),
    (grpc.experimental.ChannelOptions.SingleThreadedUnaryStream, 1),  # whoever calls waits itself: two threads fewer a call
]


def chunks_of(data: bytes) -> Iterator[bytes]:
    """Cuts a frame into chunks."""
    for start in range(0, len(data), CHUNK):
        yield data[start : start + CHUNK]


def joined(chunks: Iterable[bytes], limit: int) -> bytes:
    """Puts a frame together.

    Raises:
      Abort: as soon as it has more bytes than it may have.
    """
    parts, size = [], 0
    for chunk in chunks:
        size += len(chunk)
        if size > limit:
            raise Abort("RESOURCE_EXHAUSTED", f"more than the {limit:,} bytes that this message may have")
        parts.append(chunk)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _abort(error: Any) -> Abort:
    """Returns what a call ended with: the service's refusal as it is, and what gRPC says of a broken link as UNAVAILABLE.

    A link that breaks in the midst of a call is UNAVAILABLE, CANCELLED, INTERNAL or UNKNOWN to gRPC, by where it breaks.
    """
    code, text = error.code().name, error.details() or "no reason given"
    text = text.splitlines()[0][:500]
    if any(key == REFUSED for key, _ in error.trailing_metadata() or ()) or code in ("DEADLINE_EXCEEDED", "UNIMPLEMENTED"):
        return Abort(code, text)
    if refused := next((why for words, why in REFUSALS.items() if words in text), ""):
        return Abort("UNAUTHENTICATED", refused)
    if text.startswith("failed to connect") and text.endswith("Socket closed"):
        text = "the server closes every connection: it may be stopping, or not accept this certificate"
    if text.startswith("Exception "):  # in a handler: it is no link that has to mend
        return Abort("INTERNAL", text)
    return Abort("UNAVAILABLE", text)


class Server:
    """A service, listening.

    Args:
      service: answers the calls.
      host: an address of this machine; without `credentials` only the loopback is accepted.
      port: 0 takes any that is free.
      credentials: the server's.
      roster: (): who may call, by certificate; asked at every call, so that a revoked certificate ends at once.
      clients: how many there may be: each waits in a few calls at once.
      now: the time, by which certificates end.

    Raises:
      UserError: if the address can't be had, or others than this machine could reach it in clear.
    """

    def __init__(
        self,
        service: Service | Gathering,
        host: str,
        port: int,
        credentials: Credentials | None = None,
        roster: Callable[[], Roster] | None = None,
        clients: int = 4,
        now: Callable[[], datetime.datetime] = lambda: datetime.datetime.now(datetime.UTC),
    ):
        if credentials is None and host not in LOOPBACK:
            raise UserError(
                f"config key network.host={host!r}: accepted without network.credentials: 127.0.0.1. What crosses would be "
                "in clear; see `python -m fedbert_jax.provision`."
            )
        self.service, self._roster, self._now = service, roster, now
        threads = 32 + 8 * clients  # a call holds one while it waits; they are started as they are needed
        self._pool = futures.ThreadPoolExecutor(threads, thread_name_prefix="fedbert-grpc")
        self._server = grpc.server(self._pool, options=[*OPTIONS, *SERVER_OPTIONS], maximum_concurrent_rpcs=threads)
        handlers = {m: grpc.stream_stream_rpc_method_handler(self._handler(m)) for m in METHODS}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(NAME, handlers),))
        self.health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        self.health.set(NAME, health_pb2.HealthCheckResponse.SERVING)
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            if credentials is None:
                self.port = self._server.add_insecure_port(address)
            else:
                pair = [(credentials.key, credentials.certificate)]
                tls = grpc.ssl_server_credentials(pair, credentials.authority, require_client_auth=True)
                self.port = self._server.add_secure_port(address, tls)
        except RuntimeError as error:
            self._pool.shutdown()
            raise UserError(
                f"config keys network.host={host!r}, network.port={port}: another program may have it."
            ) from error
        self._server.start()
        self.where = f"{host}:{self.port}" + ("" if credentials else ", in clear")

    def use(self, service: Service) -> None:
        """Lets another service answer from now on."""
        before, self.service = self.service, service
        before.stop()

    def _handler(self, method: str) -> Callable[[Iterator[bytes], Any], Iterator[bytes]]:
        def handle(chunks: Iterator[bytes], context: Any) -> Iterator[bytes]:
            try:
                client = self._who(context)
                data = joined(chunks, self.service.limit(method))
                answer = self.service.call(method, client, data, context.is_active)
            except Abort as error:
                context.set_trailing_metadata(((REFUSED, "1"),))
                context.abort(ACCEPTED.get(error.code, grpc.StatusCode.UNKNOWN), error.text)
            yield from chunks_of(answer)

        return handle

    def _who(self, context: Any) -> str:
        """Returns who calls: by its certificate, or on the loopback as it says."""
        if self._roster is None:
            name = dict(context.invocation_metadata()).get("client", b"")
            name = name.decode("utf-8", "replace") if isinstance(name, bytes) else name
            if not re.fullmatch(CLIENT_NAME, name):
                raise Abort("INVALID_ARGUMENT", "a client's name has letters, digits, ., - and _")
            return name
        pem = context.auth_context().get("x509_pem_cert")
        try:
            found = self._roster().client_of(pem[0]) if pem else None
        except UserError as error:  # the roster and its signature are two files, which somebody may be replacing
            raise Abort("UNAVAILABLE", f"the roster can't be read at the moment: {error}") from None
        if found is None:
            raise Abort("PERMISSION_DENIED", "this certificate is not that of a client in the roster")
        # TLS looks at the date when a connection begins, and a connection may last for weeks.
        if (ended := expiry(pem[0])) <= self._now():
            raise Abort("PERMISSION_DENIED", f"the certificate of {found!r} has expired ({ended:%Y-%m-%d %H:%M} UTC)")
        return found

    def stop(self, grace: float = 1.0) -> None:
        """Ends all calls, and lets go of the port."""
        self.health.set(NAME, health_pb2.HealthCheckResponse.NOT_SERVING)
        self.service.stop()
        self._server.stop(grace).wait()
        self._pool.shutdown()


class Client:
    """A transport to a server (`participant.Transport`).

    Args:
      host, port: the server's.
      name: the client's; the server believes it only on the loopback, where there are no certificates.
      credentials: the client's.
      limit: bytes that an answer may have.
      at_once: how many frames of a round may be on their way at once.
    """

    def __init__(self, host: str, port: int, name: str, credentials: Credentials | None, limit: int, at_once: int = 1):
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self.where = f"{host}:{port}"
        self._at_once, self._limit, self._metadata = at_once, limit, (("client", name),) if credentials is None else ()
        self._leaving, self._left = deque[object](), threading.Condition()
        options = [*OPTIONS, *CLIENT_OPTIONS]
        if credentials is None:
            if host not in LOOPBACK:
                raise UserError(f"config key network.host={host!r}: accepted without network.credentials: 127.0.0.1.")
            self._channel = grpc.insecure_channel(address, options)
        else:
            tls = grpc.ssl_channel_credentials(credentials.authority, credentials.key, credentials.certificate)
            # The certificate says that it is the server's, whatever the address under which it is reached.
            self._channel = grpc.secure_channel(
                address, tls, [*options, ("grpc.ssl_target_name_override", Credentials.SERVER)]
            )
        self._calls = {m: self._channel.stream_stream(f"/{NAME}/{m}") for m in METHODS}
        self._whole = {m: self._channel.unary_stream(f"/{NAME}/{m}") for m in METHODS}  # the same to the server

    def call(self, method: str, data: bytes, timeout: float) -> bytes:
        """Sends a frame and returns the answer's.

        Raises:
          Abort: with gRPC's code and the server's sentence.
        """
        turn = object()
        if self._at_once == 1 and len(data) <= CHUNK:  # sent by this thread: gRPC starts another one for a stream
            call = self._whole[method](data, timeout=timeout, metadata=self._metadata)
        else:
            with self._left:
                self._leaving.append(turn)
            call = self._calls[method](self._in_turn(turn, data), timeout=timeout, metadata=self._metadata)
        try:
            return joined(call, self._limit)
        except grpc.RpcError as error:
            raise _abort(error) from None
        finally:
            with contextlib.suppress(Exception):
                call.cancel()
            self._leave(turn)

    def _in_turn(self, turn: object, data: bytes) -> Iterator[bytes]:
        """Cuts a frame into chunks, the first one when the frames before it have left.

        HTTP/2 would let them share the line, and all parts of a batch would arrive when the last one does.
        """
        with self._left:
            self._left.wait_for(lambda: turn not in self._leaving or self._leaving[0] is turn)
        yield from chunks_of(data)
        self._leave(turn)

    def _leave(self, turn: object) -> None:
        """Notes that a frame has left, or that its call is over."""
        with self._left:
            if turn in self._leaving:
                self._leaving.remove(turn)
                self._left.notify_all()

    def close(self) -> None:
        """Closes the connection."""
        self._channel.close()

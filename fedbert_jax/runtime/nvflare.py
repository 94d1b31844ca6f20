"""The NVFlare transport: a service's calls as streamed requests between the cells of one NVFlare job.

A frame travels in NVFlare's chunks of 1 MiB: a whole message of more than 4 MiB would break a connection over http. Who
calls is known by the cell that a message comes from: an NVFlare server with certificates lets a client send under no other
name. Of a caller's message nothing but bytes is taken, and no more of them than the call may have: NVFlare itself would take
4 GiB, and decode what a caller says is an object.

NVFlare is an extra (`.[nvflare]`), so it is imported where it is used. A call that waits for other clients does so in a
thread of ours, since NVFlare has its own for all jobs' messages.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fedbert_jax.runtime import frames
from fedbert_jax.runtime.calls import Abort
from fedbert_jax.runtime.gathering import Gathering
from fedbert_jax.runtime.service import Service

CHANNEL = "fedbert"
REFUSED, WHY, PATIENCE = "fedbert.refused", "fedbert.why", "fedbert.patience"  # headers, beside NVFlare's
BYTES = (bytes, bytearray, memoryview)  # what NVFlare hands over of a stream
THREADS = 32  # beside those of the clients' calls
LOOK = 0.2  # seconds between two looks at whether the job is to end
BEAT = 10.0  # seconds between two signs of life of a client
LONGEST = 3600.0  # seconds that a call may wait, whatever its caller says
SLACK = 10.0  # seconds that it is kept when its caller has given it up, which is for the caller to notice first
# NVFlare's return codes; all others are a server that can't be reached.
CODES = {
    "timeout": "DEADLINE_EXCEEDED",
    "process_exception": "UNKNOWN",
    "invalid_request": "INVALID_ARGUMENT",
    "unauthenticated": "PERMISSION_DENIED",
    "authentication_error": "PERMISSION_DENIED",
}


class Server:
    """A service, answering at a job's server.

    Args:
      service: answers the calls.
      cell: the job's, at the server.
      clients: the job's clients: names by the full names of their cells.
      ended: (): whether the job is to end; every call ends then, and the service.
      clock: seconds, from anywhere.
    """

    def __init__(
        self,
        service: Service | Gathering,
        cell: Any,
        clients: Mapping[str, str],
        ended: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ):
        from nvflare.fuel.f3.streaming.stream_const import STREAM_CHANNEL, STREAM_DATA_TOPIC

        self.service, self.where = service, f"NVFlare's {cell.get_fqcn()}"
        self._cell, self._clients, self._ended, self._clock = cell, dict(clients), ended, clock
        self._heard = dict.fromkeys(self._clients.values(), clock())
        self._pool = ThreadPoolExecutor(THREADS + 8 * len(clients), thread_name_prefix="fedbert-nvflare")
        self._over = threading.Event()
        # The look at a message's first bytes comes before NVFlare takes memory for the rest.
        cell.core_cell.add_incoming_request_filter(STREAM_CHANNEL, STREAM_DATA_TOPIC, self._look)
        cell.register_request_cb(channel=CHANNEL, topic="*", cb=self._take)
        self._watcher = threading.Thread(target=self._watch, name="fedbert-nvflare-end", daemon=True)
        self._watcher.start()

    def use(self, service: Service) -> None:
        """Lets another service answer from now on."""
        before, self.service = self.service, service
        before.stop()

    def silent(self, seconds: float) -> list[str]:
        """Returns the clients of whom nothing was heard for so long: NVFlare starts no process again, and may not tell."""
        now = self._clock()
        return [name for name, heard in self._heard.items() if now - heard >= seconds]

    def _watch(self) -> None:
        while not self._over.wait(LOOK):
            if self._ended():
                self.service.stop()  # as often as it takes: another service may be in use by then

    def _look(self, message: Any) -> Any:
        """Refuses a message by its headers, which come with every chunk of it; returns what stops it, or None."""
        from nvflare.fuel.f3.message import Message
        from nvflare.fuel.f3.streaming.stream_const import StreamHeaderKey
        from nvflare.fuel.f3.streaming.stream_types import StreamError

        if message.get_header(StreamHeaderKey.CHANNEL) != CHANNEL:
            return None
        try:
            self._heard[self._who(message)] = self._clock()
            self._fits(str(message.get_header(StreamHeaderKey.TOPIC)), message.get_header(StreamHeaderKey.SIZE))
            if message.get_header(StreamHeaderKey.PAYLOAD_ENCODING) != "bytes":
                raise Abort("INVALID_ARGUMENT", "a message is bytes, and nothing that has to be decoded")
        except Abort as error:
            self._cell.byte_receiver.reject(message, StreamError(f"[{error.code}] {error.text}"))
            return Message()
        return None

    def _who(self, message: Any) -> str:
        from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey

        origin = message.get_header(MessageHeaderKey.ORIGIN)
        found = self._clients.get(origin)
        if found is None:
            raise Abort("PERMISSION_DENIED", f"{origin} is no client of this job")
        return found

    def _fits(self, method: str, size: Any) -> None:
        limit = self.service.limit(method)
        if type(size) is not int or not 0 <= size <= limit:
            raise Abort("RESOURCE_EXHAUSTED", f"more than the {limit:,} bytes that this message may have")

    def _take(self, request: Any) -> Any:
        """Begins to answer a call; returns the reply, or a future of it, which NVFlare sends when it is there."""
        waits = request.get_header(PATIENCE)
        end = time.monotonic() + SLACK + (min(waits, LONGEST) if type(waits) is float else LONGEST)
        try:
            return self._pool.submit(self._answer, request, lambda: not self._over.is_set() and time.monotonic() < end)
        except RuntimeError:  # the pool has been shut down
            return _refusal(Abort("UNAVAILABLE", "the server is stopping"))

    def _answer(self, request: Any, alive: Callable[[], bool]) -> Any:
        from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey, ReturnCode
        from nvflare.fuel.f3.cellnet.utils import make_reply

        try:
            method, client, data = str(request.get_header(MessageHeaderKey.TOPIC)), self._who(request), request.payload
            if not isinstance(data, BYTES):
                raise Abort("INVALID_ARGUMENT", "a message is bytes")
            self._fits(method, len(data))
            return make_reply(ReturnCode.OK, body=self.service.call(method, client, bytes(data), alive))
        except Abort as error:
            return _refusal(error)

    def stop(self) -> None:
        """Ends all calls; whoever calls afterwards gets no answer."""
        self._over.set()
        self.service.stop()
        self._pool.shutdown()
        self._watcher.join()


class Client:
    """A transport to the server's cell (`participant.Transport`).

    Args:
      cell: the job's, at this client.
      server: the full name of the job's cell at the server.
      limit: bytes that an answer may have.
      abort: NVFlare's signal that the job is to end, if there is one.
    """

    def __init__(self, cell: Any, server: str, limit: int, abort: Any = None):
        self.where = f"NVFlare's {server}"
        self._cell, self._server, self._limit, self._abort = cell, server, limit, abort
        self._over = threading.Event()

    def beat(self) -> None:
        """Lets the server hear of this client every now and then from here on, whatever else it does."""

        def run() -> None:
            while not self._over.is_set():
                with contextlib.suppress(Abort):
                    self.call("status", frames.encode({}), BEAT)
                self._over.wait(BEAT)

        threading.Thread(target=run, name="fedbert-nvflare-beat", daemon=True).start()

    def call(self, method: str, data: bytes, timeout: float) -> bytes:
        """Sends a frame and returns the answer's.

        Raises:
          Abort: with gRPC's code for it, and the server's sentence or NVFlare's.
        """
        from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey
        from nvflare.fuel.f3.message import Message

        try:
            # By keywords: only so does a cell choose to stream.
            reply = self._cell.send_request(
                channel=CHANNEL,
                topic=method,
                target=self._server,
                request=Message({PATIENCE: float(timeout)}, data),
                timeout=timeout,
                abort_signal=self._abort,
            )
        except Exception as error:  # of a cell that has stopped, say; NVFlare has no class for them
            raise Abort("UNAVAILABLE", f"{type(error).__name__}: {error}"[:500]) from error
        if self._abort is not None and self._abort.triggered:
            raise Abort("CANCELLED", "the job is to end")
        code = reply.get_header(MessageHeaderKey.RETURN_CODE, "ok")
        if code != "ok":
            why = str(reply.get_header(MessageHeaderKey.ERROR) or code)
            # What the server refused at the first chunk; NVFlare says it in a sentence of its own.
            refused = re.search(r"\[([A-Z_]+)\] (.*)", why)
            raise Abort(*refused.groups()) if refused else Abort(CODES.get(code, "UNAVAILABLE"), why[:500])
        if refusal := reply.get_header(REFUSED):
            raise Abort(str(refusal), str(reply.get_header(WHY)))
        if not isinstance(reply.payload, BYTES):
            raise Abort("UNKNOWN", "the answer is not bytes")
        if len(reply.payload) > self._limit:
            raise Abort("RESOURCE_EXHAUSTED", f"more than the {self._limit:,} bytes that this answer may have")
        return bytes(reply.payload)

    def close(self) -> None:
        """Ends the signs of life; the cell is the job's."""
        self._over.set()


def _refusal(error: Abort) -> Any:
    from nvflare.fuel.f3.cellnet.defs import ReturnCode
    from nvflare.fuel.f3.cellnet.utils import make_reply

    reply = make_reply(ReturnCode.OK, body=b"")
    reply.add_headers({REFUSED: error.code, WHY: error.text[:500]})
    return reply

"""A TCP proxy on the loopback that does to a connection what networks do: it delays, cuts, loses and changes bytes."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Coroutine
from typing import Any

UP, DOWN = "up", "down"  # to the server, and from it


class Proxy:
    """Passes on connections to a port of this machine; in a `with`.

    Whoever uses it says in its own thread what goes wrong from now on; each returns once that holds.

    Attributes:
      port: where it listens.
      passed: bytes, by direction.
      met: what went wrong so far, in order: a test's proof that it did.
      kept: all bytes that passed, if they are to be kept.
    """

    def __init__(self, target: int, keep: bool = False):
        self.target, self.port = target, 0
        self.passed, self.met = {UP: 0, DOWN: 0}, list[str]()
        self.kept = bytearray() if keep else None
        self.latency = 0.0  # seconds for which every piece is held back, in either direction
        self._hole = False
        self._tricks: dict[str, Callable[[bytes], tuple[bytes, str]]] = {}  # by direction: bytes -> what is passed, and then
        self._loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    def __enter__(self) -> Proxy:
        self._thread.start()
        self._do(self._listen())
        return self

    def __exit__(self, *_: object) -> None:
        self._do(self._down())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    # --- what goes wrong ---

    def reset_within(self, direction: str, count: int) -> None:
        """Cuts the connection with a RST once `count` further bytes have passed."""
        self._trick(direction, lambda data, left: (data[:left], "reset"), count)

    def truncate_within(self, direction: str, count: int) -> None:
        """Ends the connection with a FIN once `count` further bytes have passed, as if that had been all."""
        self._trick(direction, lambda data, left: (data[:left], "end"), count)

    def change_within(self, direction: str, count: int) -> None:
        """Flips a bit of the byte after `count` further ones."""
        flip = lambda data, left: (data[:left] + bytes([data[left] ^ 4]) + data[left + 1 :], "changed")  # noqa: E731
        self._trick(direction, flip, count)

    def change_after(self, direction: str, mark: bytes, count: int) -> None:
        """Flips a bit of the byte that comes `count` bytes after a mark, as soon as both are in one piece."""

        def trick(data: bytes) -> tuple[bytes, str]:
            at = data.find(mark) + len(mark) + count
            if mark not in data or at >= len(data):
                return data, ""
            return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :], "changed"

        self._do(self._set(direction, trick))

    def swallow(self) -> None:
        """Turns into a black hole: connections stay and new ones are accepted, and nothing is passed on, ever."""
        self._do(self._swallow(True))

    def recover(self) -> None:
        """Passes new connections on again; those from the black hole's time stay dead."""
        self._do(self._swallow(False))

    def outage(self, seconds: float) -> None:
        """Cuts all connections, and refuses others for a while."""

        async def go() -> None:
            await self._down()
            self.met.append("down")
            self._loop.call_later(seconds, lambda: self._keep(self._listen("up again")))

        self._do(go())

    # --- how ---

    def _do(self, what: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(what, self._loop).result(20)

    def _keep(self, what: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(what)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _trick(self, direction: str, what: Callable[[bytes, int], tuple[bytes, str]], count: int) -> None:
        left = count

        def trick(data: bytes) -> tuple[bytes, str]:
            nonlocal left
            if left >= len(data):
                left -= len(data)
                return data, ""
            return what(data, left)

        self._do(self._set(direction, trick))

    async def _set(self, direction: str, trick: Callable[[bytes], tuple[bytes, str]]) -> None:
        self._tricks[direction] = trick

    async def _swallow(self, hole: bool) -> None:
        self._hole = hole
        self.met.append("black hole" if hole else "recovered")

    async def _listen(self, said: str = "") -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        if said:
            self.met.append(said)

    async def _down(self) -> None:
        if self._server is not None:
            self._server.close()
        for writer in list(self._writers):
            _reset(writer)
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            there, here = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:  # the server is not there, so this isn't either
            _reset(writer)
            self._writers.discard(writer)
            return
        self._writers.add(here)
        dead = [self._hole]  # a connection from a black hole's time never works
        self._keep(self._pass(UP, reader, here, dead, writer))
        self._keep(self._pass(DOWN, there, writer, dead, here))

    async def _pass(
        self,
        direction: str,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        dead: list[bool],
        other: asyncio.StreamWriter,
    ) -> None:
        with contextlib.suppress(OSError, asyncio.CancelledError):
            while data := await reader.read(1 << 16):
                if self._hole:
                    dead[0] = True
                if dead[0]:
                    continue
                if self.latency:
                    await asyncio.sleep(self.latency)
                then = ""
                if direction in self._tricks:
                    data, then = self._tricks[direction](data)
                    if then:
                        del self._tricks[direction]
                        self.met.append(then)
                writer.write(data)
                self.passed[direction] += len(data)
                if self.kept is not None:
                    self.kept += data
                await writer.drain()
                if then in ("reset", "end"):
                    for one in (writer, other):
                        _reset(one) if then == "reset" else one.close()
                    break
        if not dead[0]:
            writer.close()
        self._writers -= {writer}


def _reset(writer: asyncio.StreamWriter) -> None:
    """Ends a connection with a RST, so that what is on its way is lost."""
    with contextlib.suppress(OSError):
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()

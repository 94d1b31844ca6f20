"""A line between two parties on one machine: a TCP proxy that counts bytes, and lets only so many through, so much later."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import threading
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

PIECE = 16 << 10  # bytes that are forwarded at a time
WINDOW = 128 << 10  # bytes of the sender that the kernel takes ahead of the line: a real line has no room for megabytes
SLACK = 0.002  # seconds that an idle line may be ahead of its rate, since timers are not exact


@dataclass(frozen=True)
class Speed:
    """What a line does to bytes, in each direction by itself."""

    megabits: float | None = None  # a second; None: as fast as it can
    delay: float = 0.0  # milliseconds on the way, one way

    @property
    def plain(self) -> bool:
        """Whether it does nothing."""
        return self.megabits is None and self.delay == 0

    def __str__(self) -> str:
        if self.plain:
            return "loopback"
        rate = "unlimited" if self.megabits is None else f"{self.megabits:g} Mbit/s"
        return f"{rate}, {self.delay:g} ms" if self.delay else rate


class Pace:
    """Says when bytes have left a line of a given rate: a token bucket that holds `SLACK` seconds' worth."""

    def __init__(self, megabits: float | None):
        self._rate = None if megabits is None else 125_000 * megabits  # bytes a second
        self._free = -math.inf  # when the last of the bytes so far leaves: there were none

    def leaves(self, size: int, now: float, waited: bool) -> float:
        """Returns the time at which the last of `size` bytes has left.

        Args:
          size: of what is given to the line now.
          now: seconds, from anywhere.
          waited: whether the line has waited for these bytes. If they have waited for it, they follow what went before,
            however late this process was woken.
        """
        if self._rate is None:
            return now
        idle = waited or self._free == -math.inf
        self._free = (max(self._free, now - SLACK) if idle else self._free) + size / self._rate
        return self._free


class Link:
    """A port of the loopback whose bytes go to another one.

    Args:
      port: where they go.
      speed: what the line does to them.
    """

    def __init__(self, port: int, speed: Speed = Speed()):
        self._target, self._speed = port, speed
        self.up = self.down = 0  # bytes: towards the port, and back
        self._loop, self._tasks, ready = asyncio.new_event_loop(), set[asyncio.Task[None]](), threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), daemon=True)
        self._thread.start()
        ready.wait()

    def _run(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        with socket.socket() as listening:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, WINDOW)  # those that are accepted have it, too
            listening.setblocking(False)
            listening.bind(("127.0.0.1", 0))
            listening.listen()
            self.port = int(listening.getsockname()[1])
            self._keep(self._accept(listening))
            ready.set()
            self._loop.run_forever()
            for task in (tasks := list(self._tasks)):
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self._loop.close()

    async def _accept(self, listening: socket.socket) -> None:
        while True:
            here, _ = await self._loop.sock_accept(listening)
            self._keep(self._serve(here))

    async def _serve(self, here: socket.socket) -> None:
        with here, socket.socket() as there:
            there.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, WINDOW)
            for one in (here, there):
                one.setblocking(False)
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with contextlib.suppress(OSError):
                await self._loop.sock_connect(there, ("127.0.0.1", self._target))
                await asyncio.gather(self._pump(here, there, "up"), self._pump(there, here, "down"))

    async def _pump(self, source: socket.socket, sink: socket.socket, way: str) -> None:
        """Reads as fast as the line sends; what is on its way waits in a queue."""
        pace, on_the_way = Pace(self._speed.megabits), asyncio.Queue[tuple[float, bytes]]()
        arrivals, delay = self._keep(self._arrive(on_the_way, sink)), self._speed.delay / 1e3
        with contextlib.suppress(OSError):
            while True:
                waited = False
                try:
                    data = source.recv(PIECE)
                except BlockingIOError:
                    waited, data = True, await self._loop.sock_recv(source, PIECE)
                if not data:
                    break
                leaves = pace.leaves(len(data), self._loop.time(), waited)
                on_the_way.put_nowait((leaves + delay, data))
                setattr(self, way, getattr(self, way) + len(data))
                await self._until(leaves)
        on_the_way.put_nowait((self._loop.time() + delay, b""))
        await arrivals

    async def _arrive(self, on_the_way: asyncio.Queue[tuple[float, bytes]], sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                when, data = await on_the_way.get()
                await self._until(when)
                if not data:
                    sink.shutdown(socket.SHUT_WR)
                    return
                await self._loop.sock_sendall(sink, data)

    def _keep(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)  # the loop by itself may forget it
        task.add_done_callback(self._tasks.discard)
        return task

    async def _until(self, when: float) -> None:
        if (left := when - self._loop.time()) > 0:
            await asyncio.sleep(left)

    def close(self) -> None:
        """Ends the line, and what goes over it."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

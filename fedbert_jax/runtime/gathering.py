"""The server before its clients are known: whoever calls waits until the roster is whole."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from fedbert_jax.runtime import frames
from fedbert_jax.runtime.calls import HEADER, POLL, Abort

TELL = 2.0  # seconds after which a client that waits is told for whom
LOST = 5.0  # seconds after which a client that calls no more is one that has gone


class Listening(Protocol):
    """A service that clients can reach, over whatever carries their calls."""

    where: str  # its address, to be shown

    def use(self, service: Any) -> None:
        """Lets another service answer from now on."""
        ...

    def stop(self) -> None:
        """Ends all calls."""
        ...


class Gathering:
    """The server before its clients are known: on the loopback, without a roster, whoever comes first takes part.

    The roster has to be whole before anything is drawn, since a client's place in it decides its draws.

    Args:
      names: the clients, if they are known.
      wanted: how many there will be.
      run: the training's name, which clients are told.
    """

    def __init__(self, names: tuple[str, ...], wanted: int, run: str = ""):
        self.run, self.wanted, self._names = run, wanted, names
        self._heard: dict[str, float | None] = {}  # when a client's last call ended; None while one waits
        self._changed = threading.Condition()
        self._stop = False

    @property
    def waiting(self) -> tuple[str, ...]:
        """Who has come."""
        with self._changed:
            return tuple(sorted(self._come()))

    def _come(self) -> set[str]:
        """Returns who is there: whoever has given up, or was killed, calls no more, and takes nobody's place."""
        now = time.monotonic()
        return {client for client, heard in self._heard.items() if heard is None or now - heard < LOST}

    def names(self) -> tuple[str, ...] | None:
        """Returns the roster, once it is whole: in the order of names, as the simulation has natural clients."""
        with self._changed:
            if not self._names and len(self._come()) >= self.wanted > 0:
                self._names = tuple(sorted(self._come()))
                self._changed.notify_all()
            return self._names or None

    def limit(self, method: str) -> int:
        """Returns how many bytes a call's frame may have.

        Raises:
          Abort: for a call that is too early, whatever its size: a client of before the server's restart may be in a round.
        """
        if method not in ("enrol", "status"):
            raise Abort("UNAVAILABLE", "the server waits for its clients")
        return HEADER

    def call(self, method: str, client: str, data: bytes, alive: Callable[[], bool] = lambda: True) -> bytes:
        """Answers `enrol` with the roster once it is whole, or with who is there so far; everything else is too early."""
        if method == "status":
            come = list(self.waiting)
            return frames.encode({"state": "gathering", "here": come, "wanted": self.wanted, "roster": list(self._names)})
        self.limit(method)
        with self._changed:
            if self._names and client not in self._names:
                raise Abort("PERMISSION_DENIED", f"{client!r} is not in the roster")
            if not self._names and client not in self._come() and len(self._come()) >= self.wanted:
                raise Abort("PERMISSION_DENIED", f"{client!r} comes too late: {self.wanted} clients are there already")
            self._heard[client] = None
            end = time.monotonic() + TELL
            while not self._names and alive() and not self._stop and time.monotonic() < end:
                self._changed.wait(POLL)
            self._heard[client] = time.monotonic()
            if not self._names and not alive():
                self._heard.pop(client, None)
            if self._stop and not self._names:
                raise Abort("UNAVAILABLE", "the server is stopping")
            if not self._names:
                return frames.encode({"roster": [], "run": self.run, "here": sorted(self._come()), "wanted": self.wanted})
            return frames.encode({"roster": list(self._names), "run": self.run})

    def stop(self) -> None:
        """Ends every call that waits."""
        with self._changed:
            self._stop = True
            self._changed.notify_all()

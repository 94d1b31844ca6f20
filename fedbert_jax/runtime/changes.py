"""One lock, and threads that wait for a change of what it guards: each is woken by what concerns it, and by nothing else.

Whoever is woken for nothing takes the processor, and Python's lock, from the thread that computes.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable
from types import TracebackType

from fedbert_jax.runtime.calls import POLL


class Changes:
    """A lock, held within `with`, and conditions by what they are about."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._about: dict[Hashable, threading.Condition] = {}

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._lock.release()

    def wait(self, about: Hashable) -> None:
        """Lets go of the lock until something changes about this, but for a moment (`POLL`) at most."""
        if about not in self._about:
            self._about[about] = threading.Condition(self._lock)
        self._about[about].wait(POLL)

    def tell(self, *about: Hashable) -> None:
        """Wakes those who wait for a change about any of these; without any, all who wait."""
        for one in about or tuple(self._about):
            if (condition := self._about.pop(one, None)) is not None:  # who goes on waiting makes another
                condition.notify_all()

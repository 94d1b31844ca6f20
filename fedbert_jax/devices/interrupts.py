"""Turns Ctrl-C and termination into a question that the round loop asks, instead of an exception at any moment."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

import jax

from fedbert_jax.devices import processes


class Interrupts:
    """Within `with`, the first SIGINT or SIGTERM sets `received`; the second ends the process at once.

    A thread other than the main one gets no signals.

    With several processes, `stop` and `settle` give all of them the same answer, whichever of them got the signal.

    Args:
      asked: whether somebody else wants an end, as SIGTERM would; signals are then left as they are, as they have to be in a
        thread.
    """

    def __init__(self, asked: Callable[[], bool] | None = None) -> None:
        self._received: int | None = None
        self._asked_elsewhere = asked
        self._own = False  # whether this process itself got a signal, rather than heard of one from another
        self._old: dict[int, Any] = {}
        self._consensus = processes.Consensus() if processes.several() else None
        self._asked: jax.Array | None = None

    def __enter__(self) -> Interrupts:
        own = self._asked_elsewhere is None and threading.current_thread() is threading.main_thread()
        for number in (signal.SIGINT, signal.SIGTERM) if own else ():
            self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    @property
    def received(self) -> int | None:
        """The first signal; None before it."""
        if self._received is None and self._asked_elsewhere is not None and self._asked_elsewhere():
            self._received = signal.SIGTERM
        return self._received

    @received.setter
    def received(self, number: int | None) -> None:
        self._received = number

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._own:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.received, self._own = number, True

    def request(self) -> None:
        """Asks for what the first SIGTERM asks for."""
        self.received = self.received or signal.SIGTERM

    def stop(self) -> bool:
        """Whether to begin no further round.

        With several processes, all hear of a signal one call late: the answer read here was requested before the round under
        way, so that nobody waits for that round.
        """
        if self._consensus is None:
            return self.received is not None
        asked, self._asked = self._asked, self._consensus.ask(self.received or 0)
        return asked is not None and int(asked) > 0

    def settle(self) -> int | None:
        """Returns the signal that any process has received so far, and sets `received` to it; waits for rounds under way."""
        if self._consensus is not None:
            self.received = int(self._consensus.ask(self.received or 0)) or None
        return self.received

    @property
    def exit_code(self) -> int:
        """130 for SIGINT, 143 for SIGTERM: 128 + the signal."""
        return 128 + (self.received or 0)

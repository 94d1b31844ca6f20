"""What a client says while it waits: for whom, for how long so far, and how long at most where that is known."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType

from fedbert_jax.runtime.participant import Line

AGAIN = 60.0  # seconds after which a wait is told again; then after as long as it has taken so far
LOOK, AFTER = 5.0, 10.0  # seconds between two looks at what a round waits for, and how long its answer may take before


class Waiting:
    """A client's waits, told in a line when they begin, and more and more rarely while they last.

    Args:
      say: prints a line.
      show: shows a text that is replaced by the next.
      clock: seconds, from anywhere.
    """

    def __init__(self, say: Callable[[str], None], show: Callable[[str], None], clock: Callable[[], float] = time.monotonic):
        self._say, self._show, self._clock = say, show, clock
        self._what: tuple[str, tuple[str, ...]] | None = None
        self._since = self._next = 0.0

    def waits(self, what: str, whom: Sequence[str], within: float | None) -> bool:
        """Tells that something waits.

        Args:
          what: such as "round 3".
          whom: for whom.
          within: seconds after which it goes on without them; None: it doesn't.

        Returns:
          Whether this wait is a new one.
        """
        now, which = self._clock(), (what, tuple(whom))
        new = which != self._what
        if new:
            self._what, self._since, self._next = which, now, now
        names = ", ".join(whom[:3]) + (f" and {len(whom) - 3} more" if len(whom) > 3 else "")
        so_far = now - self._since
        text = f"waits for {names or 'the others'}" + (f", {so_far:.0f} s so far" if so_far >= 1 else "")
        if whom:
            text += "; it doesn't go on without" if within is None else f"; it goes on without in {within:.0f} s"
        self._show(text)
        if now >= self._next:
            self._say(f"{what} {text}")
            self._next = now + max(AGAIN, so_far)
        return new

    def over(self) -> None:
        """Nothing is waited for any more."""
        self._what = None


class Watch:
    """Within `with`, asks the server for whom a round waits, whenever an answer takes long.

    Args:
      line: what carries the client's messages.
      name: the client's.
      waiting: tells it.
    """

    def __init__(self, line: Line, name: str, waiting: Waiting, look: float = LOOK, after: float = AFTER):
        self._line, self._name, self._waiting, self._look, self._after = line, name, waiting, look, after
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fedbert-watch", daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(self._look):
            took = self._line.asked_for()
            found = self._line.status() if took is not None and took >= self._after else None
            late = [] if found is None else [c for c in found.get("late", ()) if c != self._name]
            if found is not None and late and self._line.asked_for() is not None:
                self._waiting.waits(f"round {found['round'] + 1}", late, found.get("within"))

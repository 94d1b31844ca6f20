"""How a preparation reports its progress."""

from __future__ import annotations

import logging
from typing import Protocol

log = logging.getLogger(__name__)


class Progress(Protocol):
    """Is called as each stage begins, and then with how much of it is done."""

    def stage(self, text: str, unit: str = "", total: int | None = None) -> None:
        """Begins a stage, which ends the one before it.

        Args:
          text: what is being done.
          unit: what is counted, in the plural; "" if nothing is.
          total: how many units there are, if known.
        """

    def count(self, done: int) -> None:
        """Reports how many of the stage's units are done so far; called often."""


class Logged:
    """Writes stages to the log, without counts."""

    def stage(self, text: str, unit: str = "", total: int | None = None) -> None:
        """Logs what is being done."""
        log.info(text)

    def count(self, done: int) -> None:
        """Does nothing."""

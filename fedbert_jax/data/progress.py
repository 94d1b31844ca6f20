"""How a preparation tells how far it is."""

from __future__ import annotations

import logging
from typing import Protocol

log = logging.getLogger(__name__)


class Progress(Protocol):
    """What is told: a stage as it begins, and then how much of it is done."""

    def stage(self, text: str, unit: str = "", total: int | None = None) -> None:
        """A stage begins, and so the one before it has ended.

        Args:
          text: what is being done.
          unit: what is counted, in the plural; "" if nothing is.
          total: how many there are, if that is known.
        """

    def count(self, done: int) -> None:
        """So many of the stage's units are done by now; called often."""


class Logged:
    """Writes stages to the log and no counts."""

    def stage(self, text: str, unit: str = "", total: int | None = None) -> None:
        """Logs what is being done."""
        log.info(text)

    def count(self, done: int) -> None:
        """Does nothing."""

"""A trace of some rounds, for TensorBoard's or Perfetto's viewer: `profile=START:STOP`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from fedbert_jax import disk


class Profile:
    """Traces rounds START to STOP, both included and counted as in metrics.jsonl.

    The parts of a step are named mask, embed, uplink, transform, downlink, predict and update; the averaging is named
    aggregate.

    Args:
      span: "START:STOP", or "" for no trace.
      directory: where the trace goes.
    """

    def __init__(self, span: str, directory: Path):
        first, _, last = span.partition(":")
        self.first, self.last = (int(first), int(last)) if span else (0, 0)
        self.directory = directory
        self.tracing = self.written = False

    def before(self, round: int, state: Any) -> None:
        """Begins the trace before the first of its rounds, or at once if a resumed run begins among them."""
        if self.first <= round <= self.last and not self.tracing:
            jax.block_until_ready(state)  # so that the trace leaves out earlier rounds
            jax.profiler.start_trace(self.directory)
            self.tracing = True

    def after(self, round: int, state: Any) -> None:
        """Ends the trace when the last of its rounds has been dispatched."""
        if round == self.last:
            self.close(state)

    def close(self, state: Any) -> None:
        """Writes the trace, if one is under way."""
        if self.tracing:
            jax.block_until_ready(state)
            with disk.writing(self.directory):
                jax.profiler.stop_trace()
            self.tracing, self.written = False, True

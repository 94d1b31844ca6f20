"""Counts what JAX and torch compile, so that a measurement that included a compilation can be refused."""

from __future__ import annotations

import sys

_jax_compilations = 0
_listening = False


def compilations() -> int:
    """Returns how many programs JAX (since the first call) and torch.compile have compiled in this process."""
    global _listening
    if "jax" in sys.modules and not _listening:
        import jax

        jax.monitoring.register_event_duration_secs_listener(_note)
        _listening = True
    graphs = 0
    if "torch._dynamo.utils" in sys.modules:
        graphs = sys.modules["torch._dynamo.utils"].counters["stats"]["unique_graphs"]
    return _jax_compilations + graphs


def _note(event: str, duration: float, **_: object) -> None:
    global _jax_compilations
    _jax_compilations += event == "/jax/core/compile/backend_compile_duration"

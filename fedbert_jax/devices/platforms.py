"""The platform that JAX runs on: printed at the start, or one sentence if the one asked for isn't there.

Importing this module doesn't import JAX.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING

from fedbert_jax.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

JAX_STARTS_IN = "jax._src.xla_bridge"  # the module that finds devices, and warns of those that it can't use


def start() -> str | None:
    """Starts JAX's devices.

    Returns:
      None, or a sentence about a platform that JAX_PLATFORMS asks for but JAX passed over.

    Raises:
      ConfigError: if the platform that JAX_PLATFORMS asks for isn't there, or doesn't start.
    """
    import jax

    try:
        used = jax.devices()[0].platform
    except Exception as error:
        raise explain(error) or error from error
    for name in _asked():
        try:
            jax.devices(name)
        except RuntimeError:
            return f"JAX_PLATFORMS={_setting()!r} asks for {name}, which isn't there; this runs on {used}."
    return None


def introduce(console: Console, used: Callable[[], int]) -> None:
    """Starts JAX's devices and prints which they are; `used` returns how many of them are used.

    Raises:
      ConfigError: as `start` does.
    """
    if passed_over := start():
        console.print(f"warning: {passed_over}", style="yellow", markup=False, highlight=False)
    console.print(f"on {describe(used())}", style="dim", markup=False, highlight=False)


def describe(devices: int | None = None) -> str:
    """Returns the devices in words, "1 x cpu" or "8 x NVIDIA H100 80GB HBM3 (gpu)"; starts them if need be.

    Args:
      devices: how many of them are used; None: all of them.
    """
    import jax

    first, there = jax.devices()[0], jax.device_count()
    count = f"{there}" if devices in (None, there) else f"{devices} of {there}"
    kind = first.device_kind if first.device_kind.lower() == first.platform else f"{first.device_kind} ({first.platform})"
    processes = f", in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{count} x {kind}{processes}"


def explain(error: BaseException) -> ConfigError | None:
    """Returns a sentence for an error that JAX raises when it starts its devices; None for any other error."""
    frames = [frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__)]
    if not isinstance(error, (RuntimeError, AssertionError)) or not frames or frames[-1] != JAX_STARTS_IN:
        return None
    said = " ".join(str(error).split()).partition(" (set JAX_PLATFORMS")[0].rstrip(".")  # what to do is said below
    why = f" ({said[:300]})" if said else ""
    if setting := _setting():
        return ConfigError(f"JAX_PLATFORMS={setting!r}: there is no such platform here{why}; unset it, or give one that is.")
    return ConfigError(f"JAX can't start its devices{why}; JAX_PLATFORMS=cpu runs without them.")


def tell_what_is_unused() -> None:
    """Makes JAX's warnings when it starts its devices, above all of a GPU that it can't use, print as a line on stderr."""
    logger = logging.getLogger(JAX_STARTS_IN)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    logger.addHandler(_Lines())


class _Lines(logging.Handler):
    """Prints a warning as one plain line."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"warning: {' '.join(record.getMessage().split())}", file=sys.stderr, flush=True)


def _setting() -> str:
    import jax

    return os.environ.get("JAX_PLATFORMS") or jax.config.jax_platforms or ""  # type: ignore[attr-defined]


def _asked() -> list[str]:
    return [name.strip() for name in _setting().split(",") if name.strip()]

"""FedBERT in JAX: organisations that may not share text pre-train one BERT together."""

import importlib
import os
import signal
import sys
from types import FrameType
from typing import Any

__all__ = [
    "STOP",
    "Config",
    "Run",
    "UserError",
    "compare_runs",
    "finetune_on_glue",
    "load_config",
    "register",
    "register_attack",
    "register_channel",
]
__version__ = "0.1.0"


def register(name: str, *, clients: str, client: str, body: str, cut: bool = True) -> None:
    """Adds the strategy `federated.strategy=name` in this process: who steps with whom, and who holds what.

    Call it before the config is read, for example in a config file.

    Args:
      name: text that can be printed.
      clients: `together`, `pooled`, `apart` or `in turn`; `fedbert_jax.config.Arrangement` says what each is.
      client: how the client segment is held: `one`, `copies` or `own`.
      body: how the server's layers are held.
      cut: whether the four messages of a step cross.

    Raises:
      ValueError: if no round can follow such a row, the name can't be printed, or another strategy has it.
    """
    config = importlib.import_module("fedbert_jax.config")  # imported here, since any module may import this one
    config.register(name, config.Arrangement(clients, client, body, cut))


def __getattr__(name: str) -> Any:
    """Imports what scripts call when it is first asked for: commands have to read their arguments first, and fast."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("fedbert_jax.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def exit_on_interrupt() -> None:
    """Makes Ctrl-C end the process at once: for imports, where an exception would get lost or end in a traceback."""

    def stop(number: int, frame: FrameType | None) -> None:
        os.write(2, b"interrupted\n")
        os._exit(128 + number)

    signal.signal(signal.SIGINT, stop)


if sys.argv[0] == "-m":  # `python -m fedbert_jax.main` is looking for `main`, whose imports come next
    exit_on_interrupt()

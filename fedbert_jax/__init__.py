"""FedBERT in JAX: organisations that may not share text pre-train one BERT together."""

import importlib
import os
import signal
import sys
from types import FrameType

__version__ = "0.1.0"


def register(name: str, *, clients: str, client: str, body: str, cut: bool = True) -> None:
    """Makes `federated.strategy=name` a strategy, in this process: a row of who steps with whom, and who holds what.

    Call it before the config is read, in a config file for example. `fedbert_jax.config.Arrangement` says what each argument
    means and takes.

    Raises:
      ValueError: if no round goes by such a row, or there is another strategy of that name.
    """
    config = importlib.import_module("fedbert_jax.config")  # which, like all modules, may import this one
    config.register(name, config.Arrangement(clients, client, body, cut))


def exit_on_interrupt() -> None:
    """Makes Ctrl-C end the process there and then: for imports, in which an exception gets lost or ends in a traceback."""

    def stop(number: int, frame: FrameType | None) -> None:
        os.write(2, b"interrupted\n")
        os._exit(128 + number)

    signal.signal(signal.SIGINT, stop)


if sys.argv[0] == "-m":  # `python -m fedbert_jax.main` is looking for `main`, and its imports come next
    exit_on_interrupt()

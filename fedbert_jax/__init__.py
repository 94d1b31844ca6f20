"""FedBERT in JAX: organisations that may not share text pre-train one BERT together."""

import os
import signal
import sys
from types import FrameType

__version__ = "0.1.0"


def exit_on_interrupt() -> None:
    """Makes Ctrl-C end the process there and then: for imports, in which an exception gets lost or ends in a traceback."""

    def stop(number: int, frame: FrameType | None) -> None:
        os.write(2, b"interrupted\n")
        os._exit(128 + number)

    signal.signal(signal.SIGINT, stop)


if sys.argv[0] == "-m":  # `python -m fedbert_jax.main` is looking for `main`, and its imports come next
    exit_on_interrupt()

"""The outer edge of every command: a user's mistake becomes one sentence and an exit code, and Ctrl-C one word."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn

from fedbert_jax import disk, exit_on_interrupt
from fedbert_jax.console.output import lenient_streams, shown
from fedbert_jax.devices import platforms
from fedbert_jax.errors import UserError

INTERRUPTED = 128 + signal.SIGINT
_called = ""  # the command's name, if it was called as `fedbert NAME`


def called(name: str) -> None:
    """Notes that the command was called as `fedbert NAME`."""
    global _called
    _called = name


def program(module: str) -> str:
    """Returns how the command of a module was called, for its usage: `fedbert NAME` or `python -m fedbert_jax.MODULE`."""
    return f"fedbert {_called}" if _called else f"python -m fedbert_jax.{module}"


def usage(text: str | None, module: str) -> str:
    """Returns a module's docstring, with its command as it was called."""
    return (text or "").replace(f"python -m fedbert_jax.{module}", program(module))


class Parser(argparse.ArgumentParser):
    """Reads a command line; a mistake in it is a `UserError`, and ends no process by itself."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `{self.prog} --help` lists the arguments.")


def run(command: Callable[[], int | None]) -> None:
    """Runs a command and ends the process with its exit code, the `UserError`'s (2 for most), or 130 for Ctrl-C.

    Only an unforeseen error gets a traceback.
    """
    exit_on_interrupt()
    lenient_streams()
    quieten()
    try:
        with foreseen():
            try:
                code = command() or 0
            except SystemExit as e:  # from argparse, after --help or a mistake
                code = _code_of(e)
            say(end="")  # writes out what is left in the buffer
    except (UserError, KeyboardInterrupt, BrokenPipeError) as e:
        code = tell(e)
    sys.exit(code)


@contextlib.contextmanager
def foreseen() -> Iterator[None]:
    """Within `with`, turns a failure of the machine into one sentence: a full disk, a JAX platform that isn't there."""
    try:
        yield
    except BrokenPipeError:
        raise
    except Exception as error:
        if (said := disk.explain(error) or platforms.explain(error)) is None:
            raise
        raise said from error


def tell(error: BaseException) -> int:
    """Prints what ended a command and returns its exit code; only an unforeseen error gets a traceback."""
    if isinstance(error, UserError):
        _tell_no_more()
        for stream, text in ((sys.stdout, ""), (sys.stderr, f"error: {shown(str(error))}\n")):
            try:
                stream.write(text)
                stream.flush()
            except OSError:  # full or closed: Python would try again at exit, and complain
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            except (AttributeError, ValueError):  # the stream is missing, or already closed
                pass
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C during cleanup ends the process silently
        _tell_no_more()
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):  # the pipe's reader has gone: there is nobody to tell
        _close_stdout()
    else:
        traceback.print_exception(error)
    return 1


def raise_on_interrupt() -> None:
    """Makes Ctrl-C raise KeyboardInterrupt, so that work under way is undone and the terminal's cursor comes back.

    Until a command calls this, Ctrl-C ends the process at once (`exit_on_interrupt`): it has only imported modules so far.
    """

    def lost(what: sys.UnraisableHookArgs) -> None:
        if isinstance(what.exc_value, KeyboardInterrupt):  # raised in a callback, from which it can't propagate
            os.write(2, b"interrupted\n")
            os._exit(INTERRUPTED)
        sys.__unraisablehook__(what)

    sys.unraisablehook = lost
    signal.signal(signal.SIGINT, signal.default_int_handler)


# --- the process's surroundings ---------------------------------------------------------------------------------------


def _code_of(stop: SystemExit) -> int:
    if stop.code is None or isinstance(stop.code, int):
        return stop.code or 0
    print(stop.code, file=sys.stderr)
    return 1


def say(text: str = "", end: str = "\n") -> None:
    """Prints text and flushes it at once, while a failure can still be reported.

    Raises:
      UserError: if it can't be written.
      BrokenPipeError: if nobody reads the output any more.
    """
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        raise
    except OSError as e:
        _close_stdout()
        raise UserError(f"what the command prints can't be written ({e.strerror}).") from e


def _close_stdout() -> None:
    """Discards what could not be written; Python would try again at exit, and complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _tell_no_more() -> None:
    """Silences what fails while the process ends, such as a checkpoint's other arrays where one can't be read or written."""
    import warnings

    warnings.simplefilter("ignore")  # of coroutines that nobody awaits any more
    sys.excepthook = lambda *_: None
    sys.unraisablehook = lambda _: None
    logging.disable()


def quieten() -> None:
    """Leaves the terminal, or the log, to the run: libraries log errors only."""
    import warnings

    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.ERROR)
    absl_logging.set_stderrthreshold("error")
    for name in ("jax", "orbax", "transformers", "datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    platforms.tell_what_is_unused()
    warnings.filterwarnings("ignore", module="orbax")
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")  # works without the cache
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # it would log every connection that is lost
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

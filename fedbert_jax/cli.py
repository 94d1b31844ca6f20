"""The edge of every command: a user's mistake becomes one sentence and an exit code, and Ctrl-C one word."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator

from fedbert_jax import disk, exit_on_interrupt
from fedbert_jax.console.output import lenient_streams, shown
from fedbert_jax.devices import platforms
from fedbert_jax.errors import UserError

INTERRUPTED = 128 + signal.SIGINT


def run(command: Callable[[], int | None]) -> None:
    """Runs a command and ends the process: 0 or what the command returns, 2 for a user's mistake, 130 for Ctrl-C.

    A traceback is for errors that nobody foresaw.
    """
    exit_on_interrupt()
    lenient_streams()
    _quieten()
    try:
        with foreseen():
            try:
                code = command() or 0
            except SystemExit as e:  # argparse's, after --help or a mistake
                code = _code_of(e)
            say(end="")  # what is left in the buffer
    except (UserError, KeyboardInterrupt, BrokenPipeError) as e:
        code = tell(e)
    sys.exit(code)


@contextlib.contextmanager
def foreseen() -> Iterator[None]:
    """Within `with`, what a machine refuses becomes one sentence: a full disk, a platform of JAX's that isn't there."""
    try:
        yield
    except BrokenPipeError:
        raise
    except Exception as error:
        if (said := disk.explain(error) or platforms.explain(error)) is None:
            raise
        raise said from error


def tell(error: BaseException) -> int:
    """Prints what ended a command and returns its exit code; only an error that nobody foresaw gets a traceback."""
    if isinstance(error, UserError):
        _tell_no_more()
        for stream, text in ((sys.stdout, ""), (sys.stderr, f"error: {shown(str(error))}\n")):
            try:
                stream.write(text)
                stream.flush()
            except OSError:  # full, or closed: Python would try again at its end, and complain
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            except (AttributeError, ValueError):  # there is no such stream, or no longer
                pass
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one while threads and files are closed: at once, silently
        _tell_no_more()
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):  # the reader of a pipe has gone: nobody to tell
        _close_stdout()
    else:
        traceback.print_exception(error)
    return 1


def raise_on_interrupt() -> None:
    """Makes Ctrl-C raise KeyboardInterrupt, so that what is under way is undone and the terminal's cursor comes back.

    Until a command says so, Ctrl-C ends the process at once (`exit_on_interrupt`): it has only imported modules.
    """

    def lost(what: sys.UnraisableHookArgs) -> None:
        if isinstance(what.exc_value, KeyboardInterrupt):  # it came in a callback, from which it can't get any further
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
    """Prints something and writes it out at once, while what goes wrong with that can still be told.

    Raises:
      UserError: if it can't be written.
      BrokenPipeError: if nobody reads it any more.
    """
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        raise
    except OSError as e:
        _close_stdout()
        raise UserError(f"what the command prints can't be written ({e.strerror}).") from e


def _close_stdout() -> None:
    """Lets go of what could not be written; Python would try again at the end, and complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _tell_no_more() -> None:
    """Silences what ends with the process: of a damaged checkpoint, the reads of its other arrays."""
    sys.excepthook = lambda *_: None
    sys.unraisablehook = lambda _: None
    logging.disable()


def _quieten() -> None:
    """Leaves the terminal to the run: libraries speak up from errors on."""
    import warnings

    from absl import logging as absl_logging

    absl_logging.set_verbosity(absl_logging.ERROR)
    absl_logging.set_stderrthreshold("error")
    for name in ("jax", "orbax", "transformers", "datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    platforms.tell_what_is_unused()
    warnings.filterwarnings("ignore", module="orbax")
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache")  # a cache can do without
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

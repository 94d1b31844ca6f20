"""The edge: flags become a `Config`, and a user's mistake becomes one sentence and an exit code."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from absl import flags

from fedbert_jax import disk, platforms
from fedbert_jax.config import Config, all_keys, from_dict, kind_of, unknown_key
from fedbert_jax.errors import ConfigError, UserError


def run(command: Callable[[], None]) -> None:
    """Runs a command and ends the process: 0, 2 for a user's mistake, 130 for Ctrl-C; never with a traceback for these."""
    _quieten()
    try:
        with foreseen():
            command()
    except (UserError, KeyboardInterrupt, BrokenPipeError) as e:
        sys.exit(tell(e))


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
        for stream, text in ((sys.stdout, ""), (sys.stderr, f"error: {error}\n")):
            try:
                stream.write(text)
                stream.flush()
            except OSError:  # full, or closed: Python would try again at its end, and complain
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return 130
    if isinstance(error, BrokenPipeError):  # the reader of a pipe has gone: nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    else:
        traceback.print_exception(error)
    return 1


def _tell_no_more() -> None:
    """Silences what ends with the process: of a damaged checkpoint, the reads of its other arrays."""
    sys.excepthook = lambda *_: None
    sys.unraisablehook = lambda _: None
    logging.disable()


def parse_flags(argv: list[str], usage: str) -> list[str]:
    """Parses absl flags, `--config.KEY=VALUE` overrides among them.

    Args:
      argv: the command line.
      usage: printed with --help.

    Returns:
      The positional arguments.

    Raises:
      ConfigError: for an unknown flag or key, or a value of the wrong type, in one sentence.
    """
    if any(a in ("-h", "--help", "-help") for a in argv[1:]):
        print(usage.strip())
        sys.exit(0)
    try:
        return flags.FLAGS(argv)[1:]
    except AttributeError as e:
        raise _bad_key(argv, e) from e
    except (flags.Error, TypeError, ValueError, KeyError) as e:
        text = " ".join(str(e).split())
        for arg in argv:
            key, _, value = arg.removeprefix("--").removeprefix("config.").partition("=")
            if arg.startswith("--config.") and key in text and key in all_keys():
                kind = kind_of(key)
                why = f"accepted: {kind}" if kind else text.split(": ", 1)[-1]
                raise ConfigError(f"config key {key}={value!r}: {why}.") from e
        raise ConfigError(f"{text}; see --help.") from e
    except Exception as e:  # the config file's own code runs here
        raise ConfigError(f"the config file fails: {type(e).__name__}: {e}") from e


def load_config(value: Any) -> Config:
    """Validates what `--config FILE.py` returned.

    Raises:
      ConfigError: if the file is missing, fails, or has a key or value that can't be used.
    """
    if value is None:
        raise ConfigError("no config given; accepted: --config configs/NAME.py.")
    try:
        to_dict = value.to_dict
    except FileNotFoundError as e:
        raise ConfigError(f"config file {e.filename} does not exist.") from e
    except Exception as e:  # config_flags puts off a file's own errors until its value is used
        raise ConfigError(f"the config file fails: {type(e).__name__}: {e}") from e
    return from_dict(to_dict())


def _bad_key(argv: list[str], error: Exception) -> ConfigError:
    known = all_keys()
    for arg in argv:
        key = arg.removeprefix("--config.").partition("=")[0]
        if arg.startswith("--config.") and key not in known:
            return unknown_key(key)
    return ConfigError(
        f"the config file lacks a key that the command line sets ({' '.join(str(error).split())}); "
        "begin the file with fedbert_jax.config.default_config()."
    )


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

"""Calls the datasets library quietly, and turns its errors into sentences that tell a user what to fix."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import warnings
from collections.abc import Iterator

from fedbert_jax.data.names import printable
from fedbert_jax.data.rows import listed
from fedbert_jax.errors import UserError

# Errors of the machine, which are reported in the system's own words.
_LOCAL = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE}
_CONFIGS = re.compile(r"BuilderConfig .* not found\. Available: \[(.*?)\]|available configs: \[(.*?)\]")
_REASONS = (  # (names of the classes of an error or its causes, the reason to give)
    (
        "ConnectionError OfflineModeIsEnabled TransportError LocalEntryNotFoundError",
        "no file or folder here has this name, the Hugging Face hub cannot be reached, and no copy of it is here",
    ),
    (
        "DatasetNotFoundError RepositoryNotFoundError HFValidationError",
        "no file or folder here has this name, and no dataset of the Hugging Face hub (or none that you have been let into: "
        "`hf auth login` tells it who you are)",
    ),
    ("EmptyDatasetError DataFilesNotFoundError", "it has no data file of a format that is known"),
    ("CastError DatasetGenerationCastError", "its files do not have the same columns"),
    ("ChecksumVerificationError SplitsVerificationError", "what was downloaded is not what its description says"),
    (
        "DatasetGenerationError ArrowException JSONDecodeError UnicodeDecodeError ParserError EmptyDataError"
        " BadZipFile LZMAError EOFError",
        "a file of it is damaged, or something else than its name says",
    ),
    ("FileNotFoundError KeyError OSError", "a file of it is missing or damaged"),
)


@contextlib.contextmanager
def loading(what: str) -> Iterator[None]:
    """Within `with`, keeps progress bars, warnings and log lines of the library and its helpers off the terminal.

    Raises:
      UserError: for any error of the library; its sentence begins with `what`.
    """
    import datasets
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    bars, hub_bars = datasets.is_progress_bar_enabled(), not are_progress_bars_disabled()
    level = logging.root.manager.disable
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            datasets.disable_progress_bars()
            disable_progress_bars()
            logging.disable(logging.CRITICAL)
            yield
    except Exception as error:  # loaders raise whatever their formats raise
        raise UserError(f"{what} cannot be loaded: {_reason(error)}.") from error
    finally:
        logging.disable(level)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about environment variables that decide it
            if bars:
                datasets.enable_progress_bars()
            if hub_bars:
                enable_progress_bars()


def _reason(error: BaseException) -> str:
    errors: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in errors:
        errors.append(cause)
        cause = cause.__cause__ or cause.__context__
    for e in errors:
        if isinstance(e, OSError) and e.errno in _LOCAL:
            return os.strerror(e.errno) + (f" ({printable(str(e.filename))})" if e.filename else "")
        if isinstance(e, ImportError) and e.name:
            return f"its format needs the package {e.name}, which is not installed"
    said = " ".join(" ".join(map(str, errors)).split())
    if "is a gated dataset" in said:
        return "its owner decides who may have it: ask on its page of the hub, and tell the hub who you are: `hf auth login`"
    if "scripts are no longer supported" in said:
        return "it is a Python script, which is never executed; accepted: a dataset of data files"
    if configs := _CONFIGS.search(said):
        names = re.findall(r"'(.*?)'", configs[1] or configs[2])
        return f"NAME must be followed by a /CONFIG that it has; there are: {listed(names)}"
    if needed := re.search(r"(\w+) needs to be installed", said):
        return f"its format needs {needed[1]}, which is not installed"
    if "infer the same data file format" in said:
        return "its files are of different formats; accepted: files of one format, or one of its files"
    classes = {kind.__name__ for e in errors for kind in type(e).__mro__}
    reasons = (reason for names, reason in _REASONS if not classes.isdisjoint(names.split()))
    return next(reasons, f"the datasets library stops with {type(error).__name__}")

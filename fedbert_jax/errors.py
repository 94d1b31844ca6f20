"""The errors that a user can fix, printed as one sentence and never as a traceback."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class UserError(Exception):
    """A mistake in the given configuration, data or files; its text is one sentence for the user."""

    exit_code = 2


class ConfigError(UserError):
    """A configuration value that cannot be used; the text names the key, the value and what is accepted."""


class DivergedError(UserError):
    """A loss, a gradient, a score or a parameter is not finite. Whatever was saved before stays."""

    exit_code = 3


class StoppedError(UserError):
    """A federation's server has stopped before the last round, or too few clients are left for another one."""

    exit_code = 4


class DiskError(UserError):
    """A file could not be written (or read) because of the disk; the text says which file, why, and what to do."""


@contextlib.contextmanager
def about(what: str) -> Iterator[None]:
    """Prefixes a `UserError` with the setting at fault ("config key model.init_from", "--tasks"), unless it names that."""
    try:
        yield
    except UserError as error:
        if what.removeprefix("config key ") in str(error):
            raise
        raise type(error)(f"{what}: {error}") from error

"""The errors a person can mend: printed as one sentence, never as a traceback."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class UserError(Exception):
    """A mistake in the configuration, the data or the files given; its text is one sentence for the person who made it."""

    exit_code = 2


class ConfigError(UserError):
    """A configuration value that cannot be used; names the key, the value and what is accepted."""


class DivergedError(UserError):
    """Something is not finite: a loss, a gradient, a score, a parameter. What was kept before it stays."""

    exit_code = 3


class DiskError(UserError):
    """A file could not be written (or read), because of the disk; its text says which, why, and what to do."""


@contextlib.contextmanager
def about(what: str) -> Iterator[None]:
    """Puts what a person set ("config key model.init_from", "--tasks") before an error of theirs that doesn't name it."""
    try:
        yield
    except UserError as error:
        if what.removeprefix("config key ") in str(error):
            raise
        raise type(error)(f"{what}: {error}") from error

"""The errors a person can mend: printed as one sentence, never as a traceback."""

from __future__ import annotations


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

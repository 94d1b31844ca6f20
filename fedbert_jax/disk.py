"""Disk errors: whoever was writing, one becomes a sentence that names the place and the reason, with exit code 2.

Libraries in other languages raise errors of their own with the system's error number in the text; these are recognised, too.
"""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from fedbert_jax.errors import DiskError, UserError

AGAIN = "and run the same command again"
# The system's error numbers: the reason in plain words, and the remedy.
FULL = {
    errno.ENOSPC: ("no space is left there", "make room"),
    errno.EDQUOT: ("the quota there is used up", "make room"),
    errno.EFBIG: ("a file would be larger than is allowed there", "raise the limit (ulimit -f)"),
    errno.EROFS: ("the file system is read-only", "make it writable"),
}  # only writing raises these
OTHERS = {
    errno.EACCES: ("permission is denied", "allow it"),
    errno.EPERM: ("the system doesn't permit it", "allow it"),
    errno.EIO: ("the device reports an input/output error", "see to the device"),
    errno.ESTALE: ("its network file system has lost it", "mount that again"),
    errno.ENOTCONN: ("its file system is not connected", "mount that again"),
    errno.ENODEV: ("its device is gone", "bring that back"),
    errno.ENXIO: ("its device is gone", "bring that back"),
}
REASONS = FULL | OTHERS
# "(os error 28)" is Rust's (tokenizers, safetensors), "os_error_code='28'" and "[OS error 28: ...]" are tensorstore's.
NUMBERED = re.compile(r"os[ _]error(?:_code)?[ =:']+(\d+)", re.IGNORECASE)


@contextlib.contextmanager
def writing(place: str | os.PathLike[str]) -> Iterator[None]:
    """Within `with`, turns a disk error into a `DiskError` that names `place`; other errors pass."""
    try:
        yield
    except Exception as error:
        if (said := explain(error, place)) is None:
            raise
        raise said from error


def write_atomically(path: Path, data: str | bytes) -> None:
    """Writes a file so that a kill at any moment leaves either the old one or the new one, on the disk when this returns.

    Raises:
      DiskError: if it can't be written; the old file stays.
    """
    with replacing(path) as new:
        new.write_bytes(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Within `with`, a file is written beside its place (the path that this gives); then it takes the place, atomically.

    Raises:
      DiskError: if it can't be written; the old file stays.
    """
    new = path.with_name(path.name + ".new")
    with writing(path):
        try:
            yield new
            with new.open("r+b") as file:  # Windows brings to the disk only what may be written
                os.fsync(file.fileno())
            os.replace(new, path)
        except Exception:
            new.unlink(missing_ok=True)
            raise
        if os.name != "nt":  # Windows opens no directories
            directory = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(directory)  # the rename itself is on the disk only when the directory is
            finally:
                os.close(directory)


def lock(file: int | IO[bytes]) -> None:
    """Locks an open file until it is closed or its process ends, however that ends.

    Args:
      file: the file, or its descriptor. A directory can be locked, too, but not on Windows.

    Raises:
      BlockingIOError: if another process has locked it.
      OSError: if its file system has no locks.
    """
    if os.name == "nt":
        windows = importlib.import_module("msvcrt")
        descriptor = file if isinstance(file, int) else file.fileno()
        os.lseek(
            descriptor, 1 << 30, os.SEEK_SET
        )  # nobody reads there; Windows would keep others from reading what is locked
        try:
            windows.locking(descriptor, windows.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError(errno.EAGAIN, "locked by another process") from error
    else:
        unix = importlib.import_module("fcntl")
        unix.flock(file, unix.LOCK_EX | unix.LOCK_NB)


def explain(error: BaseException, place: str | os.PathLike[str] | None = None) -> DiskError | None:
    """Returns a disk error as a sentence; None for any other error, and for one that already is a sentence (`UserError`).

    Args:
      error: as it was raised; the errors that it was raised from are looked at, too.
      place: what was being written; None if that is not known. If the error names a file elsewhere, that is named instead.
    """
    chain = _chain(error)
    if any(isinstance(e, UserError) for e in chain):
        return None
    for found in chain:
        number = _number(found)
        if number is None:
            continue
        reason, remedy = REASONS[number]
        file = found.filename if isinstance(found, OSError) else None
        if isinstance(file, (str, bytes)) and (place is None or not _beside(os.fsdecode(file), place)):
            place = os.fsdecode(file)
        verb = "written" if number in FULL else "read or written"
        name = place if place is not None else "a file of this command"
        return DiskError(f"{name} can't be {verb}: {reason}; {remedy} {AGAIN}.")
    return None


def _beside(file: str, place: str | os.PathLike[str]) -> bool:
    """Whether a file lies in a place, or in the directory that holds it (as temporary files do)."""
    return Path(place).absolute().parent in Path(file).absolute().parents


def _chain(error: BaseException) -> list[BaseException]:
    """Returns the error, its members if it is a group, and the errors that it was raised from or while handling."""
    found: list[BaseException] = []
    pending: list[BaseException | None] = [error]
    while pending:
        one = pending.pop(0)
        if one is not None and all(one is not other for other in found):
            found.append(one)
            pending += [*(one.exceptions if isinstance(one, BaseExceptionGroup) else ()), one.__cause__, one.__context__]
    return found


def _number(error: BaseException) -> int | None:
    """Returns the system's error number if the disk is to blame, else None."""
    if isinstance(error, OSError):
        return error.errno if error.errno in REASONS else None
    text = str(error)
    numbers = [int(n) for n in NUMBERED.findall(text)]
    numbers += [n for n in FULL if os.strerror(n) in text]
    return next((n for n in numbers if n in REASONS), None)

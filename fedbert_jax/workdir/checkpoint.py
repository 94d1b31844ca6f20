"""Checkpoints: a run's whole state, saved by orbax in the background, atomically, and restored bit for bit."""

from __future__ import annotations

import contextlib
import gc
import logging
import shutil
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from fedbert_jax import disk
from fedbert_jax.devices import processes, tuning
from fedbert_jax.errors import DiskError, DivergedError, UserError
from fedbert_jax.federated.finite import not_finite

CHECKSUMS = "checksums"
OTHER_FIELDS = "tree structures do not match"  # what orbax says


class Checkpoints:
    """The `checkpoints/` of a workdir, open.

    Args:
      directory: made if absent. Remains of an interrupted save are removed.
      keep: how many of the newest checkpoints to keep; None opens for reading.
    """

    def __init__(self, directory: Path, keep: int | None = None):
        self.directory = directory
        self._saving: int | None = None  # the round whose save is, or may be, under way
        self._hushed = contextlib.ExitStack()
        self._options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=keep is not None, read_only=keep is None, enable_async_checkpointing=True
        )
        with disk.writing(directory):
            self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(self.directory.absolute(), item_names=("state", "meta"), options=self._options)

    def rounds(self) -> list[int]:
        """Returns the finished rounds at which there is a checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, round: int, state: Any, meta: dict[str, Any]) -> None:
        """Begins to save the state after `round` finished rounds; returns when `state` may be overwritten.

        Args:
          round: the checkpoint's number. An existing checkpoint is left as it is.
          state: pytree of arrays, all of whose numbers are finite (`finite.not_finite`).
          meta: values that JSON can hold.

        Raises:
          DiskError: if this or the previous save can't be written; earlier checkpoints stay.
        """
        self.wait()
        if round in self._manager.all_steps():
            return
        if tuning.saves_from_the_buffers():
            state = jax.block_until_ready(_copy(state))
        if processes.first():  # orbax writes the `meta` of process 0
            meta = {**meta, CHECKSUMS: checksums(state)}
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        self._saving = round
        self._hushed.enter_context(_hushed())
        with self._one_error():
            self._manager.save(round, args=args)

    def meta(self, round: int) -> dict[str, Any]:
        """Returns what was saved beside the state at `round`; raises UserError if it can't be read."""
        try:
            with _hushed(reading=True):
                meta = self._manager.restore(round, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
        except Exception as e:  # orbax raises many kinds
            raise self._damaged(round, _first_line(e)) from e
        return {key: value for key, value in meta.items() if key != CHECKSUMS}

    def restore(self, round: int, state: Any, shardings: Any) -> tuple[Any, dict[str, Any]]:
        """Restores the checkpoint at `round`.

        Args:
          round: from `rounds()`.
          state: the shapes and types expected.
          shardings: where each array goes; the mesh may differ from the one it was saved from.

        Raises:
          UserError: if it can't be read or holds something else.
          DivergedError: if it holds a number that is not finite.
        """
        target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(target), meta=ocp.args.JsonRestore())
        try:
            with _hushed(reading=True):
                restored = self._manager.restore(round, args=args)
        except Exception as e:  # orbax and tensorstore raise many kinds
            if OTHER_FIELDS in str(e):  # it may be whole: nobody is told to delete it
                raise UserError(
                    f"checkpoint {self.directory / str(round)} doesn't have the fields that this version of fedbert_jax "
                    "keeps: the version that wrote it can go on with it, or read it."
                ) from e
            raise self._damaged(round, _first_line(e)) from e
        meta = dict(restored.meta)
        saved, found = meta.pop(CHECKSUMS, {}), checksums(restored.state)
        for name in saved.keys() & found.keys():
            if saved[name] != found[name]:
                raise self._damaged(round, f"{name} is not what was saved")
        if bad := not_finite(restored.state):
            raise DivergedError(
                f"checkpoint {self.directory / str(round)} holds numbers that are not finite ({bad.sentence()}); "
                f"delete that directory to go on {self._back(round)}."
            )
        return restored.state, meta

    def _damaged(self, round: int, why: str) -> UserError:
        path = self.directory / str(round)
        return UserError(
            f"checkpoint {path} is damaged or of another run ({why}); delete that directory to go on {self._back(round)}."
        )

    def _back(self, round: int) -> str:
        older = [n for n in self.rounds() if n < round]
        return f"from round {older[-1]}" if older else "from the start"

    def check(self) -> None:
        """Raises DiskError if the save under way has failed by now; doesn't wait for it."""
        if self._saving is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until every save has reached the disk; raises DiskError if one can't."""
        if self._saving is not None:
            with self._one_error():
                self._manager.wait_until_finished()
            self._saving = None
            self._hushed.close()

    def close(self) -> None:
        """Waits for saves, and closes."""
        self.wait()
        self._manager.close()

    @contextlib.contextmanager
    def _one_error(self) -> Iterator[None]:
        """Turns a failed save into one error, after all its threads have ended, and deletes what it wrote."""
        failure: UserError | None = None
        try:
            yield
        except Exception as error:
            path = self.directory / str(self._saving)
            failure = disk.explain(error, path) or DiskError(f"checkpoint {path} can't be written ({_first_line(error)}).")
        if failure is None:
            return
        # From here on nothing holds the error, and errors left over from its threads are collected while still hushed.
        round, self._saving = self._saving, None
        _join_threads()
        if not processes.several():  # several would have to open it together
            with contextlib.suppress(Exception):
                self._manager = self._open()
        gc.collect()
        if processes.first():
            _remove(self.directory, f"{round}.*tmp*")
        self._hushed.close()
        raise failure


def _remove(directory: Path, pattern: str) -> None:
    """Deletes directories; again for a second, since what tensorstore was writing when it failed makes them anew."""
    end = time.monotonic() + 1
    while (left := list(directory.glob(pattern))) and time.monotonic() < end:
        for path in left:
            shutil.rmtree(path, ignore_errors=True)


@jax.jit
def _copy(state: Any) -> Any:
    return jax.tree.map(jnp.copy, state)


def checksums(state: Any) -> dict[str, int]:
    """Returns a CRC-32 of each array, by path.

    It covers the arrays that this process holds whole: with one process, all of them; with several, those that are
    replicated, or split only over devices of the same process. It leaves out arrays that are spread over processes: each
    client's own (`local`, a `private` body, `client_optimizer_state=keep`), and those that `mesh.model` splits if that
    axis spans processes.

    Orbax notices a file that is cut short, but reads a flipped bit as a number like any other.
    """
    sums = {}
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        whole = _whole(x)
        if whole is not None:
            data = np.ascontiguousarray(whole).reshape(-1).view(np.uint8).data
            sums[jax.tree_util.keystr(path)] = zlib.crc32(data)
    return sums


def _whole(x: Any) -> np.ndarray | None:
    """Returns the whole array; None if this process lacks a part of it."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    parts = {str(shard.index): shard for shard in x.addressable_shards}.values()  # without replicas
    if sum(part.data.size for part in parts) < x.size:
        return None
    whole = np.empty(x.shape, x.dtype)
    for part in parts:
        whole[part.index] = np.asarray(part.data)
    return whole


def _join_threads(seconds: float = 30.0) -> None:
    """Waits for the threads of a failed save. (With several processes, some of them wait for one that is gone.)"""
    until = time.monotonic() + seconds
    for thread in threading.enumerate():
        if thread.name == "async_save" or type(thread).__module__.startswith("orbax."):
            with contextlib.suppress(Exception):  # the error it failed with
                thread.join(max(0.0, until - time.monotonic()))


@contextlib.contextmanager
def _hushed(reading: bool = False) -> Iterator[None]:
    """Silences the errors of orbax, which writes and reads arrays concurrently, except the one that it raises.

    Each of the others would print a traceback, from a thread of orbax's or tensorstore's, or when a coroutine is collected.
    Errors in the main thread are reported as usual.

    The first array that can't be read raises. The other reads end some time later, in threads that nobody can wait for, and
    find their event loop closed: if `reading` fails, that one error stays silenced from then on.
    """
    hooks = (sys.excepthook, sys.unraisablehook, threading.excepthook)

    def main_threads(*error: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            hooks[0](*error)

    loggers = [logging.getLogger(name) for name in ("asyncio", "absl")]
    levels = [logger.level for logger in loggers]
    sys.excepthook = main_threads
    sys.unraisablehook = lambda _: None
    threading.excepthook = lambda _: None
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    except BaseException:
        if reading:
            hooks = (_but_late_reads(hooks[0]), _but_late_reads(hooks[1]), hooks[2])
        raise
    finally:
        sys.excepthook, sys.unraisablehook, threading.excepthook = hooks
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _but_late_reads(hook: Callable[..., None]) -> Callable[..., None]:
    """Returns a hook for `sys` that reports every error except "Event loop is closed" in another thread."""

    def told(*given: Any) -> None:
        error = getattr(given[0], "exc_value", given[-2] if len(given) == 3 else None)
        late = isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
        if not (late and threading.current_thread() is not threading.main_thread()):
            hook(*given)

    return hook if getattr(hook, "__name__", "") == told.__name__ else told


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0][:160] if text else type(error).__name__

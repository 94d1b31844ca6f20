"""Checkpoints: a run's whole state, saved by orbax in the background, atomically, and restored bit for bit."""

from __future__ import annotations

import contextlib
import logging
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from fedbert_jax import distributed
from fedbert_jax.errors import UserError

CHECKSUMS = "checksums"


class Checkpoints:
    """The `checkpoints/` of a workdir, open.

    Args:
      directory: made if absent. Leavings of a save that was cut off are removed.
      keep: how many of the newest stay; None opens for reading.
    """

    def __init__(self, directory: Path, keep: int | None = None):
        self.directory = directory
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=keep is not None, read_only=keep is None, enable_async_checkpointing=True
        )
        self._manager = ocp.CheckpointManager(directory.absolute(), item_names=("state", "meta"), options=options)

    def rounds(self) -> list[int]:
        """Returns the finished rounds at which there is a checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, round: int, state: Any, meta: dict[str, Any]) -> None:
        """Begins to save the state after `round` finished rounds; returns when `state` may be overwritten.

        Args:
          round: the checkpoint's number. One that exists is left as it is.
          state: pytree of arrays.
          meta: what JSON can hold.
        """
        if round in self._manager.all_steps():
            return
        if jax.default_backend() == "cpu":
            # On CPU orbax may write from the very buffers that the next round is given to overwrite.
            state = jax.block_until_ready(_copy(state))
        if distributed.first():  # what orbax writes of `meta` is process 0's
            meta = {**meta, CHECKSUMS: checksums(state)}
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        self._manager.save(round, args=args)

    def restore(self, round: int, state: Any, shardings: Any) -> tuple[Any, dict[str, Any]]:
        """Restores the checkpoint at `round`.

        Args:
          round: from `rounds()`.
          state: the shapes and types expected.
          shardings: where each array goes; it may be another mesh than the one it was saved from.

        Raises:
          UserError: if it can't be read or holds something else.
        """
        target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(target), meta=ocp.args.JsonRestore())
        try:
            with _first_error_only():
                restored = self._manager.restore(round, args=args)
        except Exception as e:  # orbax and tensorstore raise many kinds
            raise self._damaged(round, _first_line(e)) from e
        meta = dict(restored.meta)
        saved, found = meta.pop(CHECKSUMS, {}), checksums(restored.state)
        for name in saved.keys() & found.keys():
            if saved[name] != found[name]:
                raise self._damaged(round, f"{name} is not what was saved")
        return restored.state, meta

    def _damaged(self, round: int, why: str) -> UserError:
        older = [n for n in self.rounds() if n < round]
        back = f"from round {older[-1]}" if older else "from the start"
        path = self.directory / str(round)
        return UserError(
            f"checkpoint {path} is damaged or of another run ({why}); delete that directory to go on {back}."
        )

    def wait(self) -> None:
        """Waits until every save has reached the disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and closes."""
        self._manager.close()


@jax.jit
def _copy(state: Any) -> Any:
    return jax.tree.map(jnp.copy, state)


def checksums(state: Any) -> dict[str, int]:
    """Returns a CRC-32 of each array, by path.

    It covers the arrays whose every element this process has: with one process all of them, with several those that are
    replicated, or split only over devices of the same process. It leaves out what is spread over processes: what each
    client has of its own (`local`, a `private` body, `client_optimizer_state=keep`), and what `mesh.model` splits where
    that axis goes across processes.

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
    """Returns the array as this process has it; None if a part of it is elsewhere only."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    parts = {str(shard.index): shard for shard in x.addressable_shards}.values()  # without replicas
    if sum(part.data.size for part in parts) < x.size:
        return None
    whole = np.empty(x.shape, x.dtype)
    for part in parts:
        whole[part.index] = np.asarray(part.data)
    return whole


@contextlib.contextmanager
def _first_error_only() -> Iterator[None]:
    """Keeps orbax's reading to one error.

    It reads arrays side by side. The first that is damaged raises; the reads that this ends would each print a traceback,
    from a thread of tensorstore's or when their coroutine is collected.
    """
    hooks, logger = (sys.excepthook, sys.unraisablehook), logging.getLogger("asyncio")
    level = logger.level
    sys.excepthook = lambda *_: None
    sys.unraisablehook = lambda _: None
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        sys.excepthook, sys.unraisablehook = hooks
        logger.setLevel(level)


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0][:160] if text else type(error).__name__

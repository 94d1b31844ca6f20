"""A run's directory: its layout, its lock, and whether a config may go on with the run in it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import secrets
from collections.abc import Collection
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np

from fedbert_jax import config as config_lib
from fedbert_jax import disk
from fedbert_jax.config import Config
from fedbert_jax.console.output import shown
from fedbert_jax.devices import processes
from fedbert_jax.errors import ConfigError, UserError
from fedbert_jax.workdir.log import to_json


@dataclasses.dataclass(frozen=True)
class Workdir:
    """Paths in a workdir."""

    root: Path

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.root / "config.json"

    @property
    def metrics(self) -> Path:
        """One JSON object per round."""
        return self.root / "metrics.jsonl"

    @property
    def events(self) -> Path:
        """What happened in a federation: one JSON object per event."""
        return self.root / "events.jsonl"

    @property
    def facts(self) -> Path:
        """Facts about the run that the report shows beside its metrics."""
        return self.root / "run.json"

    @property
    def data(self) -> Path:
        """The prepared token blocks and the tokenizer."""
        return self.root / "data"

    @property
    def checkpoints(self) -> Path:
        """Orbax checkpoints."""
        return self.root / "checkpoints"

    @property
    def recorded(self) -> Path:
        """What a server has kept of its clients' messages (`audit.record`)."""
        return self.root / "recorded"

    @property
    def hf(self) -> Path:
        """The exported model."""
        return self.root / "hf"

    @property
    def profile(self) -> Path:
        """Traces."""
        return self.root / "profile"

    def exists(self) -> bool:
        """Whether a run was begun here."""
        return os.path.isfile(self.config)  # no error for a name that is too long

    def read_config(self) -> Config:
        """Reads the config the run was begun with.

        Raises:
          UserError: if there is none, or it can't be read.
        """
        if not self.exists():
            raise UserError(f"{self.root} is no workdir of a run: it has no config.json.")
        try:
            return config_lib.from_dict(json.loads(self.config.read_text()))
        except (json.JSONDecodeError, UnicodeDecodeError) as e:
            raise UserError(f"{self.config} is not valid JSON ({e}).") from e

    def write_config(self, config: Config) -> None:
        """Writes the resolved config."""
        disk.write_atomically(self.config, to_json(config_lib.to_dict(config), indent=2) + "\n")

    def read_facts(self) -> dict[str, Any]:
        """Reads run.json; empty if there is none.

        Raises:
          UserError: if it can't be read.
        """
        try:
            facts = json.loads(self.facts.read_text()) if self.facts.is_file() else {}
        except ValueError as e:
            raise UserError(f"{self.facts} is damaged ({e}); delete it, and it is written anew.") from e
        if not isinstance(facts, dict):
            raise UserError(f"{self.facts} holds no JSON object; delete it, and it is written anew.")
        return facts

    def write_facts(self, facts: dict[str, Any]) -> None:
        """Writes run.json."""
        disk.write_atomically(self.facts, to_json(facts, indent=2) + "\n")


def open_workdir(root: Path) -> tuple[Workdir, Any]:
    """Makes the directory if necessary and locks it for this run (the lock of a killed process is released).

    With several processes, only the first one locks it; the others check that they see the same directory.

    Returns:
      The workdir, and the lock, which is held until it is closed (or its `with` ends).

    Raises:
      UserError: if it is prepared data, can't be written, or is held by another run, or if this process sees a different
        directory from the first's.
    """
    lock: Any = contextlib.nullcontext()  # for a process that leaves locking to the first

    def locked() -> str:
        nonlocal lock
        lock = _lock(root)
        nonce = secrets.token_hex(16)
        with disk.writing(root), contextlib.ExitStack() as failing:
            failing.callback(lock.close)
            lock.truncate(0)
            lock.write(nonce.encode())
            os.fsync(lock.fileno())
            failing.pop_all()
        return nonce

    try:
        os.fspath(root.absolute()).encode()
    except UnicodeEncodeError as e:
        raise UserError(
            f"--workdir {shown(root)} has bytes in its path that are not UTF-8, where no checkpoint and no tokenizer can be "
            "saved; give another."
        ) from e
    nonce = processes.share(locked)
    if not processes.first() and not processes.await_file(root / ".lock", nonce):
        raise UserError(
            f"process {jax.process_index()} doesn't see what process 0 writes to workdir {root}; "
            "give a --workdir on a file system that all processes share."
        )
    return Workdir(root), lock


def _lock(root: Path) -> IO[bytes]:
    if (root / "meta.json").is_file() and (root / "train.npy").is_file():
        raise UserError(f"workdir {root} is prepared data, which runs take by data.prepared; give another --workdir.")
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / ".lock").open("ab", buffering=0)  # not "w": a run that finds it locked must leave it as it is
    except OSError as e:
        raise UserError(f"workdir {root} can't be written ({e.strerror}); give another --workdir.") from e
    try:
        disk.lock(lock)
    except BlockingIOError as e:
        raise UserError(f"workdir {root} is in use by another run; wait for it or give another --workdir.") from e
    except OSError as e:
        raise UserError(f"workdir {root} can't be locked ({e.strerror}); give one on a file system with locks.") from e
    return lock


def check_same(
    old: Config, new: Config, free: Collection[str] = (), harmless: Collection[str] = config_lib.HARMLESS
) -> None:
    """Refuses to go on in a workdir with a config that would have made other rounds.

    Args:
      old: the workdir's config.
      new: the config to go on with.
      free: keys that may always change.
      harmless: keys that may change with resume=force.

    Raises:
      ConfigError: naming the keys that differ.
    """
    before, after = (config_lib.flatten(config_lib.to_dict(c)) for c in (old, new))
    worked_out = {key for key, source in config_lib.WORKED_OUT.items() if after[source] is not None}
    free = {*config_lib.FREE, *worked_out, *free}
    differ = [k for k in before if before[k] != after.get(k) and k not in free]
    harmful = [k for k in differ if k not in harmless]
    show = lambda keys: ", ".join(f"{k} (was {before[k]!r}, now {after[k]!r})" for k in keys)  # noqa: E731
    if harmful:
        raise ConfigError(f"this workdir belongs to a run with another config: {show(harmful)}; give another --workdir.")
    if differ and new.resume != "force":
        raise ConfigError(
            f"this workdir belongs to a run with another config: {show(differ)}; "
            f"--config.resume=force goes on with the new values."
        )


def fingerprint(*arrays: Any) -> str:
    """Returns a SHA-256 over pytrees of arrays: their names, types, shapes and values."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(arrays):
        leaf = np.ascontiguousarray(leaf)
        found.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape} ".encode())
        found.update(leaf.reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def check_inputs(workdir: Workdir, found: dict[str, str]) -> None:
    """Refuses to go on with a run if the contents of its model or data paths have changed.

    Args:
      workdir: its facts hold the fingerprints of what was read when it was begun.
      found: `fingerprint` of what was read now, by config key.

    Raises:
      ConfigError: naming the key.
    """
    before = workdir.read_facts().get("inputs", {})
    for key, value in found.items():
        if before.get(key, value) != value:
            raise ConfigError(
                f"what config key {key} names, or the tokenizer, has changed since workdir {workdir.root} was begun; "
                "give another --workdir."
            )

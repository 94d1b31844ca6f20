"""A disk that fails: one sentence that names the place, nothing half-written taken for whole, and the run goes on."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import resource
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from corpus import write_corpus
from rich.console import Console
from test_main import load

from fedbert_jax import cli, disk
from fedbert_jax.config import MeshConfig
from fedbert_jax.devices.mesh import make_mesh
from fedbert_jax.disk import write_atomically
from fedbert_jax.errors import DiskError, UserError
from fedbert_jax.train import Pretraining, train
from fedbert_jax.workdir.checkpoint import Checkpoints, _join_threads
from fedbert_jax.workdir.log import MetricsLog, read_metrics, truncate
from fedbert_jax.workdir.paths import open_workdir

RUST = "No space left on device (os error 28)"  # as tokenizers and safetensors say it
TENSORSTORE = (
    'RESOURCE_EXHAUSTED: Error writing local file "/r/w/checkpoints/1.orbax-checkpoint-tmp/state/_sharding": '
    "Failed writing: Failed to write 19041 bytes to file 9: No space left on device [os_error_code='28']"
)


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Keeps this process from writing a file beyond `size` bytes: the closest to a full disk without being root."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    "error, words",
    [
        (OSError(errno.ENOSPC, "No space left on device"), "runs/a can't be written: no space is left there; make room and"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "runs/a can't be written: the quota there is used up"),
        (OSError(errno.EFBIG, "File too large"), r"runs/a can't be written: a file would be larger .* \(ulimit -f\)"),
        (OSError(errno.EROFS, "Read-only file system"), "runs/a can't be written: the file system is read-only"),
        (OSError(errno.EIO, "Input/output error"), "runs/a can't be read or written: the device reports"),
        (PermissionError(errno.EACCES, "Permission denied", "/else/x"), "/else/x can't be read or written: permission"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/a.new"), "runs/a can't be written"),  # a temporary name
        (Exception(RUST), "runs/a can't be written: no space is left"),
        (ValueError(TENSORSTORE), "runs/a can't be written: no space is left"),
        (ExceptionGroup("saving", [ValueError("x"), ValueError(TENSORSTORE)]), "runs/a can't be written: no space is left"),
    ],
)
def test_what_the_disk_says_becomes_a_sentence(error, words):
    with pytest.raises(DiskError, match=words) as raised, disk.writing("runs/a"):
        raise error
    assert raised.value.exit_code == 2 and str(raised.value).count(". ") == 0


def test_an_error_raised_from_the_disks_is_the_disks():
    error = ValueError("the archive could not be made")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(DiskError, match="no space is left"), disk.writing("runs/a"):
        raise error


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file or directory", "x"),
        ValueError("RESOURCE_EXHAUSTED: Out of memory"),
        UserError("said already"),
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
    ],
)
def test_other_errors_pass(error):
    with pytest.raises(type(error)) as raised, disk.writing("runs/a"):
        raise error
    assert raised.value is error


def test_a_command_that_nobody_guarded_ends_with_2_and_one_line(monkeypatch, capsys):
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/r/x")

    monkeypatch.setattr(cli, "quieten", lambda: None)
    monkeypatch.setattr(cli, "_tell_no_more", lambda: None)
    with pytest.raises(SystemExit) as ended:
        cli.run(full)
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert said.startswith("error: /r/x can't be written: no space is left there;") and said.count("\n") == 1


def test_an_error_can_be_told_where_the_terminal_is_a_file_on_the_full_disk(monkeypatch):
    monkeypatch.setattr(cli, "_tell_no_more", lambda: None)
    with open("/dev/full", "w") as out, open("/dev/full", "w") as err:
        out.write("a line that is still to be written")
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        assert cli.tell(UserError("full")) == 2


def test_a_line_of_the_metrics_that_does_not_fit_is_a_torn_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.append({"round": 0})
    with files_of_at_most(path.stat().st_size + 10), pytest.raises(DiskError, match=r"metrics\.jsonl can't be written"):
        log.append({"round": 1, "train_loss": 5.0})
    log.close()
    assert path.stat().st_size == len('{"round": 0}\n') + 10  # it got this far
    assert [record["round"] for record in read_metrics(path)] == [0]
    truncate(path, 0)
    with MetricsLog(path) as log:
        log.append({"round": 1})
    assert [record["round"] for record in read_metrics(path)] == [0, 1]


def test_a_file_that_does_not_fit_leaves_the_old_one_and_no_other(tmp_path):
    path = tmp_path / "run.json"
    write_atomically(path, "old")
    with files_of_at_most(10), pytest.raises(DiskError, match=r"run\.json can't be written"):
        write_atomically(path, "new" * 100)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_what_is_written_while_a_failed_checkpoint_is_deleted_goes_too(tmp_path, monkeypatch):
    state = {"w": jax.random.normal(jax.random.key(0), (64, 32))}
    checkpoints, remove, late = Checkpoints(tmp_path / "c", keep=1), shutil.rmtree, []

    def removed(path, **options):
        remove(path, **options)
        if Path(path).name.startswith("1.") and len(late) < 3:  # as a thread does that has not heard yet
            late.append(Path(path) / "state")
            late[-1].mkdir(parents=True)

    monkeypatch.setattr("fedbert_jax.workdir.checkpoint.shutil.rmtree", removed)
    with files_of_at_most(1000):
        checkpoints.save(1, state, {})
        with pytest.raises(DiskError, match="c/1 can't be written"):
            checkpoints.wait()
    assert len(late) == 3 and list((tmp_path / "c").iterdir()) == []


def test_a_checkpoint_that_does_not_fit_is_one_sentence_and_the_one_before_stays(tmp_path, capfd, caplog):
    state = {"w": jax.random.normal(jax.random.key(0), (64, 32)), "v": jnp.ones((500, 3)), "n": jnp.int32(7)}
    checkpoints = Checkpoints(tmp_path / "c", keep=1)
    checkpoints.save(1, state, {})
    checkpoints.wait()

    def rounds_go_by() -> None:
        while True:  # as the loop does in every round, while orbax writes in the background
            checkpoints.check()
            time.sleep(0.001)

    with files_of_at_most(1000):
        for n, noticed in ((2, rounds_go_by), (3, checkpoints.wait)):
            checkpoints.save(n, state, {})
            with pytest.raises(DiskError, match=f"c/{n} can't be written: a file would be larger"):
                noticed()
            assert not [t for t in threading.enumerate() if type(t).__module__.startswith("orbax.")]
    said = capfd.readouterr()
    assert said.out == said.err == "" and not [r for r in caplog.records if r.levelno >= logging.ERROR]
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["1"]  # what was written in vain takes no room
    again = Checkpoints(tmp_path / "c", keep=1)
    here = jax.sharding.NamedSharding(make_mesh(MeshConfig()), jax.sharding.PartitionSpec())
    restored, _ = again.restore(1, jax.eval_shape(lambda: state), jax.tree.map(lambda _: here, state))
    assert np.array_equal(restored["w"], state["w"])
    again.save(2, state, {})
    again.close()
    assert Checkpoints(tmp_path / "c").rounds() == [2]


def test_a_failed_save_is_over_when_its_last_thread_is():
    """Until then, what it wrote can't be removed, and its threads' last errors would be printed."""
    go = threading.Event()
    late = type("Late", (threading.Thread,), {"__module__": "orbax.checkpoint.some_module"})(target=go.wait)
    late.start()
    threading.Timer(0.05, go.set).start()
    _join_threads()
    assert not late.is_alive()


@pytest.fixture
def no_compilation_cache():
    """Other tests would read an entry that was cut off."""
    least = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)


@pytest.mark.slow
def test_a_run_on_a_full_disk_goes_on_once_there_is_room(tmp_path, monkeypatch, no_compilation_cache):
    """The disk is full while preparing data, and in a checkpoint; each time, the workdir is free for the next try."""
    config = write_corpus(tmp_path, clients=2, documents=12)
    config = load(
        config, federated__rounds=2, checkpoint__every_rounds=1, federated__local_steps=1, model__num_layers=1, fill_mask=()
    )
    root, console = tmp_path / "w", Console(file=io.StringIO(), width=200)
    monkeypatch.setattr(Pretraining, "finish", lambda *_: None)  # a report takes seconds
    for size, place, left in ((300, "w/data", set()), (8_000, "checkpoints/1", {"data", "config.json", "metrics.jsonl"})):
        with files_of_at_most(size), pytest.raises(DiskError, match=f"{place} can't be written"):
            train(config, root, console)
        _, lock = open_workdir(root)
        lock.close()
        assert {path.name for path in root.iterdir()} - {".lock", "run.json", "checkpoints"} == left
    assert train(config, root, console) == 0
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert said.startswith("on 1 x cpu\n") and "\ncompiling a round took " in said
    assert [record["round"] for record in read_metrics(root / "metrics.jsonl")] == [0, 1, 2]


def test_the_lock_of_a_full_disk_is_given_back(tmp_path, monkeypatch):
    monkeypatch.setattr("fedbert_jax.workdir.paths.os.fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(DiskError, match="w can't be written: no space is left"):
        open_workdir(tmp_path / "w")
    monkeypatch.undo()
    _, lock = open_workdir(tmp_path / "w")
    lock.close()

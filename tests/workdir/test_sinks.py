"""Sinks of metrics: what they hold is what metrics.jsonl holds, also after a kill, and once."""

from __future__ import annotations

import math
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import tiny_config

from fedbert_jax.config import from_dict
from fedbert_jax.errors import ConfigError
from fedbert_jax.workdir import sinks
from fedbert_jax.workdir.log import MetricsLog, read_metrics, truncate
from fedbert_jax.workdir.paths import Workdir

RECORDS = [
    {"round": 0, "tokens": 0, "eval_loss": 4.5, "eval_clients": {"north": {"loss": 4.25, "accuracy": 0.0}}},
    {"round": 1, "tokens": 128, "train_loss": 4.0, "members": ["north"]},
    {"round": 2, "tokens": 256, "train_loss": None, "eval_loss": 3.5},
    {"round": 3, "tokens": 384, "train_loss": 3.0},
]


def events(root: Path) -> dict[str, list[tuple[int, float]]]:
    """Returns what TensorBoard reads: (step, value) by tag."""
    found = EventAccumulator(str(root / "tensorboard"), size_guidance={"tensors": 0, "scalars": 0})
    found.Reload()
    tensors = {tag: found.Tensors(tag) for tag in found.Tags()["tensors"]}
    return {t: [(e.step, float(e.tensor_proto.float_val[0])) for e in tensors[t]] for t in tensors}


def expected(records: list[dict]) -> dict[str, list[tuple[int, float]]]:
    tags: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        flat = {k: v for k, v in record.items() if k not in ("round", "members", "eval_clients")}
        for client, scores in record.get("eval_clients", {}).items():
            flat |= {f"eval_clients/{client}/{name}": value for name, value in scores.items()}
        for name, value in flat.items():
            tags.setdefault(name, []).append((record["round"], math.nan if value is None else value))
    return tags


def opened(root: Path, sink: str = "tensorboard") -> MetricsLog:
    config = tiny_config(metrics=dict(sinks=sink))
    return MetricsLog(Workdir(root).metrics, sinks.make_sinks(config, Workdir(root)))


def same(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    for tag in wanted:
        assert [step for step, _ in found[tag]] == [step for step, _ in wanted[tag]], tag
        assert [v for _, v in found[tag]] == pytest.approx([v for _, v in wanted[tag]], rel=1e-6, nan_ok=True), tag


def test_tensorboard_reads_what_metrics_jsonl_holds(tmp_path):
    with opened(tmp_path) as log:
        for record in RECORDS:
            log.append(record)
    assert read_metrics(Workdir(tmp_path).metrics) == RECORDS
    same(events(tmp_path), expected(RECORDS))


def test_an_evaluation_is_on_the_disk_at_once(tmp_path):
    with opened(tmp_path) as log:
        log.append(RECORDS[0])
        same(events(tmp_path), expected(RECORDS[:1]))


def test_no_round_is_there_twice_after_kill_9(tmp_path):
    """The run after the kill begins after round 1, its last checkpoint, and repeats rounds 2 and 3."""
    child = os.fork()
    if child == 0:
        log = opened(tmp_path)
        for record in RECORDS:
            log.append(record)
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    truncate(Workdir(tmp_path).metrics, 1)
    with opened(tmp_path) as log:
        for record in RECORDS[2:]:
            log.append(record)
    same(events(tmp_path), expected(RECORDS))


class FakeWandb:
    """Stands where the module stands; keeps what a run was told."""

    def __init__(self) -> None:
        self.told: list[tuple[int, dict]] = []
        self.ids: list[str] = []
        self.finished = 0
        self.resumed, self.starting_step = False, 0

    def init(self, id: str, **given: object) -> FakeWandb:
        self.ids.append(id)
        return self

    def log(self, numbers: dict, step: int, commit: bool) -> None:
        self.told.append((step, numbers))

    def finish(self) -> None:
        self.finished += 1


def test_weights_and_biases_is_told_of_each_round_once(tmp_path, monkeypatch):
    import wandb

    fake = FakeWandb()
    monkeypatch.setattr(wandb, "init", fake.init)
    with opened(tmp_path, "wandb") as log:
        for record in RECORDS:
            log.append(record)
    truncate(Workdir(tmp_path).metrics, 1)
    with opened(tmp_path, "wandb") as log:  # repeats rounds 2 and 3
        for record in [*RECORDS[2:], {"round": 4, "train_loss": 2.0}]:
            log.append(record)
    assert [step for step, _ in fake.told] == [0, 1, 2, 3, 4]
    assert fake.told[0][1] == {
        "tokens": 0.0,
        "eval_loss": 4.5,
        "eval_clients/north/loss": 4.25,
        "eval_clients/north/accuracy": 0.0,
    }
    assert len(set(fake.ids)) == 1 and fake.finished == 2


@pytest.mark.parametrize("resumed, again", [(False, [0, 1, 2, 3]), (True, [2, 3])])
def test_weights_and_biases_is_told_again_of_what_a_killed_run_may_not_have_written(tmp_path, monkeypatch, resumed, again):
    """The service says how far it has come; offline nobody does."""
    import wandb

    fake = FakeWandb()
    monkeypatch.setattr(wandb, "init", fake.init)
    log = opened(tmp_path, "wandb")  # never closed
    for record in RECORDS:
        log.append(record)
    told, fake.told = fake.told, []
    fake.resumed, fake.starting_step = resumed, 2 * resumed
    with opened(tmp_path, "wandb"):
        pass
    assert [step for step, _ in fake.told] == again and fake.told == told[again[0] :] and len(set(fake.ids)) == 1
    fake.resumed, fake.told = False, []
    with opened(tmp_path, "wandb"):
        assert not fake.told  # it has ended in order


def history(data: bytes) -> Iterator[tuple[int, float]]:
    """Yields (step, train_loss) of an offline run's file: records in LevelDB's log format, the last of which may be torn."""
    from wandb.proto.wandb_internal_pb2 import Record

    at, begun, block = 7, b"", 32768  # behind a header
    while at + 7 <= len(data):
        if (left := block - at % block) < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        part, at = data[at + 7 : at + 7 + size], at + 7 + size
        if kind == 0 or len(part) < size:
            return
        begun = part if kind in (1, 2) else begun + part  # whole, or a first part; further ones
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(begun)
            if record.WhichOneof("record_type") == "history":
                items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
                yield record.history.step.num, float(items["train_loss"])


WRITES = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/.."]
from tiny import tiny_config
from fedbert_jax.workdir import sinks
from fedbert_jax.workdir.log import MetricsLog
from fedbert_jax.workdir.paths import Workdir
workdir, first = Workdir(Path(sys.argv[2])), int(sys.argv[3])
log = MetricsLog(workdir.metrics, sinks.make_sinks(tiny_config(metrics=dict(sinks="wandb")), workdir))
for n in range(first, first + 4):
    log.append({"round": n, "train_loss": float(n)})
if first == 0:
    os.kill(os.getpid(), signal.SIGKILL)
log.close()
"""


@pytest.mark.slow
def test_no_round_is_missing_offline_after_a_kill(tmp_path, monkeypatch):
    """Read back from what Weights & Biases wrote, before the kill and after it."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    for first in (0, 4):
        command = [sys.executable, "-c", WRITES, str(Path(__file__).parents[1]), str(tmp_path), str(first)]
        code = subprocess.run(command, check=False).returncode
        assert code == (-signal.SIGKILL if first == 0 else 0)
    found = {}
    for file in tmp_path.glob("wandb/offline-run-*/run-*.wandb"):
        found |= dict(history(file.read_bytes()))
    assert found == {n: float(n) for n in range(8)}


def test_weights_and_biases_works_offline(tmp_path, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    with opened(tmp_path, "wandb") as log:
        for record in RECORDS[:2]:
            log.append(record)
    wandb.teardown()  # waits for the process that writes
    (written,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert b"eval_clients/north/loss" in written.read_bytes()


def test_a_sink_that_is_not_installed_is_one_sentence(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"metrics\.sinks='wandb': accepted without wandb: .* 'fedbert_jax\[wandb\]'"):
        sinks.check_installed(tiny_config(metrics=dict(sinks="wandb")))


@pytest.mark.parametrize("given", ["csv", "tensorboard,tensorboard", "wandb tensorboard"])
def test_a_sink_that_there_is_not_is_refused(given):
    with pytest.raises(ConfigError, match=r"metrics\.sinks"):
        from_dict(dict(metrics=dict(sinks=given)))

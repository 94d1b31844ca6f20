"""The loop of rounds, with a job that trains nothing: the order in which things happen, whatever a job trains."""

from __future__ import annotations

import io
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console

from fedbert_jax.config import MeshConfig
from fedbert_jax.devices.interrupts import Interrupts
from fedbert_jax.devices.mesh import make_mesh
from fedbert_jax.errors import DivergedError
from fedbert_jax.federated.finite import NotFiniteError
from fedbert_jax.federated.metrics import RoundMetrics
from fedbert_jax.loop import Loop, Watcher
from fedbert_jax.workdir.checkpoint import Checkpoints
from fedbert_jax.workdir.log import read_metrics


class Counting:
    """Counts its rounds up in its state: evaluates every second one, saves every third and writes down what it is asked."""

    name, what, remedy, total = "counting", "", "count lower", 7

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.state_shape = {"n": jax.ShapeDtypeStruct((), jnp.float32)}
        self.state_sharding = {"n": NamedSharding(make_mesh(MeshConfig()), P())}
        self.taken_up: tuple[int, Any] | None = None
        self.bad = 0  # the round whose numbers are not finite
        self.last = 0  # the evaluated round after which it is enough
        self.is_enough = False

    def begin(self):
        return {"n": jnp.zeros(())}, {"round": 0, "value": 0.0}

    def resume(self, round, meta):
        self.taken_up = (round, meta)

    def run_round(self, state, round):
        self.calls.append(f"start {round + 1}")
        n = state["n"] + 1
        return {"n": n}, RoundMetrics(n, n, n, jnp.zeros(1, jnp.int32))

    def evaluates(self, round):
        return round % 2 == 0

    def enough(self):
        return self.is_enough

    def saves(self, round):
        return round % 3 == 0

    def record(self, round, done):
        self.calls.append(f"read {round}")
        if round == self.bad:
            raise NotFiniteError("the loss is not finite")
        return {"round": round, "value": float(done.metrics.loss)} if round != 5 else {}

    def evaluate(self, state):
        self.calls.append(f"evaluate {int(state['n'])}")
        self.is_enough = int(state["n"]) == self.last
        return {"score": float(state["n"])}

    def say(self, record):
        self.calls.append(f"say {record['score']:.0f}")

    def show(self, done):
        return f"{float(done.metrics.loss):.1f}"

    def check(self, state):
        self.calls.append(f"check {int(state['n'])}")

    def meta(self, round):
        return {"note": f"after {round}"}


class Stopping(Interrupts):
    """A signal that comes before so many rounds are begun."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def stop(self) -> bool:
        self.left -= 1
        self.received = 2 if self.left < 0 else None
        return self.left < 0

    def settle(self) -> int | None:
        self.received = 2 if self.left <= 0 else None  # it may come in the last round, too
        return self.received


@pytest.fixture
def run(tmp_path):
    """A function that runs a job in one workdir, from wherever that stands."""

    def call(job: Counting, interrupts: Interrupts | None = None) -> tuple[Loop, Any]:
        loop = Loop(job, Checkpoints(tmp_path / "c", keep=2), tmp_path / "m.jsonl", Console(file=io.StringIO()))
        state = loop.run(loop.begin(), interrupts or Interrupts())
        loop.close()
        return loop, state

    return call


def lines(tmp_path):
    return [(r["round"], r["value"], r.get("score")) for r in read_metrics(tmp_path / "m.jsonl")]


WHOLE = [(0, 0, None), (1, 1, None), (2, 2, 2), (3, 3, None), (4, 4, 4), (6, 6, 6), (7, 7, None)]  # 5 has no line


def test_a_round_is_under_way_while_the_one_before_is_read(run, tmp_path):
    """Unless it is evaluated or saved: then nothing else is under way."""
    job = Counting()
    loop, state = run(job)
    assert job.calls == [
        *("start 1", "start 2", "read 1", "read 2", "evaluate 2", "say 2"),
        *("start 3", "read 3", "check 3"),
        *("start 4", "read 4", "evaluate 4", "say 4"),
        *("start 5", "start 6", "read 5", "read 6", "evaluate 6", "say 6", "check 6"),
        *("start 7", "read 7"),
    ]
    assert lines(tmp_path) == WHOLE and loop.finished and float(state["n"]) == 7
    assert loop.checkpoints.directory.name == "c" and {p.name for p in (tmp_path / "c").iterdir()} == {"3", "6"}


@pytest.mark.parametrize("after", [1, 2, 3, 5, 7])
def test_a_signal_ends_it_after_a_round_and_the_next_run_ends_alike(run, tmp_path, after):
    loop, state = run(Counting(), Stopping(after))
    assert loop.round == float(state["n"]) == after and loop.finished == (after == 7)
    assert (tmp_path / "c" / str(after)).is_dir()
    again = Counting()
    loop, state = run(again)
    assert again.taken_up is not None and again.taken_up[0] == after
    assert again.taken_up[1]["note"] == f"after {after}"
    assert lines(tmp_path) == WHOLE and loop.finished and float(state["n"]) == 7


def test_a_signal_before_the_first_round_saves_nothing(run, tmp_path):
    loop, _ = run(Counting(), Stopping(0))
    assert loop.round == 0 and not any((tmp_path / "c").iterdir()) and lines(tmp_path) == WHOLE[:1]


def test_lines_of_rounds_that_no_checkpoint_has_are_dropped(run, tmp_path):
    """As after a kill: the newest checkpoint is of round 3, and the log knows of round 5."""
    run(Counting(), Stopping(3))
    with (tmp_path / "m.jsonl").open("a") as log:
        log.write('{"round": 4, "value": 40}\n{"round": 5, "value": 50}\n{"rou')
    run(Counting())
    assert lines(tmp_path) == WHOLE


@pytest.mark.parametrize("bad, kept", [(2, "there was no checkpoint yet"), (5, "the checkpoint of round 3 is kept")])
def test_numbers_that_are_not_finite_end_it(run, tmp_path, bad, kept):
    job = Counting()
    job.bad = bad
    words = rf"^round {bad}: the loss is not finite; {kept}, and nothing is exported; count lower, and begin in another"
    with pytest.raises(DivergedError, match=words):
        run(job)
    assert lines(tmp_path) == [line for line in WHOLE if line[0] < bad]
    assert np.isfinite([line[1] for line in lines(tmp_path)]).all()


def test_a_job_with_a_name_of_its_own_is_named(run):
    job = Counting()
    job.what, job.bad = "SST-2", 1
    with pytest.raises(DivergedError, match=r"^SST-2, round 1: "):
        run(job)


def test_a_job_that_has_had_enough_ends_with_the_round_that_was_evaluated(run, tmp_path):
    """That round is saved, though none is due, and no other is begun, now or when it is given again."""
    job = Counting()
    job.last = 4
    loop, state = run(job)
    assert job.calls[-5:] == ["start 4", "read 4", "evaluate 4", "say 4", "check 4"]
    assert (loop.round, loop.finished, float(state["n"])) == (4, True, 4) and (tmp_path / "c" / "4").is_dir()
    again = Counting()
    again.is_enough = True
    loop, state = run(again)
    assert again.calls == [] and (loop.round, loop.finished, float(state["n"])) == (4, True, 4)


def test_a_watcher_hears_each_round_and_may_end_the_run(tmp_path):
    job, interrupts, heard = Counting(), Interrupts(), []

    def watch(record):
        heard.append(record["round"])
        return record["round"] == 2

    log = tmp_path / "m.jsonl"
    loop = Loop(
        job, Checkpoints(tmp_path / "c", keep=2), log, Console(file=io.StringIO()), None, [Watcher(watch, interrupts)]
    )
    loop.run(loop.begin(), interrupts)
    loop.close()
    assert heard == [0, 1, 2] == [r["round"] for r in read_metrics(log)]
    assert loop.round == 2 and (tmp_path / "c" / "2").is_dir() and interrupts.exit_code == 143

"""A run killed at any moment and started again ends like one that never stopped (invariant 6)."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from corpus import command, run, write_corpus
from forking import environment, start
from rich.console import Console
from safetensors.numpy import load_file
from test_main import load

from fedbert_jax.console.progress import Stages
from fedbert_jax.errors import ConfigError, UserError
from fedbert_jax.experiment import open_run
from fedbert_jax.loop import Loop
from fedbert_jax.train import train
from fedbert_jax.workdir.paths import Workdir

TIMES = {"seconds", "tokens_per_second"}

# The command, in a process that kills itself with SIGKILL while orbax is writing the checkpoint of round 6.
IN_A_SAVE = """
import os, signal, sys, threading
import orbax.checkpoint as ocp
save = ocp.CheckpointManager.save
def killed(self, step, *args, **kwargs):
    result = save(self, step, *args, **kwargs)
    if step == 6:
        found = [n for n in os.listdir(self.directory) if n.startswith("6")]
        print("in flight:", found, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    return result
ocp.CheckpointManager.save = killed
from fedbert_jax import cli, main
sys.argv = ["main"] + sys.argv[1:]
cli.run(main.main)
"""


def lines(workdir: Path) -> list[dict]:
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in TIMES} for r in records]


def finished_rounds(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    return max(0, path.read_text().count("\n") - 1) if path.exists() else 0


def kill_after(args: list[str], workdir: Path, rounds: int, number: int = signal.SIGKILL) -> subprocess.Popen:
    """Starts the command and sends the signal once `rounds` rounds are written."""
    process = start(args, environment(), merged=True)
    until = time.monotonic() + 240
    while finished_rounds(workdir) < rounds and process.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.002)
    process.send_signal(number)
    process.wait(60)
    return process


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    config = write_corpus(folder)
    done = run(*command(config, folder / "undisturbed"))
    assert done.returncode == 0, done.stdout + done.stderr
    return config, folder / "undisturbed"


def assert_same_run(workdir: Path, reference: Path) -> None:
    assert lines(workdir) == lines(reference)
    ours, theirs = (load_file(d / "hf" / "model.safetensors") for d in (workdir, reference))
    assert all(np.array_equal(ours[k], theirs[k]) for k in theirs)
    assert (workdir / "hf" / "model.safetensors").read_bytes() == (reference / "hf" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_killed_three_times_and_resumed(undisturbed, tmp_path):
    config, reference = undisturbed
    workdir = tmp_path / "killed"
    args = command(config, workdir)
    kill_after(args, workdir, 1)  # before there is any checkpoint
    in_save = subprocess.run(
        [sys.executable, "-c", IN_A_SAVE, *args[3:]], env=environment(), capture_output=True, text=True, timeout=240
    )
    assert in_save.returncode == -signal.SIGKILL, in_save.stdout + in_save.stderr
    assert "orbax-checkpoint-tmp" in in_save.stdout  # the save was under way, not done
    rng = np.random.default_rng()  # any moment: another one each time the tests run
    kill_after(args, workdir, int(rng.integers(6, 12)))
    done = run(*args)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_run(workdir, reference)


@pytest.mark.slow
def test_ctrl_c_keeps_everything(undisturbed, tmp_path):
    """Exit code 130, a checkpoint of the last finished round, no traceback; resuming ends the same."""
    config, reference = undisturbed
    workdir = tmp_path / "interrupted"
    process = kill_after(command(config, workdir), workdir, 4, signal.SIGINT)
    said = process.stdout.read()
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert "the same command goes on from there" in said
    done = run(*command(config, workdir))
    assert f"resuming after round {finished_in(said)}" in done.stdout
    assert_same_run(workdir, reference)


def finished_in(said: str) -> int:
    return int(said.split("stopped after round ")[1].split(";")[0])


@pytest.mark.slow
def test_a_finished_run_is_not_run_again(undisturbed):
    config, reference = undisturbed
    before = (reference / "metrics.jsonl").read_bytes()
    done = run(*command(config, reference))
    assert done.returncode == 0, done.stderr
    assert (reference / "metrics.jsonl").read_bytes() == before


def test_another_config_on_an_old_workdir_is_refused(undisturbed):
    config, reference = undisturbed
    done = run(*command(config, reference, "federated.local_steps=3", "seed=5"))
    assert done.returncode == 2
    assert "federated.local_steps (was 2, now 3)" in done.stderr and "seed (was 0, now 5)" in done.stderr
    done = run(*command(config, reference, "checkpoint.keep=7"))
    assert done.returncode == 2 and "--config.resume=force" in done.stderr
    done = run(*command(config, reference, "federated.local_steps=3", "resume=force"))
    assert done.returncode == 2 and "another --workdir" in done.stderr


def test_compiling_is_no_part_of_a_rounds_speed_but_of_its_time(undisturbed):
    _, reference = undisturbed
    records = [json.loads(line) for line in (reference / "metrics.jsonl").read_text().splitlines()]
    tokens = records[1]["tokens"]
    assert records[1]["tokens_per_second"] > 2 * tokens / records[1]["seconds"]  # compiling is nearly all of a tiny round
    assert all(r["tokens_per_second"] == tokens / r["seconds"] for r in records[2:])


def test_a_config_file_that_is_gone_is_put_back_by_the_checkpoint(undisturbed, tmp_path):
    config, reference = undisturbed
    workdir = Workdir(tmp_path / "w")
    shutil.copytree(reference, workdir.root)
    workdir.config.unlink()
    said: list[str] = []
    words = r"this workdir belongs to a run with another config: federated\.local_steps \(was 2, now 3\)"
    with Stages(Console(quiet=True)) as stages, pytest.raises(ConfigError, match=words):
        open_run(load(config, federated__local_steps=3), workdir, stages, said.append)
    assert said == [f"{workdir.config} was not there; it is put back as the checkpoint of round 12 has it."]
    assert workdir.config.read_bytes() == (reference / "config.json").read_bytes()


def test_a_run_that_goes_on_with_more_rounds_is_not_finished(undisturbed, tmp_path, monkeypatch):
    config, reference = undisturbed
    shutil.copytree(reference, tmp_path / "w")
    more = dict(federated__rounds=14, resume="force")
    with pytest.raises(ConfigError, match=r"would jump up.*federated\.schedule_from=12 warms up and decays anew"):
        train(load(config, **more), tmp_path / "w", Console(quiet=True))
    for name in ("config.json", "run.json"):  # nothing has changed
        assert (tmp_path / "w" / name).read_bytes() == (reference / name).read_bytes()
    assert json.loads((reference / "run.json").read_text())["finished"] is True
    rates = []

    def rounds(self, state, interrupts):
        rates.append([float(self.job.sim.setting.client_tx.schedule(np.int32(n))) for n in (24, 27)])
        raise KeyboardInterrupt

    monkeypatch.setattr(Loop, "run", rounds)
    with pytest.raises(KeyboardInterrupt):
        train(load(config, federated__schedule_from=12, **more), tmp_path / "w", Console(quiet=True))
    assert json.loads((tmp_path / "w" / "run.json").read_text())["finished"] is False
    np.testing.assert_allclose(rates, [[2e-3 / 4, 2e-3]])  # four steps of warm-up, again


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_nothing_is_lost(undisturbed, tmp_path):
    config, reference = undisturbed
    workdir = tmp_path / "damaged"
    shutil.copytree(reference, workdir)
    newest = max((workdir / "checkpoints").iterdir(), key=lambda p: int(p.name))
    largest = max((f for f in newest.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    whole = largest.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    largest.write_bytes(bytes(flipped))
    done = run(*command(config, workdir))
    assert done.returncode == 2, done.stdout + done.stderr
    assert str(newest) in done.stderr and "delete that directory to go on from round 9" in done.stderr
    assert "Traceback" not in done.stderr
    largest.write_bytes(whole[: len(whole) // 2])  # cut short
    with pytest.raises(UserError, match="delete that directory to go on from round 9"):
        train(load(config), workdir, Console(quiet=True))
    shutil.rmtree(newest)
    done = run(*command(config, workdir))
    assert done.returncode == 0, done.stderr
    assert_same_run(workdir, reference)

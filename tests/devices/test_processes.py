"""Two processes train as one does, read only their own clients' text, and stop, fail and go on together."""

from __future__ import annotations

import json
import shutil
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
from corpus import command, run, write_corpus
from processes import finish, free_port, rounds_in, start_alone, start_two, wait_until
from safetensors.numpy import load_file

from fedbert_jax.devices import processes
from fedbert_jax.devices.interrupts import Interrupts
from fedbert_jax.errors import ConfigError

TIMES = {"seconds", "tokens_per_second"}
RUN = (
    "federated.rounds=20",
    "checkpoint.every_rounds=4",
    "eval.every_rounds=5",
    # As in tiny.py: the key bias's gradient is rounding alone, which a small eps would blow up.
    "client_optimizer.eps=1e-3",
    "server_optimizer.eps=1e-3",
)

# The command, in a process that records which token blocks it reads. They are not arrays, so reading otherwise fails.
RECORDED = """
import json, sys
import jax, numpy as np
from fedbert_jax import cli, main
from fedbert_jax.data import dataset

class Recorded:
    def __init__(self, tokens, name):
        self.tokens, self.name = tokens, name
        self.shape, self.dtype, self.nbytes, self.size = tokens.shape, tokens.dtype, tokens.nbytes, tokens.size
    def __len__(self):
        return len(self.tokens)
    def __getitem__(self, rows):
        with open(f"{sys.argv[sys.argv.index('--workdir') + 1]}.{self.name}.{jax.process_index()}", "a") as file:
            file.write(json.dumps(np.unique(np.arange(len(self))[rows]).tolist()) + "\\n")
        return self.tokens[rows]

load = dataset._load
def recorded(config, directory, *more):
    data, tokenizer = load(config, directory, *more)
    for name in ("train", "heldout"):
        blocks = getattr(data, name)
        object.__setattr__(blocks, "tokens", Recorded(blocks.tokens, name))
    return data, tokenizer
dataset._load = recorded
sys.argv = ["main"] + sys.argv[1:]
cli.run(main.main)
"""


def lines(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def plain(record: dict) -> dict:
    return {k: v for k, v in record.items() if k not in TIMES}


def rows_read(workdir: Path, name: str, process: int) -> set[int]:
    path = Path(f"{workdir}.{name}.{process}")
    return {row for line in path.read_text().splitlines() for row in json.loads(line)}


def assert_close(ours: list[dict], theirs: list[dict]) -> None:
    """Compares metrics up to float32 rounding, since an all-reduce adds in another order than one device does."""

    def numbers(value):
        if isinstance(value, dict):
            return [n for key in sorted(value.keys() - TIMES) for n in numbers(value[key])]
        return [value]

    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        np.testing.assert_allclose(numbers(a), numbers(b), rtol=2e-5, err_msg=f"round {b['round']}")


@pytest.mark.slow
def test_two_processes_killed_resumed_and_stopped_end_as_one_process_does(tmp_path):
    config = write_corpus(tmp_path, clients=4)
    reference, workdir = tmp_path / "one", tmp_path / "two"
    args = command(config, workdir, *RUN)
    alone = start_alone(command(config, reference, *RUN))

    # A fresh start, killed without warning.
    processes = start_two(args, program=RECORDED)
    wait_until(lambda: rounds_in(workdir) >= 6, processes)
    for p in processes:
        p.kill()
    codes, _, errors = finish(processes)
    assert codes == [-signal.SIGKILL] * 2, errors
    codes, said, errors = finish(alone)
    assert codes == [0], (said, errors)
    before, expected = lines(workdir)[:7], lines(reference)
    assert_close(before, expected[:7])

    # Each process has read its own clients' training blocks, and its own rows of a held-out batch.
    clients = json.loads((workdir / "data" / "meta.json").read_text())["clients"]
    starts = np.cumsum([0] + [c["train_blocks"] for c in clients])
    for process, (first, last) in enumerate(((0, 2), (2, 4))):
        read = rows_read(workdir, "train", process)
        assert read <= set(range(starts[first], starts[last])), f"process {process} has read others' text"
        assert {int(np.searchsorted(starts, row, side="right")) - 1 for row in read} == set(range(first, last))
    assert len(rows_read(workdir, "heldout", 1)) < sum(c["heldout_blocks"] for c in clients)

    # Again: the rounds since the last checkpoint come out bit for bit as before. Then one is told to stop, and both do.
    processes = start_two(args)
    wait_until(lambda: rounds_in(workdir) >= 9, processes)
    processes[1].send_signal(signal.SIGTERM)
    codes, said, errors = finish(processes)
    assert codes == [143, 143], (said, errors)
    assert "Traceback" not in errors[0] + errors[1]
    assert "resuming after round 4 of 20" in said[0] and "resuming" not in said[1]
    assert [plain(r) for r in lines(workdir)[5:7]] == [plain(r) for r in before[5:7]]
    stopped = int(said[0].split("stopped after round ")[1].split(";")[0])
    assert stopped == rounds_in(workdir) < 20

    # The rest in one process; then its export by two processes, with nothing else left to do.
    codes, said, errors = finish(start_alone(args))
    assert codes == [0], (said, errors)
    assert f"resuming after round {stopped} of 20" in said[0]
    assert_close(lines(workdir), expected)
    ours, theirs = (load_file(d / "hf" / "model.safetensors") for d in (workdir, reference))
    assert ours.keys() == theirs.keys()
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4, atol=2e-6, err_msg=name)
    shutil.rmtree(workdir / "hf")
    codes, said, errors = finish(start_two(args))
    assert codes == [0, 0], (said, errors)
    assert "model  " in said[0] and "model  " not in said[1]
    exported = load_file(workdir / "hf" / "model.safetensors")
    for name in theirs:
        np.testing.assert_array_equal(exported[name], ours[name])


@pytest.mark.slow
def test_a_process_that_fails_ends_the_other_with_its_exit_code(tmp_path):
    """Here the second process sees another directory, as on machines that share no file system."""
    config = write_corpus(tmp_path)
    codes, _, errors = finish(start_two(command(config, tmp_path / "w"), [], ["--workdir", str(tmp_path / "elsewhere")]))
    assert codes == [2, 2]
    assert "process 1 doesn't see what process 0 writes" in errors[1] and "file system that all processes share" in errors[1]
    assert errors[0].startswith("error: process 1 stopped: ")
    assert "Traceback" not in errors[0] + errors[1]


def test_a_coordinator_that_is_not_there_is_one_sentence(tmp_path):
    config = write_corpus(tmp_path)
    address = f"127.0.0.1:{free_port()}"
    flags = ["--distributed", "--coordinator", address, "--processes", "2", "--process", "1", "--join_timeout", "1"]
    done = run(*command(config, tmp_path / "w"), *flags)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: process 1 did not reach the coordinator, which is process 0, at {address} within 1 s (--join_timeout).\n"
    )
    assert not (tmp_path / "w").exists()


def test_a_lone_distributed_flag_needs_a_cluster_around_it(tmp_path):
    done = run(*command(write_corpus(tmp_path), tmp_path / "w"), "--distributed")
    assert done.returncode == 2
    assert "finds no TPU pod, SLURM or Open MPI job" in done.stderr and done.stderr.count("\n") == 1


def test_fine_tuning_is_refused(tmp_path):
    config = Path(__file__).parents[2] / "configs" / "finetune.py"
    done = run(*command(config, tmp_path / "w", f"model.init_from={tmp_path}"), "--distributed")
    assert done.returncode == 2
    assert "fine-tuning runs in one process" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "flags, said",
    [
        ((False, "a:1", None, None, 9), "--coordinator is for several processes; give --distributed, too"),
        ((False, None, None, 0, 9), "--process is for several processes"),
        ((True, "a:1", None, None, 9), "--coordinator without --processes and --process"),
        ((True, None, 2, 0, 9), "--processes and --process without --coordinator"),
        ((True, "a", 2, 0, 9), "--coordinator=a: accepted: HOST:PORT"),
        ((True, ":80", 2, 0, 9), "accepted: HOST:PORT"),
        ((True, "a:99999", 2, 0, 9), "accepted: HOST:PORT"),
        ((True, "a:1", 0, 0, 9), "--processes=0: accepted: an integer of at least 1"),
        ((True, "a:1", 2, 2, 9), "--process=2: accepted: 0 to 1"),
        ((True, "a:1", 2, -1, 9), "--process=-1: accepted: 0 to 1"),
        ((True, None, None, None, 0), "--join_timeout=0"),
    ],
)
def test_flags_that_do_not_fit_are_refused_in_one_sentence(flags, said):
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")) as refused:
        processes.check_flags(*flags)
    assert "\n" not in str(refused.value)


def test_flags_that_fit():
    assert processes.check_flags(False, None, None, None, 300) is None
    assert processes.check_flags(True, None, None, None, 300) == (None, None, None, 300)
    assert processes.check_flags(True, "[::1]:80", 2, 1, 5) == ("[::1]:80", 2, 1, 5)


def test_one_process_waits_for_nobody():
    assert processes.first() and not processes.several()
    assert processes.share(lambda: "mine") == "mine"
    processes.check_same("config", {"seed": 1})


def test_a_signal_that_another_process_told_of_first_does_not_end_this_one():
    """`tpu_vm.sh stop` signals one host after another; this one may be saving its checkpoint by then."""
    with Interrupts() as interrupts:
        interrupts.received = signal.SIGTERM  # as `settle` leaves it
        signal.raise_signal(signal.SIGTERM)  # its own first signal; taken for a second, it would end the process
        assert interrupts.settle() == signal.SIGTERM and interrupts.exit_code == 143


def test_in_a_thread_somebody_else_says_whether_to_end():
    """A thread gets no signals, and may not handle any."""
    before, asked, seen = signal.getsignal(signal.SIGTERM), threading.Event(), []

    def run() -> None:
        with Interrupts(asked.is_set) as interrupts:
            seen.append((interrupts.received, interrupts.stop(), interrupts.exit_code))
            asked.set()
            seen.append((interrupts.received, interrupts.stop(), interrupts.exit_code))
            asked.clear()
            seen.append((interrupts.received, interrupts.settle(), interrupts.exit_code))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    end = (signal.SIGTERM, True, 143)
    assert seen == [(None, False, 128), end, (signal.SIGTERM, signal.SIGTERM, 143)]
    assert signal.getsignal(signal.SIGTERM) is before

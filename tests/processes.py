"""Starts the training command and waits for it: alone, or in two processes on the loopback."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from forking import environment, start

# The tests compile much and compute little: LLVM need not optimise, and older emitters are quicker; each halves the time.
# Parts of a program that are compiled side by side cost more altogether, and the cores have other tests to run.
FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if metadata.version("jaxlib").startswith("0.10."):  # later versions end the process at a flag that they don't know
    FLAGS += " --xla_cpu_use_fusion_emitters=false"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_alone(args: list[str], devices: int = 1) -> list[subprocess.Popen]:
    """Starts a command in one process, with `devices` of XLA's fake CPU devices."""
    env = environment() | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {FLAGS}"}
    return [start(args, env)]


def start_two(args: list[str], *more: list[str], program: str | None = None) -> list[subprocess.Popen]:
    """Starts `args` as processes 0 and 1, with two devices each.

    Args:
      args: the training command.
      more: further arguments for each process.
      program: Python code to run instead of `-m fedbert_jax.main`.
    """
    flags = ["--distributed", "--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2"]
    if program:
        args = [sys.executable, "-c", program, *args[3:]]
    each = [[*args, *flags, "--process", str(n), *(more[n] if more else [])] for n in range(2)]
    return [process for a in each for process in start_alone(a, devices=2)]


def finish(processes: list[subprocess.Popen], timeout: float = 240) -> tuple[list[int], list[str], list[str]]:
    """Waits for all processes; returns their exit codes, their output, and their errors."""
    try:
        ends = [p.communicate(timeout=timeout) for p in processes]
    finally:
        for p in processes:
            p.kill()
    return [p.returncode for p in processes], [out for out, _ in ends], [err for _, err in ends]


def wait_until(condition: Callable[[], bool], processes: list[subprocess.Popen], timeout: float = 120) -> None:
    until = time.monotonic() + timeout
    while not condition() and all(p.poll() is None for p in processes):
        assert time.monotonic() < until
        time.sleep(0.01)


def rounds_in(workdir: Path) -> int:
    """Finished rounds in metrics.jsonl."""
    path = workdir / "metrics.jsonl"
    return max(0, path.read_text().count("\n") - 1) if path.exists() else 0

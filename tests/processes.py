"""The training command in two processes on the loopback, each with two of XLA's fake CPU devices."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from corpus import environment

DEVICES = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(args: list[str], *more: list[str], program: str | None = None) -> list[subprocess.Popen]:
    """Starts `args` as processes 0 and 1; `more` are arguments of each alone, `program` is Python to run for `-m ...`."""
    flags = ["--distributed", "--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2"]
    if program:
        args = [sys.executable, "-c", program, *args[3:]]
    env = environment() | {"XLA_FLAGS": DEVICES}
    return [
        subprocess.Popen(
            [*args, *flags, "--process", str(n), *(more[n] if more else [])],
            env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for n in range(2)
    ]  # fmt: skip


def finish(processes: list[subprocess.Popen], timeout: float = 120) -> tuple[list[int], list[str], list[str]]:
    """Waits for both; returns their exit codes, what they said, and their errors."""
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

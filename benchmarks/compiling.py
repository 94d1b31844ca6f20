"""`python -m benchmarks.compiling`: how long a round takes to compile, and a step of it then, by how it is compiled.

Each way is a process of its own, with no compilation cache. A process that takes longer than `--limit` is ended, and its row
says so. Beside the times stands what XLA counts in the program: GFLOP, GB that are read and written, MB of temporaries. It
counts a loop's body once, so these compare programs with the same loops.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import machine
from benchmarks.sizes import SIZES
from benchmarks.tables import markdown

ROUNDS = 5  # after the first one


def measure(size: str, strategy: str, unroll: bool) -> dict[str, Any]:
    """Compiles a round in this process; returns its seconds, the milliseconds of a step, XLA's counts, and the device."""
    import jax

    from benchmarks.jax_sides import start_round

    chosen, seconds = dataclasses.replace(SIZES[size], unroll=unroll), []
    compiled, state, cohort, compiling = start_round(chosen, strategy, chosen.steps)
    for _ in range(1 + ROUNDS):
        start = time.perf_counter()
        state, metrics = compiled(state, cohort)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - start)
    cost, temporaries = compiled.cost_analysis(), compiled.memory_analysis().temp_size_in_bytes
    return {
        "compiling": compiling,
        "ms": 1e3 * statistics.median(seconds[1:]) / chosen.steps,
        "gflop": 1e-9 * cost["flops"],
        "gb": 1e-9 * cost["bytes accessed"],
        "temporary_mb": 1e-6 * temporaries,
        "device": jax.devices()[0].device_kind,
    }


def in_a_process(size: str, strategy: str, unroll: bool, flags: str, limit: float) -> dict[str, Any] | None:
    """Returns what `measure` finds in a new process with these XLA flags; None if that takes longer than `limit` seconds.

    Raises:
      SystemExit: if the process fails; it has said why.
    """
    command = [sys.executable, "-m", "benchmarks.compiling", "--size", size, "--strategies", strategy, "--here"]
    env = os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip(),
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    try:
        done = subprocess.run(
            command + ["--scanned"] * (not unroll),
            env=env,
            cwd=Path(__file__).parents[1],
            timeout=limit,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None
    if done.returncode:
        raise SystemExit(f"{strategy}: its process ended with status {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def _shown(found: dict[str, Any]) -> tuple[str, ...]:
    counts = f"{found['gflop']:.2f}", f"{found['gb']:.3f}", f"{found['temporary_mb']:.0f}"
    return f"{found['compiling']:.1f}", f"{found['ms']:.1f}", *counts


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compiling", description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="base", help="(default: base)")
    parser.add_argument("--strategies", default="centralized,parallel,parallel-gradients", help="(default: %(default)s)")
    parser.add_argument("--flags", action="append", default=[], help="XLA flags to try beside none; may be repeated")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds that a process may take (default: 600)")
    parser.add_argument("--scanned", action="store_true", help="only with model.unroll_layers=False")
    parser.add_argument("--here", action="store_true", help="one way, in this process, as JSON")
    args = parser.parse_args(arguments)
    strategies = args.strategies.split(",")
    if args.here:
        print(json.dumps(measure(args.size, strategies[0], not args.scanned)))
        return
    console, rows, device = Console(soft_wrap=True), [], ""
    for strategy in strategies:
        for unroll in (False,) if args.scanned else (True, False):
            for flags in ("", *args.flags):
                found = in_a_process(args.size, strategy, unroll, flags, args.limit)
                device = found["device"] if found else device
                way = (strategy, "unrolled" if unroll else "scanned", flags or "none")
                rows.append((*way, *(_shown(found) if found else (f"more than {args.limit:.0f}", *[""] * 4))))
                console.print(f"{' '.join(rows[-1])}", markup=False, highlight=False)
    counts = ("GFLOP:", "GB moved:", "temporaries, MB:")
    table = markdown(("strategy", "layers", "XLA flags", "compiling, s:", "a step, ms:", *counts), rows)
    facts = machine.describe(machine.facts(machine.limit_cores(None)))
    console.print(f"\n{table}\n\n{args.size}; {device}; {facts}", markup=False, highlight=False)


if __name__ == "__main__":
    main()

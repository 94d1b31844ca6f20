"""`python -m benchmarks.breakdown`: where a round's time goes, part by part, from a trace of the compiled program."""

from __future__ import annotations

import argparse
import collections
import json
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.sizes import SIZES, Size

PARTS = ("mask", "embed", "uplink", "transform", "downlink", "predict", "update", "aggregate")
OTHER = "other"


def part_of(op_name: str) -> str:
    """Returns which part of a step an operation belongs to, by the innermost of its named scopes."""
    found = [(match.start(), match[0]) for match in re.finditer(rf"\b({'|'.join(PARTS)})\b", op_name)]
    return max(found)[1] if found else OTHER


def parts_of_program(hlo: str) -> dict[str, str]:
    """Returns the part of each instruction of an optimised program, by the instruction's name."""
    lines = re.finditer(r"%?([\w.-]+) = [^\n]*?metadata=\{[^}]*?op_name=\"([^\"]*)\"", hlo)
    return {m[1]: part_of(m[2]) for m in lines}


def measure(size: Size, strategy: str, local_steps: int, rounds: int) -> dict[str, float]:
    """Returns the milliseconds of a step that the device spends in each part; threads' times are added up."""
    import jax

    from benchmarks.jax_sides import start_round

    compiled, state, cohort, _ = start_round(size, strategy, local_steps)
    parts = parts_of_program(compiled.as_text())
    state, metrics = compiled(state, cohort)
    jax.block_until_ready(metrics)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(rounds):
                state, metrics = compiled(state, cohort)
            jax.block_until_ready((state, metrics))
        (trace,) = Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(trace)).planes
        total: collections.Counter[str] = collections.Counter()
        for plane in planes:
            for line in plane.lines:
                for event in line.events:
                    if event.name in parts and not event.name.startswith(("while", "call")):  # they contain the others
                        total[parts[event.name]] += event.duration_ns
    return {part: 1e-6 * total[part] / (rounds * local_steps) for part in (*PARTS, OTHER)}


def bandwidth(numbers: int, repeats: int = 7) -> float:
    """Returns the bytes per second that the device reads and writes when it adds two float32 arrays of `numbers` numbers."""
    import jax
    import jax.numpy as jnp

    add = jax.jit(lambda x, y: x + y, donate_argnums=0)
    x, y = jnp.zeros(numbers), jnp.ones(numbers)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        x = jax.block_until_ready(add(x, y))
        seconds.append(time.perf_counter() - start)
    return 12 * numbers / statistics.median(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.breakdown", description=__doc__)
    parser.add_argument("--strategy", nargs="+", default=["centralized", "parallel"], help="(default: both)")
    parser.add_argument("--local-steps", type=int, default=8, help="(default: 8)")
    parser.add_argument("--rounds", type=int, default=3, help="traced rounds (default: 3)")
    parser.add_argument("--size", choices=SIZES, default="small", help="fast: tiny, for debugging this program")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results there, too")
    args = parser.parse_args()
    machine.keep_freed_memory()
    facts = machine.facts(machine.limit_cores(None))
    found: dict[str, Any] = {name: measure(SIZES[args.size], name, args.local_steps, args.rounds) for name in args.strategy}
    size = SIZES[args.size]
    numbers = size.vocab * size.hidden  # in a word table
    speed = bandwidth(size.clients * numbers)
    if args.json:
        result = {
            "benchmark": "breakdown",
            "machine": facts,
            "milliseconds_a_step": found,
            "bytes_a_second": speed,
        }
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    table = Table(box=box.MARKDOWN)
    table.add_column("part of a step")
    for name in found:
        table.add_column(f"{name}, ms", justify="right")
        table.add_column("share", justify="right")
    for part in (*PARTS, OTHER):
        cells = ((f"{ms[part]:.1f}", f"{ms[part] / sum(ms.values()):.0%}") for ms in found.values())
        table.add_row(part, *(cell for pair in cells for cell in pair))
    console = Console(width=200)
    console.print(table)
    console.print("Times of the operations as traced, those on several threads added up.", highlight=False)
    # AdamW reads parameters, gradients and two moments, and writes all but the gradients: 28 bytes per number.
    least = 1e3 * 28 * numbers / speed
    console.print(
        f"Adding arrays moves {1e-9 * speed:.1f} GB/s here. At that, AdamW of one word table takes {least:.1f} ms at least, "
        f"and of {size.clients} clients' {size.clients * least:.1f} ms.",
        highlight=False,
    )
    console.print(machine.describe(facts), highlight=False)


if __name__ == "__main__":
    main()

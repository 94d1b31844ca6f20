"""`python -m benchmarks.step`: training speed, of fedbert_jax against itself and against torch, on this machine's CPU.

Medians of paired, interleaved ratios in one process. benchmarks/README.md says what each row compares and why it is fair.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.pairs import Row, Side, compare
from benchmarks.sizes import SIZES, Size

LOCAL_STEPS = 8
HF_STEPS = 2  # a call: its steps are long enough already
ROWS = (
    Row("parallel/centralized", "parallel-8", "centralized-8", 0.85),
    Row("parallel/centralized, averaging every step", "parallel-1", "centralized-1"),
    Row("parallel/HF", "parallel-8", "hf-16", 1.8),
    Row("parallel/HF, loop over clients", "parallel-8", "hf-2", 1.8),
    Row("centralized/HF", "centralized-8", "hf-16", 1.8),
    Row("centralized/HF, loop over clients", "centralized-8", "hf-2", 1.8),
    Row("parallel/torch split", "parallel-8", "split", 1.0),
    Row("centralized/torch gather", "centralized-8", "gather"),
)


def make_side(name: str, size: Size, compiled: bool) -> Side:
    """Builds a side by the name that `ROWS` gives it."""
    if name.startswith(("parallel", "centralized")):
        from benchmarks.jax_sides import round_side

        strategy, _, steps = name.partition("-")
        return round_side(size, strategy, int(steps))
    from benchmarks import torch_sides as torch_

    sides: dict[str, Callable[[], Side]] = {
        "hf-16": lambda: torch_.hf_side(size, HF_STEPS, size.rows, compiled),
        "hf-2": lambda: torch_.hf_side(size, HF_STEPS, size.batch, compiled),
        "gather": lambda: torch_.gather_side(size, LOCAL_STEPS, compiled),
        "split": lambda: torch_.split_side(size, LOCAL_STEPS, compiled),
    }
    return sides[name]()


def measure(
    size: Size, samples: int, rows: Sequence[Row], compiled: bool = False, note: Callable[[str], None] = print
) -> dict[str, Any]:
    """Measures rows; returns `rows` and `sides`, which JSON can hold."""
    sides: dict[str, Side] = {}
    results = []
    for n, row in enumerate(rows):
        for name in (row.a, row.b):
            if name not in sides:
                sides[name] = make_side(name, size, compiled)
        note(f"{row.name} ...")
        results.append(compare(row, sides[row.a], sides[row.b], size.tokens, samples))
        later = {name for other in rows[n + 1 :] for name in (other.a, other.b)}
        for name in (row.a, row.b):
            if name not in later:
                sides[name].run = _used_up  # frees its model
    return {
        "rows": results,
        "sides": [
            {"name": s.name, "compile_seconds": s.compile_seconds, "initial_loss": s.initial_loss, "losses": s.losses}
            for s in sides.values()
        ],
    }


def _used_up() -> float:
    raise RuntimeError("this side's model was freed after the last row that needed it")


def rows_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Returns the rows that `compare` measured as a Markdown table."""
    table = Table(box=box.MARKDOWN)
    for column in ("A / B", "A", "B", "A, ms", "B, ms", "speed ratio", "quartiles", "target", "met"):
        table.add_column(column)
    for row in rows:
        target = "" if row["target"] is None else f"≥ {row['target']}"
        met = {None: "", True: "yes", False: "no"}[row["met"]]
        low, high = row["quartiles"]
        table.add_row(
            row["name"], row["a"], row["b"], f"{row['a_ms']:.0f}", f"{row['b_ms']:.0f}", f"{row['ratio']:.2f}",
            f"{low:.2f}–{high:.2f}", target, met,
        )  # fmt: skip
    return table


def show(result: dict[str, Any], console: Console) -> None:
    """Prints a result as Markdown."""
    console.print(rows_table(result["rows"]))
    size = result["settings"]["size"]
    console.print(
        f"ms: for one global batch of {size['clients']} clients x {size['batch']} sequences x {size['length']} tokens. "
        f"Model {size['hidden']}x{size['layers']}, vocabulary {size['vocab']}, float32, AdamW, no clipping on either side. "
        f"{result['settings']['samples']} pairs a row.",
        highlight=False,
    )
    times = "; ".join(f"{s['name']} {s['compile_seconds']:.1f} s" for s in result["sides"])
    console.print(f"Compiling (torch: the first call): {times}.", highlight=False)
    console.print(machine.describe(result["machine"]), highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("--samples", type=int, default=7, help="pairs a row (default: 7)")
    parser.add_argument("--threads", type=int, help="cores to use, by JAX and torch alike (default: all)")
    parser.add_argument("--size", choices=SIZES, default="small", help="fast: tiny, for debugging this program")
    parser.add_argument("--only", metavar="NAME", action="append", help="rows whose name holds NAME; may be repeated")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results there, too")
    parser.add_argument("--malloc", choices=("keep", "default"), default="keep",
                        help="keep: freed memory stays with the process, for all sides (default)")  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="use torch.compile, which needs a C++ compiler")
    args = parser.parse_args()
    if args.samples < 1:
        parser.error(f"--samples {args.samples}: accepted: at least 1")
    rows = [row for row in ROWS if not args.only or any(name in row.name for name in args.only)]
    if not rows:
        parser.error(f"--only {' '.join(args.only)}: accepted: parts of " + "; ".join(row.name for row in ROWS))
    if args.compile and not (shutil.which("g++") or shutil.which("clang++")):
        parser.error("--compile: there is no C++ compiler (g++ or clang++) here")
    if args.malloc == "keep":
        machine.keep_freed_memory()
    cores = machine.limit_cores(args.threads)
    facts = machine.facts(cores)
    import jax
    import torch

    jax.config.update("jax_platforms", "cpu")  # torch's wheel is the CPU's: like with like
    torch.set_num_threads(cores)
    size, console = SIZES[args.size], Console(width=200)
    result = measure(size, args.samples, rows, args.compile, lambda text: Console(stderr=True).print(text, style="dim"))
    settings = vars(args) | {"size": vars(size), "json": None}
    result = {"benchmark": "step", "machine": facts, "settings": settings} | result
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    show(result, console)


if __name__ == "__main__":
    main()

"""`python -m benchmarks.against CHECKOUT`: fedbert_jax here against fedbert_jax in another checkout, in pairs.

Steps are timed as the suites time them, each side in a process of its own. Compiling is timed in new processes, one of each
checkout in turn. Both use the packages of this environment.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks import machine
from benchmarks.pairs import Row, compare, quartiles
from benchmarks.sides import JAX
from benchmarks.sizes import SIZES
from benchmarks.tables import markdown
from benchmarks.worker import ROOT, remote_side


def steps(name: str, size: str, other: Path, samples: int) -> tuple[str, ...]:
    """Returns a side's name, its milliseconds per step here and there, and how many times as fast it is here."""
    here = remote_side(name, SIZES[size])
    there = remote_side(name, SIZES[size], other)
    try:
        found = compare(Row(name, name, name, size=size), here, there, SIZES[size].tokens, samples)
    finally:
        here.close()
        there.close()
    low, high = found["quartiles"]
    return name, f"{found['a_ms']:.1f}", f"{found['b_ms']:.1f}", f"{found['value']:.3f}", f"{low:.3f} to {high:.3f}"


def compiling(name: str, size: str, other: Path, samples: int) -> tuple[str, ...]:
    """Returns a side's name, the seconds that its round takes to compile here and there, and theirs over ours."""
    pairs = []
    for sample in range(samples):
        seconds = {}
        for checkout in (ROOT, other) if sample % 2 == 0 else (other, ROOT):
            side = remote_side(name, SIZES[size], checkout)
            side.close()
            seconds[checkout] = side.compile_seconds
        pairs.append((seconds[ROOT], seconds[other]))
    ratios = [there / here for here, there in pairs]
    low, high = quartiles(ratios)
    here, there = (statistics.median(side) for side in zip(*pairs, strict=True))
    return name, f"{here:.2f}", f"{there:.2f}", f"{statistics.median(ratios):.3f}", f"{low:.3f} to {high:.3f}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.against", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "checkout", type=Path, metavar="CHECKOUT", help="a folder with another commit, made by `git worktree add`"
    )
    parser.add_argument("--sides", default="centralized,parallel", help="(default: %(default)s)")
    parser.add_argument("--size", choices=SIZES, default="small", help="of the steps that are timed (default: small)")
    parser.add_argument("--compiled", choices=SIZES, default="base", help="of the round that is compiled (default: base)")
    parser.add_argument("--samples", type=int, default=7, help="pairs (default: 7)")
    args = parser.parse_args(arguments)
    other, names = args.checkout.resolve(), args.sides.split(",")
    if not (other / "benchmarks" / "worker.py").is_file():
        parser.error(f"CHECKOUT: {args.checkout}: accepted: a folder that has benchmarks/worker.py")
    if wrong := [name for name in names if name not in JAX]:
        parser.error(f"--sides: {wrong[0]}: accepted: {', '.join(JAX)}")
    if args.samples < 1:
        parser.error(f"--samples: {args.samples}: accepted: from 1 on")
    machine.keep_freed_memory()
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    print(machine.describe(machine.facts(machine.limit_cores(None))))
    columns = ("here:", "there:", "there / here:", "quartiles:")
    for title, measure, size in (("ms a step", steps, args.size), ("s to compile", compiling, args.compiled)):
        try:
            rows = [measure(name, size, other, args.samples) for name in names]
        except RuntimeError as e:  # the side's process has said more
            raise SystemExit(str(e)) from e
        print("\n" + markdown((f"{size}, {title}", *columns), rows), flush=True)


if __name__ == "__main__":
    main()

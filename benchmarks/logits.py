"""`python -m benchmarks.logits`: what `model.logits_at_once` saves in memory and costs in time."""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import machine
from benchmarks.sizes import SIZES, Size
from benchmarks.tables import markdown

# BERT-tiny: its body is so small that the word table and its logits dominate.
TINY = dataclasses.replace(SIZES["small"], hidden=128, layers=2, heads=2, batch=64)
STRATEGIES = ("centralized", "parallel")
CHUNKS = (1, 2, 4, 8)


def measure(size: Size, samples: int) -> list[dict[str, Any]]:
    """Times rounds of one step, all variants in turn; memory is the compiler's count for a round's temporary arrays."""
    import jax

    from benchmarks.jax_sides import start_round

    runs = [(strategy, chunks, start_round(size, strategy, 1, chunks)) for strategy in STRATEGIES for chunks in CHUNKS]
    states = [started.state for *_, started in runs]
    seconds: list[list[float]] = [[] for _ in runs]
    for sample in range(samples + 1):  # the first is not counted
        for n, (*_, started) in enumerate(runs):
            start = time.perf_counter()
            states[n], metrics = started.compiled(states[n], started.cohort)
            jax.block_until_ready((states[n], metrics))
            if sample:
                seconds[n].append(time.perf_counter() - start)
    results = []
    for (strategy, chunks, started), times in zip(runs, seconds, strict=True):
        whole = (size.rows if strategy == "centralized" else size.batch) * size.masked
        results.append(
            {
                "strategy": strategy,
                "logits_at_once": -(-whole // chunks),
                "ms": 1e3 * statistics.median(times),
                "temporary_mb": 1e-6 * started.compiled.memory_analysis().temp_size_in_bytes,
            }
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.logits", description=__doc__)
    parser.add_argument("--samples", type=int, default=5, help="rounds of each (default: 5)")
    parser.add_argument("--size", choices=("fast",), help="fast: tiny, for debugging this program")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results there, too")
    args = parser.parse_args()
    machine.keep_freed_memory()
    facts = machine.facts(machine.limit_cores(None))
    results = measure(SIZES["fast"] if args.size else TINY, args.samples)
    if args.json:
        args.json.write_text(json.dumps({"benchmark": "logits", "machine": facts, "results": results}, indent=2) + "\n")
    cells = [[r["strategy"], f"{r['logits_at_once']:,}", f"{r['ms']:.0f}", f"{r['temporary_mb']:,.0f}"] for r in results]
    console = Console(width=200)
    console.print(markdown(["strategy", "positions of a client at once:", "ms:", "temporary memory, MB:"], cells))
    console.print(machine.describe(facts), highlight=False)


if __name__ == "__main__":
    main()

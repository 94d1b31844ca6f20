"""`python -m benchmarks --suite cpu|gpu`: training speed of fedbert_jax against itself, against torch and against plain JAX.

Medians of paired, interleaved ratios. benchmarks/README.md says what each row compares and why it is fair.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import machine, measure, tables
from benchmarks.pairs import Row
from benchmarks.sizes import Size
from benchmarks.suites import SUITES


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line; adds `rows` and `sizes`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add = parser.add_argument
    add("--suite", choices=SUITES, help="what to measure")
    add("--list", action="store_true", help="print all suites' rows and targets, and end")
    add("--only", metavar="NAME", action="append", help="rows whose 'size: name' holds NAME; may be repeated")
    add("--samples", type=int, default=7, help="pairs a row (default: 7)")
    add("--json", metavar="FILE", type=Path, help="write the record there after each row; one that is there is gone on with")
    add("--plot", metavar="FILE.png", type=Path, help="draw the record's ratios there")
    add("--results", metavar="FILE.md", type=Path, help="write the record's tables into the suite's block there")
    add(
        "--batch",
        metavar="SIZE=N",
        action="append",
        default=[],
        help="sequences a client at a size, such as base-512=2; may be repeated",
    )
    add(
        "--processes",
        choices=("one", "two", "turns"),
        help="where a pair's sides live: in one process (default: cpu), each in its own (default: gpu), or each in its own "
        "that ends while the other runs, where the device's memory doesn't hold both",
    )
    add("--no-memory", action="store_true", help="with one process: don't start each side once more to see its peak memory")
    add("--add-memory", action="store_true", help="measure no row: only the peak memory that sides in the record lack")
    add("--threads", type=int, help="cores to use, by JAX and torch alike (default: all)")
    add("--size", choices=("fast",), help="fast: all rows at a tiny size on any device, to debug this program")
    args = parser.parse_args(arguments)
    if args.list:
        return args
    if args.suite is None:
        parser.error("--suite: accepted: " + ", ".join(SUITES))
    if args.samples < 1:
        parser.error(f"--samples {args.samples}: accepted: at least 1")
    suite, fast = SUITES[args.suite], args.size == "fast"
    args.processes = args.processes or suite.processes
    args.sizes = suite.sizes(fast)
    for change in args.batch:
        name, _, number = change.partition("=")
        if name not in args.sizes or not number.isdigit() or int(number) < 1:
            parser.error(f"--batch {change}: accepted: SIZE=N with SIZE one of {', '.join(args.sizes)} and N at least 1")
        args.sizes[name] = dataclasses.replace(args.sizes[name], batch=int(number))
    args.all_rows = suite.rows_at(fast)
    args.rows = [r for r in args.all_rows if not args.only or any(part in f"{r.size}: {r.name}" for part in args.only)]
    if args.add_memory and not (args.json and args.json.exists()):
        parser.error(f"--add-memory: accepted with --json FILE, a record that is there, not {args.json}")
    if not args.rows:
        names = "; ".join(f"{r.size}: {r.name}" for r in args.all_rows)
        parser.error(f"--only {' '.join(args.only)}: accepted: parts of {names}")
    return args


def find_ceiling(size: Size, fast: bool) -> dict[str, Any]:
    """Measures the device's matmul ceiling in a process of its own, which leaves nothing behind on the device."""
    n = 256 if fast else 8192 if size.device == "gpu" else 2048
    command = [sys.executable, "-m", "benchmarks.ceiling", "--dtype", size.dtype, "--device", size.device, "--n", str(n)]
    done = subprocess.run(
        [*command, "--seconds", "0.2" if fast else "2"],
        stdout=subprocess.PIPE,
        check=False,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    if done.returncode:
        raise SystemExit(f"the matmul ceiling can't be measured: status {done.returncode}")
    return json.loads(done.stdout)


def run(args: argparse.Namespace, ceiling: dict[str, Any], cores: int, console: Console) -> int:
    """Measures the rows that `parse` read, writes and prints the results; returns the exit code."""
    facts = measure.suite_facts(cores, args.processes, args.samples, ceiling)
    used = {name: size for name, size in args.sizes.items() if name in {row.size for row in args.rows}}
    record = measure.open_record(args.json, args.suite, used, facts)
    note = lambda text: Console(stderr=True).print(text, style="dim", markup=False, highlight=False)  # noqa: E731
    bench = measure.Bench(args.sizes, args.samples, args.processes, ceiling["flops"], not args.no_memory, note)

    def save(record: measure.Record) -> None:
        if args.json:
            args.json.write_text(json.dumps(record, indent=1) + "\n")

    if args.add_memory:
        if all(r["date"] != facts["date"] for r in record["rows"]):
            del record["machines"][facts["date"]]
        measure.add_memory(record, args.sizes, args.rows, save, note)
    else:
        measure.run(bench, record, args.rows, save)
    suite = SUITES[args.suite]
    if args.results:
        tables.update_block(args.results, args.suite, tables.report(suite, record, args.all_rows))
    if args.plot:
        from benchmarks import chart

        device = facts["cpu"] if ceiling["platform"] == "cpu" else ceiling["device"]
        args.plot.write_bytes(chart.draw(ordered(record, args.all_rows), f"{device}, {facts['date']}"))
    console.print(tables.report(suite, record, args.rows), markup=False, highlight=False, soft_wrap=True)
    failed = [r for r in record["rows"] if "failed" in r and r["date"] == facts["date"]]
    for r in failed:
        note(f"{r['size']}: {r['name']}: failed: {r['failed']}")
    return 1 if failed else 0


def caching(processes: str, rows: Sequence[Row], folder: str) -> dict[str, str]:
    """Returns the environment that says what JAX keeps of compiled programs.

    A side with a process of its own may be ended and started again: only its first start compiles then, and that time is
    reported. Where a row times compiling several times, nothing is kept.
    """
    if processes == "one" or any(row.kind == "seconds" for row in rows):
        return {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    return {"JAX_COMPILATION_CACHE_DIR": folder, "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES": "none"}


def ordered(record: measure.Record, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Returns the record's results in the suite's order."""
    found = {(r["size"], r["name"]): r for r in record["rows"]}
    return [found[row.size, row.name] for row in rows if (row.size, row.name) in found]


def main() -> None:
    args = parse()
    console = Console()
    if args.list:
        console.print(tables.listing(), markup=False, highlight=False, soft_wrap=True)
        return
    if args.suite == "cpu":
        machine.keep_freed_memory()
    cores = machine.limit_cores(args.threads)
    cache = tempfile.TemporaryDirectory(prefix="benchmarks-")
    os.environ |= caching(args.processes, args.rows, cache.name)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # two processes share the GPU
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if args.suite == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    ceiling = find_ceiling(args.sizes[args.rows[0].size], args.size == "fast")
    if args.suite == "gpu" and args.size != "fast" and ceiling["platform"] != "gpu":
        raise SystemExit(f"--suite gpu: JAX sees no GPU here, only {ceiling['device']}; accepted: a machine with one.")
    if args.processes == "one" and args.suite == "cpu":
        import torch

        torch.set_num_threads(cores)
    sys.exit(run(args, ceiling, cores, console))


if __name__ == "__main__":
    main()

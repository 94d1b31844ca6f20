"""`python -m benchmarks.bf16`: does bfloat16 arithmetic train as well as float32? The same run in both, over seeds.

By default the demo, shortened: eight clients on docstrings, two to four minutes a run on two cores. Each run has a workdir,
so the study can be stopped, and goes on. A seed decides the tokenizer and what is held out, too, so runs of one seed are
pairs. `--config.KEY=VALUE` changes both runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import machine
from benchmarks.tables import markdown

ROOT = Path(__file__).parents[1]
DTYPES = ("float32", "bfloat16")


def run_command(config: str, workdir: Path, dtype: str, seed: int, rounds: int, changes: Sequence[str]) -> list[str]:
    """Returns the command of one run."""
    settings = {"precision.compute_dtype": dtype, "seed": seed, "federated.rounds": rounds, "fill_mask": "()"}
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    return [sys.executable, "-m", "fedbert_jax.main", "--config", config, "--workdir", str(workdir), *flags, *changes]


def result_of(workdir: Path) -> dict[str, float]:
    """Returns a finished run's last held-out loss and accuracy, and the seconds of its rounds."""
    from fedbert_jax.metrics import read_metrics

    records = read_metrics(workdir / "metrics.jsonl")
    last = next(r for r in reversed(records) if "eval_loss" in r)
    return {
        "eval_loss": last["eval_loss"], "eval_accuracy": last["eval_accuracy"],
        "seconds": sum(r.get("seconds", 0.0) for r in records),
    }  # fmt: skip


def judge(runs: dict[str, dict[int, dict[str, float]]]) -> dict[str, Any]:
    """Compares final held-out losses.

    Args:
      runs: results by type and seed.

    Returns:
      `means` and `deviations` (of a sample, over seeds) by type; `differences`, bfloat16 - float32, of each seed, and
      their mean `difference`; `spread`, the larger deviation; `within`, whether the difference is no larger than that.
      Without a second seed there is no spread, and the last two are None.
    """
    losses = {dtype: [r["eval_loss"] for r in by_seed.values()] for dtype, by_seed in runs.items()}
    differences = [b - a for a, b in zip(losses["float32"], losses["bfloat16"], strict=True)]
    difference = statistics.mean(differences)
    several = len(differences) > 1
    deviations = {dtype: statistics.stdev(values) if several else None for dtype, values in losses.items()}
    spread = max(d for d in deviations.values() if d is not None) if several else None
    return {
        "means": {dtype: statistics.mean(values) for dtype, values in losses.items()}, "deviations": deviations,
        "differences": differences, "difference": difference, "spread": spread,
        "within": None if spread is None else abs(difference) <= spread,
    }  # fmt: skip


def report(result: dict[str, Any]) -> str:
    """Returns the study's table and its verdict, as Markdown."""
    runs, found = result["runs"], result["judgement"]
    rows = []
    for n, seed in enumerate(runs["float32"]):
        a, b = (runs[dtype][seed] for dtype in DTYPES)
        rows.append((
            str(seed), *(f"{r['eval_loss']:.4f}" for r in (a, b)), f"{found['differences'][n]:+.4f}",
            *(f"{r['eval_accuracy']:.1%}" for r in (a, b)), *(f"{r['seconds']:.0f}" for r in (a, b)),
        ))  # fmt: skip
    rows.append(("mean", *(f"{found['means'][d]:.4f}" for d in DTYPES), f"{found['difference']:+.4f}", "", "", "", ""))
    if found["spread"] is None:
        verdict = "One seed has no spread: run more."
    else:
        rows.append(("deviation", *(f"{found['deviations'][d]:.4f}" for d in DTYPES), "", "", "", "", ""))
        place = "within" if found["within"] else "outside"
        verdict = (
            f"The means differ by {abs(found['difference']):.4f}, {place} the seeds' spread (a standard deviation of "
            f"{found['spread']:.4f})."
        )
    columns = (
        "seed", "held-out loss, float32:", "bfloat16:", "difference:", "accuracy, float32:", "bfloat16:",
        "seconds, float32:", "bfloat16:",
    )  # fmt: skip
    settings = result["settings"]
    what = f"{settings['config']}, {settings['rounds']} rounds" + "".join(f", {c}" for c in settings["changes"])
    return "\n\n".join([markdown(columns, rows), verdict, f"{what}.\n{machine.describe(result['machine'])}"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bf16", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/demo.py", help="(default: configs/demo.py)")
    parser.add_argument("--workdir", type=Path, default=Path("runs/bf16"), help="(default: runs/bf16)")
    parser.add_argument("--seeds", type=int, default=3, help="(default: 3)")
    parser.add_argument("--rounds", type=int, default=100, help="of each run (default: 100)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results there, too")
    args, changes = parser.parse_known_args(arguments)
    if unknown := [c for c in changes if not c.startswith("--config.")]:
        parser.error(f"{unknown[0]}: accepted: the options above and --config.KEY=VALUE")
    if args.seeds < 1 or args.rounds < 1:
        parser.error("--seeds and --rounds: accepted: at least 1")
    facts = machine.facts(machine.limit_cores(None))
    runs: dict[str, dict[int, dict[str, float]]] = {dtype: {} for dtype in DTYPES}
    for seed in range(args.seeds):
        for dtype in DTYPES:
            workdir = args.workdir.resolve() / f"{dtype}-{seed}"
            command = run_command(args.config, workdir, dtype, seed, args.rounds, changes)
            if subprocess.run(command, cwd=ROOT, check=False).returncode:
                raise SystemExit("stopped; the same command goes on from there")
            runs[dtype][seed] = result_of(workdir)
    settings = {"config": args.config, "rounds": args.rounds, "changes": changes}
    result = {"benchmark": "bf16", "machine": facts, "settings": settings, "runs": runs, "judgement": judge(runs)}
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    Console().print(report(result), markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()

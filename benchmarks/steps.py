"""`python -m benchmarks.steps STUDY --arms ARM,...`: how long a study's runs take for 2,048 tokens, in turn.

Each pass starts every arm's command anew with seed 0, the second pass in the opposite order, and takes the median of its
rounds but the first three. A study's own runs, made beside other work and on other days, don't compare.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import machine
from benchmarks.studies import STUDIES
from benchmarks.study import ROOT, run_command
from benchmarks.tables import markdown

FIRST = 3  # rounds that are left out: caches fill
TOKENS = 2048


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.steps", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=STUDIES, metavar="STUDY", help=", ".join(STUDIES))
    parser.add_argument("--arms", metavar="ARM,...", help="(default: all)")
    parser.add_argument("--rounds", type=int, default=14, help=f"of a run, {FIRST} of which are left out (default: 14)")
    parser.add_argument("--passes", type=int, default=3, help="(default: 3)")
    args, more = parser.parse_known_args(arguments)
    if unknown := [word for word in more if not word.startswith("--config.")]:
        parser.error(f"{unknown[0]}: accepted: the options above and --config.KEY=VALUE")
    study = STUDIES[args.name]
    arms = args.arms.split(",") if args.arms else list(study.arms)
    if wrong := [arm for arm in arms if arm not in study.arms]:
        parser.error(f"--arms: {wrong[0]}: accepted: {', '.join(study.arms)}")
    if args.rounds <= FIRST or args.passes < 1:
        parser.error(f"accepted: --rounds above {FIRST}, and --passes from 1 on")
    settings = {"federated.rounds": args.rounds, "eval.every_rounds": 10 * args.rounds, "fill_mask": "()"}
    flags = [*(f"--config.{key}={value}" for key, value in settings.items()), *more]
    found: dict[str, list[float]] = {arm: [] for arm in arms}
    print(machine.describe(machine.facts(machine.limit_cores(None))))
    for turn in range(args.passes):
        for arm in arms if turn % 2 == 0 else arms[::-1]:
            with tempfile.TemporaryDirectory() as place:
                workdir = Path(place) / "run"
                command = run_command(study, study.arms[arm], 0, workdir, {}, flags)
                if code := subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL).returncode:
                    raise SystemExit(code)  # it has said why
                found[arm].append(milliseconds(workdir))
            print(f"{turn} {arm} {found[arm][-1]:.1f} ms", flush=True)
    rows = [(arm, f"{statistics.median(own):.1f}", ", ".join(f"{ms:.1f}" for ms in own)) for arm, own in found.items()]
    print("\n" + markdown(("", f"ms for {TOKENS:,} tokens:", "pass by pass:"), rows))


def milliseconds(workdir: Path) -> float:
    """Returns how long a run has taken for `TOKENS` tokens, the median over its rounds but the first few."""
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    rounds = [record for record in records if record["round"] > FIRST and "seconds" in record]
    tokens = rounds[-1]["tokens"] / rounds[-1]["round"]
    return statistics.median(1000 * record["seconds"] * TOKENS / tokens for record in rounds)


if __name__ == "__main__":
    main()

"""`python -m benchmarks.study NAME`: configs x seeds, then a comparison. benchmarks/studies.py says what each study runs.

It calls the commands that a user would. Each run has a workdir and a log in `runs/NAME`, so a stopped study can go on.
`--config.KEY=VALUE` changes every run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import machine
from benchmarks.studies import STUDIES, Arm, Study, Tasks
from benchmarks.tables import markdown
from fedbert_jax import cli
from fedbert_jax.study import all_of

ROOT = Path(__file__).parents[1]
CHECKPOINT, RANDOM = "checkpoint", "random"  # starts of fine-tuning beside the arms


def run_command(study: Study, arm: Arm, seed: int, workdir: Path, places: dict[str, Path], more: Sequence[str]) -> list[str]:
    """Returns the command of one pre-training run."""
    settings = {**study.changes, **arm.changes, "seed": seed}
    named = {name: str(path) for name, path in places.items()}
    flags = [f"--config.{key}={str(value).format(**named)}" for key, value in settings.items()]
    main = [sys.executable, "-m", "fedbert_jax.main", "--config", arm.config, "--workdir", str(workdir)]
    return [*main, *flags, *more]


def glue_command(model: Path, glue: Path, tasks: Tasks, seeds: int, workdir: Path, random: bool) -> list[str]:
    """Returns the command that fine-tunes a model on tasks."""
    command = [sys.executable, "-m", "fedbert_jax.glue", "--model", str(model), "--glue", str(glue)]
    command += ["--workdir", str(workdir), "--tasks", ",".join(tasks.names), "--epochs", str(tasks.epochs)]
    command += ["--learning-rate", str(tasks.rate), "--seeds", str(seeds)]
    return command + (["--random-start"] if random else [])


def audits(runs: dict[str, dict[int, Path]], root: Path, at_once: int, say: Any, text: Path | None) -> str:
    """Audits runs, with `text` as public text if there is any, and returns the price list as Markdown."""
    from fedbert_jax.report import audits, comparison

    workdirs = [path for by_seed in runs.values() for path in by_seed.values()]
    flags = [] if text is None else ["--public", f"text:{text}"]
    all_of(
        {f"audit-{path.name}": [sys.executable, "-m", "fedbert_jax.audit", *flags, str(path)] for path in workdirs},
        root,
        at_once,
        say,
        ROOT,
    )
    return audits.to_markdown(comparison.load_groups(workdirs))


# --- results ----------------------------------------------------------------------------------------------------------


def judge(losses: dict[str, dict[int, float]], baseline: str) -> dict[str, dict[str, Any]]:
    """Compares final held-out losses with the baseline's.

    Args:
      losses: by arm and seed.
      baseline: an arm.

    Returns:
      By arm: its `mean` and `deviation` (of a sample, over seeds); `differences` from the baseline, seed by seed, their mean
      `difference` and its standard error `error`; `within`, whether the difference is no larger than the larger deviation of
      the two. Without a second seed there is no spread, and values that depend on it are None.
    """
    found: dict[str, dict[str, Any]] = {}
    for arm, by_seed in losses.items():
        values = list(by_seed.values())
        differences = [value - losses[baseline][seed] for seed, value in by_seed.items()]
        several = len(values) > 1
        found[arm] = {
            "mean": statistics.mean(values),
            "deviation": statistics.stdev(values) if several else None,
            "differences": differences,
            "difference": statistics.mean(differences),
            "error": statistics.stdev(differences) / len(differences) ** 0.5 if several else None,
        }
    for own in found.values():
        spread = [own["deviation"], found[baseline]["deviation"]]
        own["within"] = None if None in spread else abs(own["difference"]) <= max(spread)
    return found


def values_of(workdir: Path, task: str, metric: str | None) -> list[float]:
    """Returns a task's number for each seed, in percent."""
    results = json.loads((workdir / task / "results.json").read_text())
    if metric is None:
        return [100 * v for v in results["values"]]
    return [100 * scores["dev"][metric] for scores in results["seeds"].values()]


def differs(a: list[float], b: list[float]) -> bool:
    """Whether two means over seeds are further apart than both standard deviations together."""
    return abs(statistics.mean(a) - statistics.mean(b)) > statistics.stdev(a) + statistics.stdev(b)


def heldout(model: Path, pretrained: Path) -> float:
    """Returns a model's MLM loss by text on a run's held-out blocks: the same blocks and masks for every model."""
    import jax

    from fedbert_jax import experiment
    from fedbert_jax.data.tokenizer import load_tokenizer
    from fedbert_jax.models import huggingface
    from fedbert_jax.workdir.paths import Workdir

    workdir = Workdir(pretrained)
    built = experiment.build(workdir.read_config(), workdir)
    if load_tokenizer(str(model)).get_vocab() != built.tokenizer.get_vocab():
        raise SystemExit(f"{model} has another vocabulary than {pretrained}: their losses can't be compared")
    client, server = jax.jit(built.simulation.setting.fresh)()
    client, server, _ = huggingface.from_tensors(huggingface.load_tensors(model)[0], client, server)
    scores = built.simulation.evaluate(built.simulation.state_of(client, server))
    built.simulation.close()
    assert scores is not None
    return scores.by_text.loss


def pretraining(study: Study, runs: dict[str, dict[int, Path]]) -> tuple[str, dict[str, Any]]:
    """Returns the comparison of a study's runs as Markdown, and the numbers behind it."""
    from fedbert_jax.report import comparison
    from fedbert_jax.report.runs import load_run

    groups = comparison.load_groups([path for by_seed in runs.values() for path in by_seed.values()])
    losses = {
        arm: {seed: load_run(path).final("eval_loss_by_text") or float("nan") for seed, path in by_seed.items()}
        for arm, by_seed in runs.items()
    }
    found = judge(losses, study.baseline)
    rows = []
    for arm, own in found.items():
        if arm == study.baseline:
            continue
        error = "" if own["error"] is None else f" ± {own['error']:.4f}"
        place = {None: "", True: "within", False: "outside"}[own["within"]]
        rows.append((arm, f"{own['difference']:+.4f}{error}", ", ".join(f"{d:+.4f}" for d in own["differences"]), place))
    columns = ("", f"loss by text minus {study.baseline}'s, and standard error:", "seed by seed:", "the seeds' spread")
    said = [comparison.to_markdown(groups), comparison.scope(groups), markdown(columns, rows) if rows else ""]
    return "\n\n".join(part for part in said if part), {"losses": losses, "judgement": found}


def finetuning(study: Study, starts: dict[str, Path], root: Path, pretrained: Path) -> tuple[str, dict[str, Any]]:
    """Returns the table of fine-tuning as Markdown, and the numbers behind it."""
    tasks = [(task, group.metric) for group in study.tasks for task in group.names]
    rows, numbers = [], {}
    for start, model in starts.items():
        found = {task: values_of(root / f"glue-{start}", task, metric) for task, metric in tasks}
        loss = None if start == RANDOM else heldout(model, pretrained)
        numbers[start] = {"heldout_loss": loss, "tasks": found}
        base = numbers[next(iter(starts))]["tasks"]
        cells = []
        for task, values in found.items():
            star = " *" if start != next(iter(starts)) and len(values) > 1 and differs(values, base[task]) else ""
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.median(values):.1f}{spread}{star}")
        rows.append((start, "" if loss is None else f"{loss:.3f}", *cells))
    first = next(iter(starts))
    columns = ("start", "held-out MLM loss by text:", *(f"{t}{', ' + m if m else ''}:" for t, m in tasks))
    note = (
        "Medians and standard deviations over seeds of fine-tuning, dev sets, last epoch. A star: the mean differs from "
        f"that of the start `{first}` by more than both standard deviations together."
    )
    return f"{markdown(columns, rows)}\n\n{note}", numbers


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"{name}: {study.about}" for name, study in STUDIES.items()),
    )
    parser.add_argument("name", choices=STUDIES, metavar="NAME", help=", ".join(STUDIES))
    parser.add_argument("--workdir", type=Path, help="(default: runs/NAME)")
    parser.add_argument("--seeds", type=int, help="of pre-training (default: the study's)")
    parser.add_argument("--glue-seeds", type=int, default=5, help="of fine-tuning (default: 5)")
    parser.add_argument("--arms", metavar="ARM,...", help="only these")
    parser.add_argument("--jobs", type=int, default=1, help="commands at once (default: 1)")
    parser.add_argument("--model", type=Path, help="a checkpoint, a Hugging Face BERT directory")
    parser.add_argument("--text", type=Path, help="JSON lines with the fields text and movie")
    parser.add_argument("--glue", type=Path, help="GLUE's folder")
    parser.add_argument("--public", type=Path, help="text that whoever reads messages has, with the same fields")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results there, too")
    args, more = parser.parse_known_args(arguments)
    if unknown := [c for c in more if not c.startswith("--config.")]:
        parser.error(f"{unknown[0]}: accepted: the options above and --config.KEY=VALUE")
    study = STUDIES[args.name]
    named = args.arms.split(",") if args.arms else list(study.arms)
    if wrong := [arm for arm in named if arm not in study.arms] or [a for a in [study.baseline] if a not in named]:
        parser.error(f"--arms: {wrong[0]}: accepted: {', '.join(study.arms)}, {study.baseline} among them")
    if missing := [name for name in study.needs if getattr(args, name) is None]:
        parser.error(f"the study {args.name} needs --{missing[0]}")
    seeds = study.seeds if args.seeds is None else args.seeds
    if seeds < 1 or args.glue_seeds < 1 or args.jobs < 1:
        parser.error("--seeds, --glue-seeds and --jobs: accepted: at least 1")
    places = {name: getattr(args, name).resolve() for name in ("model", "text", "glue", "public") if getattr(args, name)}
    root = (args.workdir or Path("runs") / args.name).resolve()
    root.mkdir(parents=True, exist_ok=True)
    console = Console(markup=False, highlight=False, soft_wrap=True)
    facts = machine.facts(machine.limit_cores(None))

    runs = {arm: {seed: root / f"{arm}-{seed}" for seed in range(seeds)} for arm in named}
    for seed in range(seeds):
        known = places | {"baseline": runs[study.baseline][seed]}
        jobs = {
            runs[arm][seed].name: run_command(study, study.arms[arm], seed, runs[arm][seed], known, more) for arm in named
        }
        first = {known["baseline"].name: jobs.pop(known["baseline"].name)}
        for some in (first, jobs):  # the others may use what the baseline has made
            all_of(some, root, args.jobs, console.print, ROOT)
    text, numbers = pretraining(study, runs)
    result: dict[str, Any] = {"study": args.name, "machine": facts, "changes": more, "pretraining": numbers}
    said = [study.about, text]
    if study.audited:
        said.append(audits(runs, root, args.jobs, console.print, places.get("public")))
    if study.tasks:
        any_model = places.get("model", runs[study.baseline][0] / "hf")
        starts = {RANDOM: any_model} | ({CHECKPOINT: places["model"]} if "model" in study.needs else {})
        starts |= {arm: runs[arm][0] / "hf" for arm in named}
        glue = {
            f"glue-{start}-{group.names[0]}": glue_command(
                model, places["glue"], group, args.glue_seeds, root / f"glue-{start}", start == RANDOM
            )
            for start, model in starts.items()
            for group in study.tasks
        }
        all_of(glue, root, args.jobs, console.print, ROOT)
        text, result["finetuning"] = finetuning(study, starts, root, runs[study.baseline][0])
        said.append(text)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    console.print("\n\n".join([*said, " ".join(more), machine.describe(facts)]))


if __name__ == "__main__":
    cli.run(main)

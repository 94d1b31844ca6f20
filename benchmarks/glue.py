"""`python -m benchmarks.glue`: what federated pre-training is worth downstream, as one study.

A checkpoint is pre-trained further by several strategies at equal tokens; these, the checkpoint itself and a random start
are fine-tuned on GLUE. It calls the two commands a user would, so it can be stopped and goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
STRATEGIES = ("centralized", "parallel", "sequential", "local")
CLIENTS, COHORT, STEPS, BATCH, ROUNDS = 64, 16, 4, 4, 100  # 100 rounds of 16 x 4 x 4 x 128 tokens: 3.28 million
CHECKPOINT, RANDOM = "checkpoint", "random"


@dataclass(frozen=True)
class Group:
    """Tasks that are fine-tuned with the same settings."""

    tasks: tuple[str, ...]
    epochs: float
    rate: float
    metric: str | None = None  # None: the mean of the task's metrics


GROUPS = (
    Group(("SST-2",), 1.0, 3e-4),
    Group(("CoLA", "RTE", "WNLI"), 3.0, 3e-4),
    Group(("STS-B",), 3.0, 3e-4, "pearson"),
)


def pretrain_command(strategy: str, model: Path, text: Path, workdir: Path) -> list[str]:
    """Returns the command of a strategy's further pre-training: equal tokens in all, and on average for each client."""
    settings = {
        "model.init_from": model, "data.source": f"text:{text}", "data.text_field": "text", "data.client_field": "movie",
        "federated.num_clients": CLIENTS, "federated.strategy": strategy, "federated.local_steps": STEPS,
        "federated.batch_size": BATCH, "client_optimizer.warmup_steps": 20, "server_optimizer.warmup_steps": 20,
        "fill_mask": "()",
    }  # fmt: skip
    if strategy == "local":  # keeps a model for each client, so all of them take part in every round
        settings |= {
            "federated.rounds": ROUNDS * COHORT // CLIENTS, "eval.every_rounds": 5, "checkpoint.every_rounds": 25,
            "checkpoint.keep": 1,
        }  # fmt: skip
    else:
        settings |= {"federated.clients_per_round": COHORT, "federated.rounds": ROUNDS}
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    return [sys.executable, "-m", "fedbert_jax.main", "--config", "configs/continue.py", "--workdir", str(workdir), *flags]


def glue_command(model: Path, glue: Path, group: Group, seeds: int, workdir: Path, random: bool) -> list[str]:
    """Returns the command that fine-tunes a model on a group's tasks."""
    return [
        sys.executable, "-m", "fedbert_jax.glue", "--model", str(model), "--glue", str(glue), "--workdir", str(workdir),
        "--tasks", ",".join(group.tasks), "--epochs", str(group.epochs), "--learning-rate", str(group.rate),
        "--seeds", str(seeds), *(["--random-start"] if random else []),
    ]  # fmt: skip


def heldout(model: Path, pretrained: Path) -> float:
    """Returns a model's MLM loss on all clients' held-out text: the same blocks and masks for every model."""
    import jax

    from fedbert_jax import huggingface, run
    from fedbert_jax.workdir import Workdir

    workdir = Workdir(pretrained)
    built = run.build(workdir.read_config(), workdir)
    client, server = jax.jit(built.simulation.setting.fresh)()
    client, server, _ = huggingface.from_tensors(huggingface.load_tensors(model)[0], client, server)
    scores = built.simulation.evaluate(built.simulation.state_of(client, server))
    built.simulation.close()
    assert scores is not None
    return scores.by_text.loss


def values_of(workdir: Path, task: str, metric: str | None) -> list[float]:
    """Returns a task's number for each seed, in percent."""
    results = json.loads((workdir / task / "results.json").read_text())
    if metric is None:
        return [100 * v for v in results["values"]]
    return [100 * scores["dev"][metric] for scores in results["seeds"].values()]


def differs(a: list[float], b: list[float]) -> bool:
    """Whether two means over seeds are further apart than both standard deviations together."""
    return abs(statistics.mean(a) - statistics.mean(b)) > statistics.stdev(a) + statistics.stdev(b)


def show(result: dict[str, Any], console: Console) -> None:
    """Prints the study's table as Markdown."""
    table = Table(box=box.MARKDOWN)
    tasks = [(task, group.metric) for group in GROUPS for task in group.tasks]
    for column in ("start", "held-out MLM loss", *(f"{t}, {m}" if m else t for t, m in tasks)):
        table.add_column(column, justify="left" if column == "start" else "right")
    for start, row in result["starts"].items():
        cells = []
        for task, _ in tasks:
            values, base = row["tasks"][task], result["starts"][CHECKPOINT]["tasks"][task]
            star = "*" if start != CHECKPOINT and len(values) > 1 and differs(values, base) else ""
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.median(values):.1f} ± {spread:.1f}{star}")
        loss = row["heldout_loss"]
        table.add_row(start, "" if loss is None else f"{loss:.3f}", *cells)
    console.print(table)
    console.print(
        f"Medians and standard deviations over {result['seeds']} seeds, dev sets, last epoch. *: the mean differs from the "
        "checkpoint's by more than both standard deviations together.", highlight=False,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.glue", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="the checkpoint, a Hugging Face BERT directory")
    parser.add_argument("--glue", type=Path, required=True, help="a folder of GLUE tasks")
    parser.add_argument("--text", type=Path, required=True, help="JSON lines with the fields text and movie (the client)")
    parser.add_argument("--workdir", type=Path, default=Path("runs/study"), help="(default: runs/study)")
    parser.add_argument("--seeds", type=int, default=5, help="of fine-tuning (default: 5)")
    parser.add_argument("--json", type=Path, help="write the results there, too")
    args = parser.parse_args()
    model, glue, text, root = (path.resolve() for path in (args.model, args.glue, args.text, args.workdir))

    def call(command: list[str]) -> None:
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            raise SystemExit("stopped; the same command goes on from there")

    starts = {CHECKPOINT: model, RANDOM: model}
    for strategy in STRATEGIES:
        call(pretrain_command(strategy, model, text, root / f"imdb-{strategy}"))
        starts[strategy] = root / f"imdb-{strategy}" / "hf"
    rows = {}
    for name, directory in starts.items():
        workdir = root / f"glue-{name}"
        for group in GROUPS:
            call(glue_command(directory, glue, group, args.seeds, workdir, name == RANDOM))
        loss = None if name == RANDOM else heldout(directory, root / "imdb-centralized")
        found = {task: values_of(workdir, task, group.metric) for group in GROUPS for task in group.tasks}
        rows[name] = {"heldout_loss": loss, "tasks": found}
    result = {"benchmark": "glue", "seeds": args.seeds, "starts": rows}
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    show(result, Console(width=200))


if __name__ == "__main__":
    main()

"""python -m fedbert_jax.glue --model DIR --glue DIR [--tasks all] [--seeds 5] [--learning-rate 3e-4,1e-3] [--json FILE]

Fine-tunes a model on every GLUE task found, the ordinary way, and prints GLUE's table. Run again, it goes on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fedbert_jax import cli
from fedbert_jax.config import Config, from_dict
from fedbert_jax.console import make_console
from fedbert_jax.errors import ConfigError, UserError

# What the command line calls a config's keys.
FLAGS = {
    "data.source": "--glue", "data.seq_len": "--max-length", "federated.batch_size": "--batch",
    "finetune.epochs": "--epochs", "finetune.seeds": "--seeds", "model.hidden_dropout": "--dropout",
    "model.init_from": "--model", "client_optimizer.learning_rate": "--learning-rate",
    "server_optimizer.learning_rate": "--learning-rate",
}  # fmt: skip


def main() -> None:
    """Fine-tunes task by task, each in a workdir of its own, and prints the table of medians over seeds."""
    parser = argparse.ArgumentParser(prog="python -m fedbert_jax.glue", description=__doc__)
    parser.add_argument("--model", required=True, help="a Hugging Face BERT directory or hub name to start from")
    parser.add_argument("--glue", required=True, type=Path, help="GLUE's folder: one folder a task, official TSV files")
    parser.add_argument("--tasks", default="all", help="all (that are there), or names with commas between")
    parser.add_argument("--workdir", type=Path, default=Path("runs/glue"), help="one folder a task (default: runs/glue)")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each task (default: 5)")
    parser.add_argument("--epochs", type=float, default=3.0, help="(default: 3)")
    parser.add_argument("--batch", type=int, default=32, help="sequences a step (default: 32)")
    parser.add_argument("--learning-rate", type=_rates, default=(1e-4,), metavar="RATE[,RATE...]",
                        help="AdamW's peak (default: 1e-4); of several, each task takes the one that does best on "
                        "a tenth of its training examples, with a seed that is not reported")  # fmt: skip
    parser.add_argument("--dropout", type=float, default=0.1, help="(default: 0.1)")
    parser.add_argument("--max-length", type=int, default=128, help="tokens a sequence or pair (default: 128)")
    parser.add_argument("--random-start", action="store_true", help="the model's sizes and tokenizer with random weights")
    parser.add_argument("--predict", action="store_true", help="write predictions for the test files")
    parser.add_argument("--json", type=Path, help="write the results there, too")
    args = parser.parse_args()

    from rich import box
    from rich.table import Table

    from fedbert_jax import huggingface, run
    from fedbert_jax.data.glue import TASKS, check, find_task, find_tasks
    from fedbert_jax.finetune import choose_rate, finetune, with_rate

    named = args.tasks.replace(" ", "").split(",")
    tasks = find_tasks(args.glue) if named == ["all"] else [find_task(name) for name in named]
    if not tasks:
        raise UserError(f"{args.glue} has no folder of a GLUE task; accepted: {', '.join(TASKS)}.")
    model: dict[str, Any] = dict(init_from=args.model)
    if args.random_start:
        directory = run.local(args.model)
        model = huggingface.sizes_of(huggingface.read_config(directory), args.model)
    configs = [_config(args, task.name, model) for task in tasks]
    # Before hours of work, not after: whatever else may be wrong.
    for task in tasks:
        check(task, args.glue, args.predict)
    if args.json:
        new = not args.json.exists()
        try:
            args.json.open("a").close()
        except OSError as e:
            raise UserError(f"--json {args.json} can't be written ({e.strerror}).") from e
        if new:
            args.json.unlink()
    cli.raise_on_interrupt()
    console, results = make_console(), {}
    for task, config in zip(tasks, configs, strict=True):
        workdir = args.workdir / task.name
        try:
            rate, code = choose_rate(config, args.learning_rate, args.workdir / f"{task.name}-rates", console)
            code = code or finetune(with_rate(config, rate), workdir, console)
        except ConfigError as e:
            raise _by_flags(e) from e
        if code:
            raise SystemExit(code)
        results[task.name] = json.loads((workdir / "results.json").read_text()) | {"learning_rate": rate}

    table = Table(box=box.MARKDOWN)
    for column in ("task", "metrics", "median", "mean", "std", "rate"):
        table.add_column(column, justify="left" if column in ("task", "metrics") else "right")
    for task in tasks:
        r = results[task.name]
        numbers = [f"{100 * r[k]:.1f}" for k in ("median", "mean", "std")]
        table.add_row(task.name, ", ".join(task.metrics), *numbers, f"{r['learning_rate']:g}")
    average = sum(r["median"] for r in results.values()) / len(results)
    table.add_row("average", "of medians", f"{100 * average:.1f}", "", "", "")
    console.print(table, soft_wrap=False)
    console.print("dev sets, last epoch; a task's number is the mean of its metrics")
    if args.json:
        args.json.write_text(json.dumps({"model": args.model, "tasks": results, "average": average}, indent=2) + "\n")


def _config(args: argparse.Namespace, task: str, model: dict[str, Any]) -> Config:
    """Returns a task's config; `model` is the checkpoint to start from, or the sizes of a random one."""
    optimizer = dict(name="adamw", weight_decay=0.01, clip_norm=1.0)
    try:
        return from_dict(dict(
            task="finetune",
            data=dict(
                source=f"glue:{task}@{args.glue}", tokenizer="" if "init_from" in model else args.model,
                seq_len=args.max_length,
            ),
            model=model | dict(hidden_dropout=args.dropout, attention_dropout=args.dropout),
            federated=dict(strategy="centralized", batch_size=args.batch),
            client_optimizer=optimizer, server_optimizer=optimizer,
            finetune=dict(epochs=args.epochs, seeds=args.seeds, predict=args.predict),
        ))  # fmt: skip
    except ConfigError as e:
        raise _by_flags(e) from e


def _by_flags(error: ConfigError) -> ConfigError:
    """Names this command's flags where the message names a config's keys."""
    text = str(error)
    for key, flag in FLAGS.items():
        text = text.replace(f"config key {key}", flag).replace(key, flag)
    return ConfigError(text)


def _rates(text: str) -> tuple[float, ...]:
    try:
        rates = tuple(float(part) for part in text.split(","))
    except ValueError:
        rates = (0.0,)
    if not all(0 < rate < float("inf") for rate in rates):
        raise argparse.ArgumentTypeError(f"{text!r}: accepted: a number above 0, or several with commas between.")
    return rates


if __name__ == "__main__":
    cli.run(main)

"""python -m fedbert_jax.glue --model DIR --glue DIR [--tasks all] [--seeds 5] [--learning-rate 3e-4,1e-3] [--json FILE]

Fine-tunes a model on every GLUE task found, the ordinary way, and prints GLUE's table. When run again, it goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedbert_jax import cli
from fedbert_jax.config import Config, all_keys, from_dict
from fedbert_jax.console.output import make_console
from fedbert_jax.errors import UserError, about
from fedbert_jax.glue.files import check, dev_splits, find_tasks, lacking
from fedbert_jax.glue.tasks import TASKS, Task, find_task

if TYPE_CHECKING:
    from rich.console import Console

# The command line's flag for each of these config keys.
FLAGS = {
    "data.source": "--glue",
    "data.seq_len": "--max-length",
    "data.tokenizer": "--model",
    "federated.batch_size": "--batch",
    "finetune.epochs": "--epochs",
    "finetune.seeds": "--seeds",
    "finetune.predict": "--predict",
    "finetune.holdout": "--learning-rate with several rates",
    "model.hidden_dropout": "--dropout",
    "model.attention_dropout": "--dropout",
    "model.init_from": "--model",
    "client_optimizer.learning_rate": "--learning-rate",
    "server_optimizer.learning_rate": "--learning-rate",
}


def main() -> None:
    """Fine-tunes task by task, each in a workdir of its own, and prints the table of medians over seeds."""
    cli.raise_on_interrupt()
    run(None, make_console())


def run(arguments: Sequence[str] | None, console: Console) -> dict[str, Any]:
    """Does what the command does, and returns the contents of each task's results.json.

    Args:
      arguments: the command's; None: those of this process.
      console: where to print.

    Raises:
      UserError: for what can be mended.
      SystemExit: if a signal has ended it.
    """
    parser = cli.Parser(prog=cli.program("glue"), description=cli.usage(__doc__, "glue"))
    parser.add_argument("--model", required=True, help="a Hugging Face BERT directory or hub name to start from")
    parser.add_argument("--glue", required=True, type=Path, help="GLUE's folder: one folder a task, official TSV files")
    parser.add_argument("--tasks", default="all", help="all (that are there), or names with commas between")
    parser.add_argument("--workdir", type=Path, default=Path("runs/glue"), help="one folder a task (default: runs/glue)")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each task (default: 5)")
    parser.add_argument("--epochs", type=float, default=3.0, help="(default: 3)")
    parser.add_argument("--batch", type=int, default=32, help="sequences a step (default: 32)")
    parser.add_argument(
        "--learning-rate",
        type=_rates,
        default=(1e-4,),
        metavar="RATE[,RATE...]",
        help="AdamW's peak (default: 1e-4); of several, each task takes the one that does best on "
        "a tenth of its training examples, with a seed that is not reported",
    )
    parser.add_argument("--dropout", type=float, default=0.1, help="(default: 0.1)")
    parser.add_argument("--max-length", type=int, default=128, help="tokens a sequence or pair (default: 128)")
    parser.add_argument("--random-start", action="store_true", help="the model's sizes and tokenizer with random weights")
    parser.add_argument("--predict", action="store_true", help="write predictions for the test files")
    parser.add_argument("--json", type=Path, help="write the results there, too")
    args = parser.parse_args(arguments)

    from rich import box
    from rich.table import Table

    from fedbert_jax.glue.finetune import choose_rate, finetune, resolve, tokenizer_of, with_rate
    from fedbert_jax.models import huggingface

    results = {}
    with _by_flags():
        tasks = _tasks(args, console)
        model: dict[str, Any] = dict(init_from=args.model)
        if args.random_start:
            with about("--model"):
                model = huggingface.sizes_of(huggingface.read_config(huggingface.local(args.model)), args.model)
        configs = [_config(args, task.name, model) for task in tasks]
        # Whatever else may be wrong should be found before hours of work, not after.
        resolve(configs[0], tokenizer_of(configs[0]))  # the others have the same model
        for task in tasks:
            with about("--glue"):
                check(task, args.glue, args.predict)
        if args.json:
            _check_json(args.json)
        for task, config in zip(tasks, configs, strict=True):
            workdir = args.workdir / task.name
            rate, code = choose_rate(config, args.learning_rate, args.workdir / f"{task.name}-rates", console)
            code = code or finetune(with_rate(config, rate), workdir, console)
            if code:
                raise SystemExit(code)
            results[task.name] = json.loads((workdir / "results.json").read_text()) | {"learning_rate": rate}

    table = Table(box=box.MARKDOWN)
    for column in ("task", "metrics", "median", "mean", "std", "rate"):
        table.add_column(column, justify="left" if column in ("task", "metrics") else "right")
    for task in tasks:
        r = results[task.name]
        numbers = [f"{100 * r[k]:.1f}" for k in ("median", "mean")]
        numbers.append(f"{100 * r['std']:.1f}" if len(r["values"]) > 1 else "–")  # one seed has no spread
        table.add_row(task.name, ", ".join(task.metrics), *numbers, f"{r['learning_rate']:g}")
    average = sum(r["median"] for r in results.values()) / len(results)
    table.add_row("average", "of medians", f"{100 * average:.1f}", "", "", "")
    console.print(table, soft_wrap=False)
    others = {task.name: splits for task in tasks if (splits := dev_splits(task, args.glue)) != dev_splits(task)}
    but = "".join(f"; {name}: {', '.join(splits)}, since GLUE's dev set isn't there" for name, splits in others.items())
    console.print(f"dev sets{but}; last epoch; a task's number is the mean of its metrics", markup=False)
    if args.json:
        try:
            args.json.write_text(json.dumps({"model": args.model, "tasks": results, "average": average}, indent=2) + "\n")
        except OSError as e:
            raise UserError(f"--json {args.json} can't be written ({e.strerror}).") from e
    return results


def _tasks(args: argparse.Namespace, console: Console) -> list[Task]:
    """Returns the tasks asked for; with `all`, returns those whose files are there, and prints which are not."""
    named = args.tasks.replace(" ", "").split(",")
    if named != ["all"]:
        with about("--tasks"):
            return list(dict.fromkeys(find_task(name) for name in named))
    with about("--glue"):
        tasks, passed_over = [], []
        for task in find_tasks(args.glue):
            why = lacking(task, args.glue, ("train", *dev_splits(task, args.glue)))
            passed_over += [why] if why else []
            tasks += [] if why else [task]
        if not tasks and passed_over:
            raise UserError("; ".join(why.rstrip(".") for why in passed_over) + ".")
        if not tasks:
            raise UserError(f"{args.glue} has no folder of a GLUE task; accepted: {', '.join(TASKS)}.")
    for why in passed_over:
        console.print(f"passed over: {why}", markup=False)
    return tasks


def _check_json(path: Path) -> None:
    new = not path.exists()
    try:
        path.open("a").close()
    except OSError as e:
        raise UserError(f"--json {path} can't be written ({e.strerror}).") from e
    if new:
        path.unlink()


def _config(args: argparse.Namespace, task: str, model: dict[str, Any]) -> Config:
    """Returns a task's config; `model` is the checkpoint to start from, or the sizes of a random one."""
    optimizer = dict(name="adamw", weight_decay=0.01, clip_norm=1.0)
    return from_dict(
        dict(
            task="finetune",
            data=dict(
                source=f"glue:{task}@{args.glue}",
                tokenizer="" if "init_from" in model else args.model,
                seq_len=args.max_length,
            ),
            model=model | dict(hidden_dropout=args.dropout, attention_dropout=args.dropout),
            federated=dict(strategy="centralized", batch_size=args.batch),
            client_optimizer=optimizer,
            server_optimizer=optimizer,
            finetune=dict(epochs=args.epochs, seeds=args.seeds, predict=args.predict),
        )
    )


@contextlib.contextmanager
def _by_flags() -> Iterator[None]:
    """Replaces the config keys that an error names by this command's flags."""
    try:
        yield
    except UserError as error:
        raise type(error)(in_flags(str(error))) from error


def in_flags(text: str) -> str:
    """Returns a message with config keys replaced by this command's flags; a key without a flag loses its section."""
    start = re.search(r"model\.init_from \(was (\S+), now .*?\), data\.tokenizer \(was .*?, now .*?\)", text)
    if start:  # which takes the model's sizes and tokenizer and nothing else
        change = "was given, and isn't now" if start[1] == "''" else "wasn't given, and is now"
        text = text.replace(start[0], f"--random-start ({change})")
    for key, flag in FLAGS.items():
        text = re.sub(rf"(?:config key )?(?<![\w./]){re.escape(key)}(?![\w/]|\.\w)", flag, text)
    for key in all_keys():
        if "." in key and key not in FLAGS:
            text = re.sub(rf"(?:config key )?(?<![\w./]){re.escape(key)}(?![\w/]|\.\w)", _in_words(key), text)
    text = text.replace("--config.resume=force goes on with the new values", "give another --workdir")
    return text.replace("the learning rates", "--learning-rate").replace("config keys ", "").replace("config key ", "")


def _in_words(key: str) -> str:
    section, _, name = key.rpartition(".")
    return f"--model's {name}" if section == "model" else name


def _rates(text: str) -> tuple[float, ...]:
    try:
        rates = tuple(float(part) for part in text.split(","))
    except ValueError:
        rates = (0.0,)
    if not all(0 < rate < float("inf") for rate in rates):
        raise argparse.ArgumentTypeError(f"{text!r}: accepted: a number above 0, or several with commas between.")
    return rates

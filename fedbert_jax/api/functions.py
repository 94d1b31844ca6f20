"""What scripts call beside `Run`: runs side by side, fine-tuning, and what they register."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from fedbert_jax import config as config_lib
from fedbert_jax.console.output import make_console
from fedbert_jax.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from fedbert_jax.audit.attacks import Attack
    from fedbert_jax.federated.wire import Channel


def compare_runs(workdirs: Iterable[str | os.PathLike[str]]) -> pd.DataFrame:
    """Returns runs side by side, as `fedbert compare` does: a row for all runs that differ in nothing but their seed.

    Returns:
      Columns `label`, `strategy`, `seeds`, and for every quantity, such as `final_eval_loss_by_text`, its mean over seeds
      and `..._sd`, the standard deviation of a sample; None where a run doesn't have it.

    Raises:
      UserError: for a directory that is not a run, or none at all.
    """
    import pandas as pd

    from fedbert_jax.report import comparison

    workdirs = [workdirs] if isinstance(workdirs, str | os.PathLike) else list(workdirs)
    if not workdirs:
        raise UserError("compare_runs: workdirs is empty; accepted: at least one run's.")
    rows = []
    for group in comparison.to_dict(comparison.load_groups(workdirs))["groups"]:
        row = {name: group[name] for name in ("label", "strategy", "seeds")}
        for name in comparison.QUANTITIES:
            row |= {name: group[name]["mean"], f"{name}_sd": group[name]["sd"]}
        rows.append(row)
    return pd.DataFrame(rows)


def finetune_on_glue(
    model: str | os.PathLike[str],
    glue: str | os.PathLike[str],
    workdir: str | os.PathLike[str],
    *arguments: str,
    progress: bool = True,
) -> pd.DataFrame:
    """Fine-tunes a model on GLUE tasks, as `fedbert glue` does; when called again, it goes on.

    Args:
      model: a Hugging Face BERT directory or hub name.
      glue: GLUE's folder, one folder a task with its official TSV files.
      workdir: one folder a task is made in it.
      arguments: of the command, such as "--tasks=RTE,CoLA" or "--seeds=3".
      progress: whether to print what the command prints.

    Returns:
      A row a metric of a seed: `task`, `seed`, `split` (dev), `metric` and `score`, a fraction, the last epoch's.

    Raises:
      UserError: for what can be mended.
    """
    import pandas as pd

    from fedbert_jax.glue.command import run

    given = [f"--model={os.fspath(model)}", f"--glue={os.fspath(glue)}", f"--workdir={os.fspath(workdir)}", *arguments]
    return pd.DataFrame(
        [
            {"task": task, "seed": int(seed), "split": split, "metric": metric, "score": score}
            for task, results in run(given, make_console(quiet=not progress)).items()
            for seed, by_split in results["seeds"].items()
            for split, scores in by_split.items()
            for metric, score in scores.items()
        ]
    )


def register_channel(name: str, make: Callable[[Any], Channel]) -> None:
    """Adds the codec `wire.codec=name` in this process: what activations and their gradients go through.

    Call it before the config is read, for example in a config file.

    Args:
      name: text that can be printed.
      make: given the type in which the receiver computes, returns the `federated.wire.Channel`: its `send` is
        (a pytree of arrays, None) -> what crosses, whose bytes are counted; its `receive` undoes that. Both are traced by
        JAX; gradients do not go through them.

    Raises:
      ValueError: if the name can't be printed, another codec has it, or `make` is no function.
    """
    config_lib.register_codec(name, make)


def register_attack(attack: Attack) -> None:
    """Adds an attack to audits in this process, whose rows stand beside the others', in the same floors and intervals.

    Args:
      attack: an `audit.attacks.Attack`. One that guesses in another form than it should ends the audit with a `UserError`.

    Raises:
      ValueError: if it is none, names an unknown kind of knowledge, or another attack of its name uses the same knowledge.
    """
    from fedbert_jax.audit import attacks

    attacks.register(attack)

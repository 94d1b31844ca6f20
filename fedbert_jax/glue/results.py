"""A task's results.json: each seed's scores, and their summary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from fedbert_jax import disk
from fedbert_jax.errors import UserError
from fedbert_jax.glue import tasks
from fedbert_jax.glue.scores import summary
from fedbert_jax.workdir.log import to_json

Scores = dict[str, dict[str, float]]  # a model's official metrics, by dev split


def summarise(task: tasks.Task, seeds: dict[str, Any]) -> dict[str, Any]:
    """Returns the median, mean and standard deviation over seeds of the task's GLUE number (MNLI: of both dev sets)."""
    values = [float(np.mean([summary(task, s) for s in scores.values()])) for scores in seeds.values()]
    return {
        "task": task.name,
        "values": values,
        "median": float(np.median(values)),
        "mean": float(np.mean(values)),
        "std": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
    }


def read_results(root: Path) -> dict[str, Any]:
    """Returns the content of results.json; without that file, no seed is done.

    Raises:
      UserError: if it is damaged.
    """
    path = root / "results.json"
    try:
        results = json.loads(path.read_text()) if path.is_file() else {"seeds": {}}
        if not isinstance(results, dict) or not isinstance(results.get("seeds"), dict):
            raise ValueError("it has no seeds")
        return results
    except ValueError as e:
        raise UserError(f"{path} is damaged ({e}); delete it to fine-tune again what it told of.") from e


def write_results(root: Path, results: dict[str, Any]) -> None:
    """Writes results.json, whole or not at all."""
    disk.write_atomically(root / "results.json", to_json(results, indent=2) + "\n")


def show(scores: Scores) -> str:
    """Returns a seed's scores as a line."""
    return "; ".join(
        (f"{split}: " if [*scores] != ["dev"] else "") + ", ".join(f"{k} {100 * v:.1f}" for k, v in found.items())
        for split, found in scores.items()
    )

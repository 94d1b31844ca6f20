"""The model card of a fine-tuned model: what it was fine-tuned on, how, and how well it did, by GLUE's metrics."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fedbert_jax import __version__
from fedbert_jax.config import Config
from fedbert_jax.data import hub
from fedbert_jax.glue.tasks import MSR_TEST, Task
from fedbert_jax.models.huggingface.card import PAPER, layers, metadata, origin, result, rounded, snippet, table

METRICS = {
    "f1": "F1",
    "accuracy": "accuracy",
    "matthews": "Matthews correlation",
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
}
HUB_METRICS = {"matthews": "matthews_correlation", "pearson": "pearsonr", "spearman": "spearmanr"}  # where names differ


def classifier_card(
    config: Config, task: Task, scores: Mapping[str, Mapping[str, float]], seeds: Mapping[str, Any] | None = None
) -> str:
    """Returns the README.md of a fine-tuned model.

    Args:
      config: the run's config, resolved.
      task: the task it was fine-tuned on.
      scores: this model's metrics by split evaluated (`dev`, `holdout`, ...), each at most 1.
      seeds: results over all seeds, once they are done: `values`, the task's number for each, and their `median`, `mean` and
        `std`.
    """
    f, t = config.federated, config.finetune
    network = config.task != "finetune"  # then the examples are clients' own, in GLUE's layout: no results of GLUE's
    own = f"this model's, of seed {config.seed}, after the last epoch"
    if network:
        own = "as one client scored it on examples of its own, after the last round"
    rows: list[tuple[str, str]] = []
    results = []
    for split, metrics in scores.items():
        for name, value in metrics.items():
            rows.append((f"{METRICS[name]} on {_judged(split)}", f"{100 * value:.1f}"))
            if network:
                continue
            results.append(
                result(
                    "text-classification",
                    hub.GLUE,
                    f"GLUE {task.name}, {_judged(split)}",
                    HUB_METRICS.get(name, name),
                    rounded(value),
                    f"{METRICS[name]}, {own}",
                    config=_subset(task),
                    split=_hub_split(split),
                )
            )
    many = ""
    if seeds and len(seeds["values"]) > 1:
        each = ", ".join(f"{100 * value:.1f}" for value in seeds["values"])
        many = (
            f"\n\nOver {len(seeds['values'])} seeds, of which this model is the first, the mean of these metrics is {each}: "
            f"median {100 * seeds['median']:.1f}, mean {100 * seeds['mean']:.1f}, standard deviation "
            f"{100 * seeds['std']:.1f}."
        )
    pools = f.arrangement.pools_text
    dealt = ", each with its own examples, over a network" if network else f", dealt out {config.data.partition.kind}"
    others = f" to {config.seed + t.seeds - 1}" if t.seeds > 1 else ""
    how = {
        "task": f"{task.name}{', in the form' if network else ''} of [GLUE](https://gluebenchmark.com)",
        "labels": ", ".join(task.labels) or "a score from 0 to 5",
        "started from": origin(config) or "random weights",
        "strategy": f.title,
        "clients": None if pools else f"{f.num_clients}{dealt}",
        "epochs": None if network else f"{t.epochs:g}",
        "rounds": f"{f.rounds:,}, each of {f.local_steps} steps" if network else None,
        "batch": f"{f.batch_size} sequences of at most {config.data.seq_len} tokens" + (" a client" if not pools else ""),
        "learning rate": f"{config.server_optimizer.learning_rate:g} at its peak",
        "seeds": None if network else f"{config.seed} (this model){others}",
    }
    example = '{"text": "One sentence.", "text_pair": "And another."}' if task.pair else '"A sentence."'
    name = re.sub(r"\W", "", task.name).lower()
    m = config.model
    return (
        "\n\n".join(
            [
                metadata(config, "text-classification", f"bert-{m.num_layers}x{m.hidden_size}-{name}", results),
                f"# A BERT fine-tuned on {task.name}",
                f"{layers(m)}. Trained by fedbert_jax {__version__}, which implements {PAPER}.",
                "## How to use it",
                snippet('classify = pipeline("text-classification", model=name)', f"print(classify({example}))"),
                "## How it was trained",
                table(how.items()),
                "## How well it does",
                f"Times 100, {own}, never the best one; the metrics are GLUE's own.\n\n"
                + table(rows or [("metrics", "none yet")])
                + many,
            ]
        )
        + "\n"
    )


def _judged(split: str) -> str:
    named = {
        "dev": "the dev set",
        "dev_matched": "the matched dev set",
        "dev_mismatched": "the mismatched dev set",
        "holdout": "training examples that were kept back",
        MSR_TEST: "Microsoft's test set (msr_paraphrase_test)",
    }
    return named.get(split, split)


def _subset(task: Task) -> str:
    return task.name.lower().replace("-", "")


def _hub_split(split: str) -> str | None:
    """Returns the name of a split in the hub's dataset; None if it doesn't have that split."""
    return split.replace("dev", "validation") if split.startswith("dev") else "test" if split == MSR_TEST else None

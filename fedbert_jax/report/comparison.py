"""Runs side by side: grouped by config, summarised over seeds, and checked for whether they are comparable."""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text

from fedbert_jax.config import FREE, strategy_title
from fedbert_jax.console.output import shown
from fedbert_jax.report.runs import BYTE_UNITS, Run, duration, load_run, number, percent, quantity
from fedbert_jax.workdir.log import to_json

# Keys that change where and how often a run saves, and what its export says, but none of its numbers.
IGNORED = FREE | frozenset(
    {
        "seed",
        "fill_mask",
        "checkpoint.every_rounds",
        "checkpoint.times",
        "checkpoint.keep",
        "data.cache_dir",
        "data.streaming",
        "data.store",
    }
)
# Keys that decide which text is read and what is asked of it: losses are comparable only if these are the same.
DATA = (
    "data.source",
    "data.tokenizer",
    "data.lowercase",
    "data.seq_len",
    "data.eval_fraction",
    "data.deduplicate",
    "mlm.mask_prob",
    "mlm.whole_word",
    "eval.max_clients",
    "eval.max_blocks",
)
OPTIMIZERS = ("client_optimizer", "server_optimizer")
MAX_SETTINGS = 4  # keys spelled out beside a label; compare.json has them all


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seed."""

    label: str
    runs: tuple[Run, ...]
    settings: dict[str, Any]  # the config values that are not the same in every group
    remarks: tuple[str, ...]  # in a few words: how many seeds, and which settings most others don't have

    @property
    def name(self) -> str:
        return f"{self.label} ({', '.join(self.remarks)})" if self.remarks else self.label


@dataclass(frozen=True)
class Summary:
    """A quantity over a group's runs; `mean` is None if a run has no value, `sd` (of a sample) if there is only one run."""

    mean: float | None
    sd: float | None
    values: tuple[float | None, ...]


# The quantities compared: a column's title, how a run's value is read, how a value is printed. Those without a title are in
# compare.json only: the headline is a different mean if federated.weighting is different.
QUANTITIES: dict[str, tuple[str, Callable[[Run], float | None], Callable[[float | None], str]]] = {
    "final_eval_loss_by_text": ("loss by text", lambda run: run.final("eval_loss_by_text"), number),
    "final_eval_loss_over_clients": ("loss over clients", lambda run: run.final("eval_loss_over_clients"), number),
    "final_eval_accuracy_by_text": ("accuracy by text", lambda run: run.final("eval_accuracy_by_text"), percent),
    "final_eval_accuracy_over_clients": (
        "accuracy over clients",
        lambda run: run.final("eval_accuracy_over_clients"),
        percent,
    ),
    "final_eval_loss": ("", lambda run: run.final("eval_loss"), number),
    "best_eval_loss": ("", lambda run: run.best("eval_loss"), number),
    "final_eval_accuracy": ("", lambda run: run.final("eval_accuracy"), percent),
    "best_eval_accuracy": ("", lambda run: run.best("eval_accuracy", np.max), percent),
    "tokens": ("tokens", lambda run: run.tokens, quantity),
    "uplink_bytes": ("bytes up", lambda run: run.final("uplink_bytes") or 0, lambda x: quantity(x, BYTE_UNITS)),
    "downlink_bytes": ("bytes down", lambda run: run.final("downlink_bytes") or 0, lambda x: quantity(x, BYTE_UNITS)),
    "seconds": ("time", lambda run: run.seconds, duration),
    "dp_epsilon": ("epsilon", lambda run: run.final("dp_epsilon"), number),
}
RARE = ("dp_epsilon",)  # quantities with a column only where a run has them


# --- grouping --------------------------------------------------------------------------------------------------------


def loss_key(runs: Iterable[Run]) -> str:
    """Returns the held-out loss by which runs are ordered and drawn: the same mean for all, whatever their headlines are."""
    return "eval_loss_by_text" if all(run.final("eval_loss_by_text") is not None for run in runs) else "eval_loss"


def load_groups(workdirs: Iterable[str | os.PathLike[str]]) -> list[Group]:
    """Reads the workdirs and returns their runs in groups, with the lowest final held-out loss first.

    Raises:
      UserError: if one of them is no workdir, or holds no metrics yet.
    """
    return group([load_run(path) for path in dict.fromkeys(Path(path).resolve() for path in workdirs)])


def group(runs: Sequence[Run]) -> list[Group]:
    """Groups runs that differ only in their seed; groups without a finite final loss come last."""
    together: dict[str, list[Run]] = {}
    for run in runs:
        key = to_json({key: value for key, value in sorted(run.config.items()) if key not in IGNORED})
        together.setdefault(key, []).append(run)
    members = [tuple(sorted(runs, key=lambda run: run.config["seed"])) for runs in together.values()]
    configs = [runs[0].config for runs in members]
    keys = [key for key in configs[0] if key not in IGNORED and any(c.get(key) != configs[0][key] for c in configs)]
    groups = []
    for label, runs_of_one in zip(_labels(members), members, strict=True):
        settings = {key: runs_of_one[0].config[key] for key in keys}
        groups.append(Group(label, runs_of_one, settings, _remarks(runs_of_one, settings, configs)))

    key = f"final_{loss_key(runs)}"

    def order(group: Group) -> tuple[float, str]:
        mean = summarize(group, key).mean
        return (mean if mean is not None and math.isfinite(mean) else math.inf, group.label)

    return sorted(groups, key=order)


def _remarks(runs: Sequence[Run], settings: dict[str, Any], configs: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    odd = []
    for key, value in settings.items():
        others = [config[key] for config in configs]
        usual = all(others.count(value) > others.count(other) for other in others if other != value)
        if not usual and key not in ("federated.strategy", "federated.body", "federated.average"):  # they have a column
            section, _, name = key.rpartition(".")
            twins = [settings[f"{s}.{name}"] for s in OPTIMIZERS if f"{s}.{name}" in settings]
            both = section in OPTIMIZERS and twins == [value, value]  # one remark serves both segments' optimizers
            remark = f"{name if both or section not in OPTIMIZERS else key}={str(value)[:24]}"
            if remark not in odd:
                odd.append(remark)
    more = [f"{len(odd) - MAX_SETTINGS} more"] if len(odd) > MAX_SETTINGS else []
    seeds = len({run.config["seed"] for run in runs})
    several = [f"{seeds} seeds" if seeds == len(runs) else f"{len(runs)} runs, seeds repeat"] if len(runs) > 1 else []
    return (*several, *odd[:MAX_SETTINGS], *more)


def _labels(members: Sequence[tuple[Run, ...]]) -> list[str]:
    """Names each group by the common start of its workdirs' names, with that of their parents too if names repeat."""
    labels, parents = [], []
    for runs in members:
        paths = [run.workdir.resolve() for run in runs]
        name = _common_start([path.name for path in paths])
        if len(runs) > 1:  # "pooled" from pooled_seed0 and pooled_seed1
            name = re.sub(r"[-_. ]*(seed)?[-_. ]*\d*$", "", name)
        parents.append(_common_start([path.parent.name for path in paths]))
        labels.append(name or parents[-1] or paths[0].name)
    return [
        shown(f"{parent}/{label}" if labels.count(label) > 1 and parent != label else label)
        for label, parent in zip(labels, parents, strict=True)
    ]


def _common_start(names: Sequence[str]) -> str:
    columns = zip(*names, strict=False)
    return "".join(letters[0] for letters in itertools.takewhile(lambda letters: len(set(letters)) == 1, columns))


def summarize(group: Group, name: str) -> Summary:
    """Returns a quantity of `QUANTITIES` over a group's runs; NaN if a run's value was not finite."""
    values = tuple(QUANTITIES[name][1](run) for run in group.runs)
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return Summary(None, None, values)
    return Summary(float(np.mean(known)), float(np.std(known, ddof=1)) if len(known) > 1 else None, values)


# --- are they comparable? --------------------------------------------------------------------------------------------


def warn(groups: Sequence[Group]) -> list[str]:
    """Returns a sentence for each reason why the final losses should not be compared."""
    runs = [run for group in groups for run in group.runs]
    tokens = [run.tokens for run in runs]
    sentences = []
    if max(tokens) > 1.01 * min(tokens):
        sentences.append(
            f"The runs' budgets differ, from {quantity(min(tokens))} to {quantity(max(tokens))} tokens, "
            "so their final losses are not comparable."
        )
    differing = [key for key in DATA if any(run.config[key] != runs[0].config[key] for run in runs)]
    if differing:
        sentences.append(f"The runs' data differs ({', '.join(differing)}), so their losses are not comparable.")
    asked = {"eval_clients_scored" in run.metrics[-1] for run in runs if run.final("eval_loss") is not None}
    if len(asked) > 1:
        sentences.append(
            "Some runs are older: not every position they were asked at was masked, so their losses are not comparable."
        )
    elif not differing and _baselines_differ(runs):
        sentences.append("The runs' held-out texts differ (their baselines do), so their losses are not comparable.")
    for group in groups:
        if len({run.config["seed"] for run in group.runs}) < len(group.runs):
            sentences.append(f"{group.label} has runs of the same seed: their spread says little.")
    return sentences


def _baselines_differ(runs: Sequence[Run]) -> bool:
    """Whether runs seem to hold out different texts. Another seed may hold out other text, of much the same difficulty."""
    for key, between_seeds in (("unigram_loss", 0.02), ("commonest_accuracy", 0.1)):
        known = [(run.config["seed"], (run.facts.get("baselines") or {}).get(key)) for run in runs]
        for (seed_a, a), (seed_b, b) in itertools.combinations([pair for pair in known if pair[1] is not None], 2):
            if not math.isclose(a, b, rel_tol=1e-4 if seed_a == seed_b else between_seeds):  # type: ignore[arg-type]
                return True
    return False


# --- showing ---------------------------------------------------------------------------------------------------------


def _cells(groups: Sequence[Group], plus_minus: str) -> tuple[list[str], list[list[str]]]:
    rows = []
    absent = [name for name in RARE if all(run is None for group in groups for run in summarize(group, name).values)]
    columns = {name: quantity for name, quantity in QUANTITIES.items() if quantity[0] and name not in absent}
    for group in groups:
        config = group.runs[0].config
        row = [strategy_title(*(config[f"federated.{key}"] for key in ("strategy", "body", "average")))]
        for name, (_, _, show) in columns.items():
            summary = summarize(group, name)
            spread = plus_minus + show(summary.sd) if summary.sd and math.isfinite(summary.sd) else ""
            row.append(show(summary.mean) + spread)
        rows.append(row)
    return ["run", "strategy", *(title for title, _, _ in columns.values())], rows


def scope(groups: Sequence[Group]) -> str:
    """Returns a sentence on what the held-out numbers measure; "" if there are none."""
    runs = [run for group in groups for run in group.runs]
    scored = sorted({int(n) for run in runs if (n := run.final("eval_clients_scored")) is not None})
    if not scored:
        return ""
    of = sorted({int(n) for run in runs if (n := run.facts.get("num_clients")) is not None})
    show = lambda numbers: " to ".join(f"{n:,}" for n in dict.fromkeys((numbers[0], numbers[-1])))  # noqa: E731
    return (
        f"Held out, at the end, every chosen position masked; {show(scored)}{f' of {show(of)}' if of else ''} clients. "
        "By text: a client counts as much as its training text; over clients: all count the same."
    )


def to_table(groups: Sequence[Group]) -> Table:
    """Returns the comparison for a terminal of at least 112 columns."""
    header, rows = _cells(groups, plus_minus="\n± ")
    table = Table(box=None, pad_edge=False, header_style="bold underline")
    for i, title in enumerate(header):
        table.add_column(title.replace(" ", "\n"), justify="left" if i < 2 else "right", no_wrap=i > 0, vertical="top")
    for group, row in zip(groups, rows, strict=True):
        table.add_row(*map(Text, ["\n".join([group.label, *group.remarks]), *row]))  # Text: [brackets] are no markup
    return table


def to_markdown(groups: Sequence[Group]) -> str:
    """Returns the comparison as a Markdown table."""
    header, rows = _cells(groups, plus_minus=" ± ")
    rows = [[_as_markdown(group.name), *row] for group, row in zip(groups, rows, strict=True)]
    lines = [header, ["---"] * 2 + ["---:"] * (len(header) - 2), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _as_markdown(name: str) -> str:
    """Escapes what Markdown, HTML in it, and formulas on GitHub would take for markup."""
    return re.sub(r"([\\`*|$<>&~]|(?<=\])\(|(?<!\w)_|_(?!\w))", r"\\\1", name)


def to_dict(groups: Sequence[Group]) -> dict[str, Any]:
    """Returns the contents of compare.json: every group's quantities over its runs, its settings, and the warnings."""
    return {
        "warnings": warn(groups),
        "groups": [
            {
                "label": group.label,
                "strategy": group.runs[0].config["federated.strategy"],
                "body": group.runs[0].config["federated.body"],
                "average": group.runs[0].config["federated.average"],
                "settings": group.settings,
                "seeds": [run.config["seed"] for run in group.runs],
                "workdirs": [shown(run.workdir) for run in group.runs],
                **{name: vars(summarize(group, name)) for name in QUANTITIES},
            }
            for group in groups
        ],
    }

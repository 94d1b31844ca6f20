"""Runs side by side: grouped by what their configs share, summed up over seeds, and checked for being comparable."""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table
from rich.text import Text

from fedbert_jax.config import all_keys
from fedbert_jax.console import shown
from fedbert_jax.fonts import plot_name
from fedbert_jax.metrics import BYTE_UNITS, Run, duration, load_run, number, percent, quantity, scale, to_json
from fedbert_jax.plots import FAINT, INK, PALETTE, curve, new_figure, panel, to_png, token_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Keys that change where and how often a run saves, and what its export says, and none of its numbers.
IGNORED = frozenset({
    "seed", "resume", "fill_mask", "checkpoint.every_rounds", "checkpoint.times", "checkpoint.keep", "data.cache_dir",
    "data.store",
    *(key for key in all_keys() if key.startswith("export.")),
})  # fmt: skip
# Keys that decide what is read and what is asked of it: losses compare only where they are the same.
DATA = (
    "data.source", "data.tokenizer", "data.lowercase", "data.seq_len", "data.eval_fraction", "data.deduplicate",
    "mlm.mask_prob", "mlm.whole_word", "eval.max_clients", "eval.max_blocks",
)  # fmt: skip
OPTIMIZERS = ("client_optimizer", "server_optimizer")
MAX_LEGEND, LEGEND_LINE = 400, 100  # characters of a name in the plot's legend, and of a line of it
MAX_SETTINGS = 4  # keys spelled out beside a label; compare.json has them all


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seed."""

    label: str
    runs: tuple[Run, ...]
    settings: dict[str, Any]  # the config values that are not the same in every group
    remarks: tuple[str, ...]  # in a few words: how many seeds, and what sets it apart from most others

    @property
    def name(self) -> str:
        return f"{self.label} ({', '.join(self.remarks)})" if self.remarks else self.label


@dataclass(frozen=True)
class Summary:
    """A quantity over a group's runs; `mean` is None if a run has no value, `sd` (of a sample) if there is one run."""

    mean: float | None
    sd: float | None
    values: tuple[float | None, ...]


# What is compared: a column's title, how a run's value is read, how a value is printed.
QUANTITIES: dict[str, tuple[str, Callable[[Run], float | None], Callable[[float | None], str]]] = {
    "final_eval_loss": ("final loss", lambda run: run.final("eval_loss"), number),
    "best_eval_loss": ("best loss", lambda run: run.best("eval_loss"), number),
    "final_eval_accuracy": ("final accuracy", lambda run: run.final("eval_accuracy"), percent),
    "best_eval_accuracy": ("best accuracy", lambda run: run.best("eval_accuracy", np.max), percent),
    "tokens": ("tokens", lambda run: run.tokens, quantity),
    "uplink_bytes": ("bytes up", lambda run: run.final("uplink_bytes") or 0, lambda x: quantity(x, BYTE_UNITS)),
    "downlink_bytes": ("bytes down", lambda run: run.final("downlink_bytes") or 0, lambda x: quantity(x, BYTE_UNITS)),
    "seconds": ("time", lambda run: run.seconds, duration),
}


# --- grouping --------------------------------------------------------------------------------------------------------


def load_groups(workdirs: Iterable[str | os.PathLike[str]]) -> list[Group]:
    """Reads the workdirs and returns them grouped, the lowest final held-out loss first.

    Raises:
      UserError: if one of them is no workdir, or holds no metrics yet.
    """
    return group([load_run(path) for path in dict.fromkeys(Path(path).resolve() for path in workdirs)])


def group(runs: Sequence[Run]) -> list[Group]:
    """Returns runs that differ only in their seed together; groups without a finite final loss come last."""
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

    def order(group: Group) -> tuple[float, str]:
        mean = summarize(group, "final_eval_loss").mean
        return (mean if mean is not None and math.isfinite(mean) else math.inf, group.label)

    return sorted(groups, key=order)


def _remarks(runs: Sequence[Run], settings: dict[str, Any], configs: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    odd = []
    for key, value in settings.items():
        others = [config[key] for config in configs]
        usual = all(others.count(value) > others.count(other) for other in others if other != value)
        if not usual and key not in ("federated.strategy", "federated.body"):  # those have columns of their own
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
    """Names groups by what their workdirs' names begin with alike, with the parents' too where that is not enough."""
    labels, parents = [], []
    for runs in members:
        paths = [run.workdir.resolve() for run in runs]
        name = _common_start([path.name for path in paths])
        if len(runs) > 1:  # "pooled" of pooled_seed0 and pooled_seed1
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
    """Returns a quantity of `QUANTITIES` over a group's runs; NaN where a run's value was not finite."""
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
    elif _baselines_differ(runs):
        sentences.append("The runs' held-out texts differ (their baselines do), so their losses are not comparable.")
    for group in groups:
        if len({run.config["seed"] for run in group.runs}) < len(group.runs):
            sentences.append(f"{group.label} has runs of the same seed: their spread says little.")
    return sentences


def _baselines_differ(runs: Sequence[Run]) -> bool:
    """Runs of one seed hold out the same text. Another seed may hold out other text, of much the same difficulty."""
    for key, between_seeds in (("unigram_loss", 0.02), ("commonest_accuracy", 0.1)):
        known = [(run.config["seed"], (run.facts.get("baselines") or {}).get(key)) for run in runs]
        for (seed_a, a), (seed_b, b) in itertools.combinations([pair for pair in known if pair[1] is not None], 2):
            if not math.isclose(a, b, rel_tol=1e-4 if seed_a == seed_b else between_seeds):  # type: ignore[arg-type]
                return True
    return False


# --- showing ---------------------------------------------------------------------------------------------------------


def _cells(groups: Sequence[Group], plus_minus: str) -> tuple[list[str], list[list[str]]]:
    rows = []
    for group in groups:
        config = group.runs[0].config
        body = config["federated.body"] if config["federated.strategy"] == "parallel" else "–"
        row = [config["federated.strategy"], body]
        for name, (_, _, show) in QUANTITIES.items():
            summary = summarize(group, name)
            spread = plus_minus + show(summary.sd) if summary.sd and math.isfinite(summary.sd) else ""
            row.append(show(summary.mean) + spread)
        rows.append(row)
    return ["run", "strategy", "body", *(title for title, _, _ in QUANTITIES.values())], rows


def to_table(groups: Sequence[Group]) -> Table:
    """Returns the comparison for a terminal of at least 112 columns."""
    header, rows = _cells(groups, plus_minus="\n± ")
    table = Table(box=None, pad_edge=False, header_style="bold underline")
    for i, title in enumerate(header):
        table.add_column(title.replace(" ", "\n"), justify="left" if i < 3 else "right", no_wrap=i > 0, vertical="top")
    for group, row in zip(groups, rows, strict=True):
        table.add_row(*map(Text, ["\n".join([group.label, *group.remarks]), *row]))  # Text: [brackets] are no markup
    return table


def to_markdown(groups: Sequence[Group]) -> str:
    """Returns the comparison as a Markdown table."""
    header, rows = _cells(groups, plus_minus=" ± ")
    rows = [[_as_markdown(group.name), *row] for group, row in zip(groups, rows, strict=True)]
    lines = [header, ["---"] * 3 + ["---:"] * (len(header) - 3), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _as_markdown(name: str) -> str:
    """Escapes what Markdown, HTML in it and formulas on GitHub would take for theirs."""
    return re.sub(r"([\\`*|$<>&~]|(?<=\])\(|(?<!\w)_|_(?!\w))", r"\\\1", name)


def to_dict(groups: Sequence[Group]) -> dict[str, Any]:
    """Returns what compare.json holds: every group's quantities over its runs, its settings, and the warnings."""
    return {
        "warnings": warn(groups),
        "groups": [
            {
                "label": group.label,
                "strategy": group.runs[0].config["federated.strategy"],
                "body": group.runs[0].config["federated.body"],
                "settings": group.settings,
                "seeds": [run.config["seed"] for run in group.runs],
                "workdirs": [shown(run.workdir) for run in group.runs],
                **{name: vars(summarize(group, name)) for name in QUANTITIES},
            }
            for group in groups
        ],
    }


def write(groups: Sequence[Group], directory: str | os.PathLike[str]) -> None:
    """Writes compare.json and compare.png."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "compare.json").write_text(to_json(to_dict(groups), indent=1) + "\n", encoding="utf-8")
    (directory / "compare.png").write_bytes(to_png(draw(groups)))


def draw(groups: Sequence[Group]) -> Figure:
    """Draws held-out loss against tokens, and against bytes or, where nobody sends any, time."""
    runs = [run for group in groups for run in group.runs]
    names = [plot_name(group.name, MAX_LEGEND, LEGEND_LINE) for group in groups]
    columns = 1 if any(len(line) > LEGEND_LINE // 2 for name in names for line in name.split("\n")) else 2
    lines = math.ceil(sum(name.count("\n") + 1 for name in names) / columns)
    figure = new_figure(height=4.0 + 0.22 * lines, width=10.0)
    grid = figure.add_gridspec(1, 2)
    tokens_per, label = token_axis(runs)
    left = panel(figure, label, "held-out loss (nats per masked token)", grid[0])
    starts_left = _curves(left, groups, names, lambda run: run.series("eval_loss")[0] / tokens_per)
    sent = sorted(run.bytes for run in runs if run.bytes)
    per, unit = scale(sent[-1], BYTE_UNITS) if sent else (60.0, "minutes")
    silent = "; dotted: sends nothing" if len(sent) < len(runs) else ""
    right = panel(figure, f"sent up and down ({unit}){silent}" if sent else f"training time ({unit})", "", grid[1])
    right.sharey(left)
    so_far = _bytes_so_far if sent else _seconds_so_far
    starts_right = _curves(right, groups, names, lambda run: so_far(run) / per)
    if sent and sent[-1] > 20 * sent[0]:
        # Logarithmic from the first evaluation on, and straight from 0 to there: before round 1 nothing was sent.
        first = min(x[x > 0].min() for run in runs if run.bytes and (x := _bytes_so_far(run) / per).any())
        right.set_xscale("symlog", linthresh=first)
        right.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    late = [y[(y < np.inf) & (x > 0.05 * run.tokens)] for run in runs for x, y in [run.series("eval_loss")]]
    if any(y.size for y in late):  # the fall at the very start would flatten all that differs later
        left.set_ylim(top=1.02 * max(y.max() for y in late if y.size))
        _mark_starts_above(left, starts_left)
        _mark_starts_above(right, starts_right)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, frameon=False, labelcolor=INK)
    return figure


def _mark_starts_above(axes: Axes, starts: Sequence[tuple[float, float, str]]) -> None:
    """Shows where curves begin whose first point (x, y, colour) lies above the axes: a triangle at the edge, and its y."""
    above = [start for start in starts if start[1] > axes.get_ylim()[1]]
    if not above:
        return
    for x, _, color in above:
        axes.annotate("▲", (x, 1), xycoords=axes.get_xaxis_transform(), ha="center", va="center", color=color, fontsize=8)
    low, high = (number(pick(y for _, y, _ in above), 2) for pick in (min, max))
    words = f"▲ first point, at {low}" if low == high else f"▲ first points, at {low} to {high}"
    axes.annotate(words, (0.98, 0.98), xycoords="axes fraction", ha="right", va="top", color=FAINT, fontsize="small")


def _curves(
    axes: Axes, groups: Sequence[Group], names: Sequence[str], x_of: Callable[[Run], np.ndarray]
) -> list[tuple[float, float, str]]:
    """Draws a line a group, the mean over its seeds, in a band of one standard deviation either way.

    Returns:
      Each line's first point and its colour.
    """
    starts = []
    for i, (group, name) in enumerate(zip(groups, names, strict=True)):
        color, dashes = PALETTE[i % len(PALETTE)], ("-", (0, (4, 1.5)), (0, (1, 1)))[i // len(PALETTE) % 3]
        lines = []
        for run in group.runs:
            y = run.series("eval_loss")[1]
            lines.append((x_of(run)[np.isfinite(y)], y[np.isfinite(y)]))
        if not all(x.size for x, _ in lines):
            continue
        end = min(x[-1] for x, _ in lines)
        x = np.union1d(lines[0][0][lines[0][0] < end], [end])
        if end == 0 and len(lines[0][0]) > 1:  # sends nothing: all of its losses lie at x = 0
            axes.axhline(float(np.mean([y[-1] for _, y in lines])), color=color, linestyle=(0, (1, 2)), linewidth=1.4)
            continue
        losses = np.array([np.interp(x, *line) for line in lines])  # [runs, points]
        curve(axes, x, mean := losses.mean(axis=0), color=color, linestyle=dashes, label=name)
        starts.append((float(x[0]), float(mean[0]), color))
        if len(lines) > 1:
            sd = losses.std(axis=0, ddof=1)
            axes.fill_between(x, mean - sd, mean + sd, color=color, alpha=0.18, linewidth=0)
    return starts


def _bytes_so_far(run: Run) -> np.ndarray:
    sent: np.ndarray = run.series("eval_loss", "uplink_bytes")[0] + run.series("eval_loss", "downlink_bytes")[0]
    return sent


def _seconds_so_far(run: Run) -> np.ndarray:
    total = np.cumsum([float(row.get("seconds") or 0) for row in run.metrics])
    return np.asarray(total[["eval_loss" in row for row in run.metrics]])

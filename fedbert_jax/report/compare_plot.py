"""The plot of runs side by side: held-out loss against tokens, and against bytes or time."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedbert_jax.report.comparison import Group, loss_key, to_dict
from fedbert_jax.report.fonts import plot_name
from fedbert_jax.report.plots import FAINT, INK, PALETTE, curve, new_figure, panel, to_png, token_axis
from fedbert_jax.report.runs import BYTE_UNITS, Run, number, scale
from fedbert_jax.workdir.log import to_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_LEGEND, LEGEND_LINE = 400, 100  # characters of a name in the plot's legend, and of a line of it


def write(groups: Sequence[Group], directory: str | os.PathLike[str]) -> None:
    """Writes compare.json and compare.png."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "compare.json").write_text(to_json(to_dict(groups), indent=1) + "\n", encoding="utf-8")
    (directory / "compare.png").write_bytes(to_png(draw(groups)))


def draw(groups: Sequence[Group]) -> Figure:
    """Draws held-out loss against tokens, and against bytes or, if no run sends any, time."""
    runs = [run for group in groups for run in group.runs]
    names = [plot_name(group.name, MAX_LEGEND, LEGEND_LINE) for group in groups]
    columns = 1 if any(len(line) > LEGEND_LINE // 2 for name in names for line in name.split("\n")) else 2
    lines = math.ceil(sum(name.count("\n") + 1 for name in names) / columns)
    key = loss_key(runs)
    mean = ", mean by text" if key == "eval_loss_by_text" else ""
    figure = new_figure(height=4.0 + 0.22 * lines, width=10.0)
    grid = figure.add_gridspec(1, 2)
    tokens_per, label = token_axis(runs)
    left = panel(figure, label, f"held-out loss (nats per masked token{mean})", grid[0])
    starts_left = _curves(left, groups, names, lambda run: run.series(key)[0] / tokens_per, key)
    sent = sorted(run.bytes for run in runs if run.bytes)
    per, unit = scale(sent[-1], BYTE_UNITS) if sent else (60.0, "minutes")
    silent = "; dotted: sends nothing" if len(sent) < len(runs) else ""
    right = panel(figure, f"sent up and down ({unit}){silent}" if sent else f"training time ({unit})", "", grid[1])
    right.sharey(left)
    so_far = _bytes_so_far if sent else _seconds_so_far
    starts_right = _curves(right, groups, names, lambda run: so_far(run, key) / per, key)
    if sent and sent[-1] > 20 * sent[0]:
        # Logarithmic from the first evaluation on, and linear from 0 to there: before round 1 nothing was sent.
        first = min(x[x > 0].min() for run in runs if run.bytes and (x := _bytes_so_far(run, key) / per).any())
        right.set_xscale("symlog", linthresh=first)
        right.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    late = [y[(y < np.inf) & (x > 0.05 * run.tokens)] for run in runs for x, y in [run.series(key)]]
    if any(y.size for y in late):  # the fall at the very start would flatten all later differences
        left.set_ylim(top=1.02 * max(y.max() for y in late if y.size))
        _mark_starts_above(left, starts_left)
        _mark_starts_above(right, starts_right)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, frameon=False, labelcolor=INK)
    return figure


def _mark_starts_above(axes: Axes, starts: Sequence[tuple[float, float, str]]) -> None:
    """Marks each curve whose first point (x, y, colour) lies above the axes by a triangle at the edge, and gives its y."""
    above = [start for start in starts if start[1] > axes.get_ylim()[1]]
    if not above:
        return
    for x, _, color in above:
        axes.annotate("▲", (x, 1), xycoords=axes.get_xaxis_transform(), ha="center", va="center", color=color, fontsize=8)
    low, high = (number(pick(y for _, y, _ in above), 2) for pick in (min, max))
    words = f"▲ first point, at {low}" if low == high else f"▲ first points, at {low} to {high}"
    axes.annotate(words, (0.98, 0.98), xycoords="axes fraction", ha="right", va="top", color=FAINT, fontsize="small")


def _curves(
    axes: Axes, groups: Sequence[Group], names: Sequence[str], x_of: Callable[[Run], np.ndarray], key: str
) -> list[tuple[float, float, str]]:
    """Draws a line for each group, the mean over its seeds, in a band of one standard deviation either way.

    Returns:
      Each line's first point and its colour.
    """
    starts = []
    for i, (group, name) in enumerate(zip(groups, names, strict=True)):
        color, dashes = PALETTE[i % len(PALETTE)], ("-", (0, (4, 1.5)), (0, (1, 1)))[i // len(PALETTE) % 3]
        lines = []
        for run in group.runs:
            y = run.series(key)[1]
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


def _bytes_so_far(run: Run, key: str) -> np.ndarray:
    """Returns the bytes sent before each round that has `key`, float64 [R]."""
    sent: np.ndarray = run.series(key, "uplink_bytes")[0] + run.series(key, "downlink_bytes")[0]
    return sent


def _seconds_so_far(run: Run, key: str) -> np.ndarray:
    """Returns the seconds of training until each round that has `key`, float64 [R]."""
    total = np.cumsum([float(row.get("seconds") or 0) for row in run.metrics])
    return np.asarray(total[[key in row for row in run.metrics]])

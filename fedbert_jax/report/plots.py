"""The plots of a run, drawn with matplotlib's objects: loss, accuracy, clients, partition, traffic."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from fedbert_jax.report.fonts import plot_name, use_fonts
from fedbert_jax.report.runs import BYTE_UNITS, Run, number, percent, quantity, scale

if TYPE_CHECKING:  # matplotlib takes half a second to import, and only the functions that draw need it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# From Okabe and Ito's set, which the colour-blind can tell apart (and Tol's indigo in place of its yellow and black).
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#332288")
INK, FAINT, GRID = "#444444", "#8a8a8a", "#e6e6e6"
MAX_LINES, MAX_BARS = 12, 40  # the most clients shown one by one: as lines, as bars


# --- drawing (compare.png is drawn with these too) -------------------------------------------------------------------


def new_figure(height: float = 3.8, width: float = 6.4) -> Figure:
    """Returns an empty figure, its size in inches."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    return Figure(figsize=(width, height), dpi=170, facecolor="white", layout=layout)


def panel(figure: Figure, xlabel: str, ylabel: str, position: Any = 111) -> Axes:
    """Adds axes in the house style."""
    axes = figure.add_subplot(position)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(xlabel, color=INK)
    axes.set_ylabel(ylabel, color=INK)
    return axes


def curve(axes: Axes, x: np.ndarray, y: np.ndarray, **style: Any) -> None:
    """Draws a line, with markers if the points are so few that each is worth seeing."""
    axes.plot(x, y, **{"marker": "o" if len(x) <= 30 else None, "markersize": 3.5, "linewidth": 1.8} | style)


def legend_above(axes: Axes, columns: int = 3) -> None:
    """Puts the legend where it covers no data."""
    style: dict[str, Any] = {"frameon": False, "labelcolor": INK, "handlelength": 1.6, "columnspacing": 1.4}
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=columns, **style)


def token_axis(runs: Iterable[Run]) -> tuple[float, str]:
    """Returns what to divide tokens by, and the label of their axis."""
    per, unit = scale(max(run.tokens for run in runs), ("", " (thousands)", " (millions)", " (billions)"))
    return per, f"training tokens{unit}"


def to_png(figure: Figure) -> bytes:
    """Returns the figure as the bytes of a PNG."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        use_fonts(figure)
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _no_plot(sentence: str) -> Figure:
    figure = new_figure(1.2)
    figure.text(0.5, 0.5, sentence, ha="center", va="center", color=INK)
    return figure


def _baseline(axes: Axes, value: float | None, label: str) -> None:
    if value is not None:
        axes.axhline(value, color=FAINT, linestyle=(0, (5, 3)), linewidth=1.4, label=label)


def _held_out(run: Run) -> str:
    return f"held out, {run.scope}" if run.scope else "held out"


# --- the five plots --------------------------------------------------------------------------------------------------


def loss_figure(run: Run) -> Figure:
    """Draws training and held-out loss against tokens, and what guessing by frequency would reach."""
    per, label = token_axis([run])
    axes = panel(figure := new_figure(), label, "loss (nats per masked token)")
    lines = {"train_loss": ("training", PALETTE[5], 1.1), "eval_loss": (_held_out(run), PALETTE[0], 1.8)}
    for key, (name, color, width) in lines.items():
        x, y = run.series(key)
        if x.size:
            curve(axes, x / per, y, label=name, color=color, linewidth=width)
    unigram = (run.facts.get("baselines") or {}).get("unigram_loss")
    _baseline(axes, unigram, f"guessing by frequency: {number(unigram, 2)}")
    legend_above(axes, columns=2)
    return figure


def accuracy_figure(run: Run) -> Figure:
    """Draws held-out accuracy against tokens, and what always guessing the commonest token would reach."""
    per, label = token_axis([run])
    axes = panel(figure := new_figure(), label, "masked tokens predicted right (%)")
    x, y = run.series("eval_accuracy")
    if not x.size:
        return _no_plot("No evaluation yet.")
    curve(axes, x / per, 100 * y, color=PALETTE[0], label=_held_out(run))
    commonest = (run.facts.get("baselines") or {}).get("commonest_accuracy")
    _baseline(axes, None if commonest is None else 100 * commonest, f"always the commonest token: {percent(commonest)}")
    axes.set_ylim(bottom=0)
    legend_above(axes, columns=1)
    return figure


def clients_figure(run: Run) -> Figure:
    """Draws held-out loss by client: a line for each, or quantiles if there are many."""
    per, label = token_axis([run])
    axes = panel(figure := new_figure(), label, "held-out loss (nats per masked token)")
    rows = [row for row in run.metrics if row.get("eval_clients")]
    if not rows:
        return _no_plot("No evaluation by client yet.")
    x = np.array([row.get("tokens") or 0 for row in rows]) / per
    names = list(dict.fromkeys(name for row in rows for name in row["eval_clients"]))
    values = [[(row["eval_clients"].get(name) or {}).get("loss") for name in names] for row in rows]
    losses = np.ma.masked_invalid(np.array(values, np.float64))  # [R, clients]
    order = np.argsort(-losses[-1].filled(np.inf), kind="stable")  # from highest to lowest by the lines' ends
    if len(names) <= MAX_LINES:
        for rank, i in enumerate(order):
            color, dashes = PALETTE[rank % len(PALETTE)], "-" if rank < len(PALETTE) else (0, (4, 1.5))
            curve(axes, x, losses[:, i], color=color, linestyle=dashes, label=plot_name(names[i]))
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, labelcolor=INK, handlelength=1.6)
        return figure
    measured = [row.compressed() if row.count() else np.array([np.nan]) for row in losses]
    for low, high, alpha in ((5, 95, 0.16), (25, 75, 0.3)):
        bounds = np.array([np.percentile(row, (low, high)) for row in measured])
        name = f"{low} to {high} % of {len(names)} clients"
        axes.fill_between(x, bounds[:, 0], bounds[:, 1], color=PALETTE[0], alpha=alpha, linewidth=0, label=name)
    curve(axes, x, np.array([np.median(row) for row in measured]), color=PALETTE[0], label="median")
    for color, i, what in ((PALETTE[1], order[0], "highest"), (PALETTE[2], order[-1], "lowest")):
        curve(axes, x, losses[:, i], color=color, linewidth=1.2, label=f"{what}: {plot_name(names[i])}")
    legend_above(axes, columns=2)
    return figure


def bytes_figure(run: Run) -> Figure:
    """Draws bytes sent against tokens, and the bytes of each message."""
    (x, up), (_, down) = run.series("uplink_bytes"), run.series("downlink_bytes")
    if not x.size or not up[-1] + down[-1]:
        return _no_plot("Nothing crossed a wire.")
    messages = [(name, size, way) for way, sizes in run.messages.items() for name, size in sizes.items()]
    figure = new_figure(3.4 + 0.33 * len(messages))
    grid = figure.add_gridspec(1 + bool(messages), 1, height_ratios=[3.0, 0.33 * len(messages)][: 1 + bool(messages)])
    (tokens_per, label), (per, unit) = token_axis([run]), scale(max(up[-1], down[-1]), BYTE_UNITS)
    axes = panel(figure, label, f"sent since the start ({unit})", grid[0])
    for y, name, color, dashes in ((up, "to the server", PALETTE[0], "-"), (down, "to the clients", PALETTE[1], "--")):
        style = {"color": color, "linestyle": dashes, "marker": "", "linewidth": 2.2}  # dashed: the two often coincide
        label = f"{name}: {quantity(y[-1], BYTE_UNITS)}"
        curve(axes, np.r_[0, x] / tokens_per, np.r_[0, y] / per, label=label, **style)
    legend_above(axes)
    if messages:
        sizes = [size for _, size, _ in messages]
        per, unit = scale(max(sizes), BYTE_UNITS)
        axes = panel(figure, f"in one round ({unit})", "", grid[1])
        names = [plot_name(f"{name.replace('_', ' ')} {way}") for name, _, way in messages]
        colors = [PALETTE[1 if way == "down" else 0] for _, _, way in messages]
        bars = axes.barh(names, [size / per for size in sizes], color=colors, height=0.62)
        axes.bar_label(bars, [quantity(size, BYTE_UNITS) for size in sizes], padding=4, color=INK)
        axes.margins(x=0.16)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
    return figure


def partition_figure(run: Run) -> Figure:
    """Draws how much text clients hold and how far it is from the whole: bars, or histograms if there are many."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    clients = [client for client in run.facts.get("clients") or [] if client.get("tokens") is not None]
    if not clients:
        return _no_plot("run.json does not say which client holds what.")
    clients.sort(key=lambda client: client["tokens"])
    tokens = np.array([client["tokens"] for client in clients], np.float64)
    divergence = np.array([client.get("js_divergence") for client in clients], np.float64)  # None becomes NaN
    columns = {"tokens a client": tokens}
    if np.isfinite(divergence).any():
        columns["JS divergence"] = divergence
    if len(clients) > MAX_BARS:
        return _histograms(columns)
    names = [plot_name(str(client.get("name", ""))) for client in clients]
    figure = new_figure(1.1 + 0.27 * len(clients))
    grid = figure.add_gridspec(1, len(columns), width_ratios=(3, 2)[: len(columns)])
    for i, (label, x) in enumerate(columns.items()):
        axes = panel(figure, label, "", grid[i])
        bars = axes.barh(range(len(x)), x, color=PALETTE[i], height=0.68)
        axes.bar_label(bars, [quantity(v) if i == 0 else number(v, 2) for v in x], padding=4, color=INK)
        axes.set_yticks(range(len(x)), names if i == 0 else [])
        axes.tick_params(axis="y", length=0)
        axes.margins(x=0.22, y=0.02)
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(4 if i == 0 else 2))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: quantity(value)))
    return figure


def _histograms(columns: dict[str, np.ndarray]) -> Figure:
    from matplotlib.ticker import FuncFormatter

    figure = new_figure(2.9 * len(columns))
    grid = figure.add_gridspec(len(columns), 1)
    for i, (label, x) in enumerate(columns.items()):
        x = x[np.isfinite(x)]
        wide = i == 0 and x.max() > 30 * x.min() > 0
        axes = panel(figure, label, "clients", grid[i])
        axes.hist(
            x,
            np.geomspace(x.min(), x.max(), 41).tolist() if wide else 40,
            color=PALETTE[i],
            edgecolor="white",
            linewidth=0.5,
        )
        axes.set_xscale("log" if wide else "linear")
        axes.grid(visible=False, axis="x")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: quantity(value)))
    return figure

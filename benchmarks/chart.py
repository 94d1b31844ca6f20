"""A suite's ratios as one chart: medians, quartiles and targets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedbert_jax.report.plots import FAINT, INK, PALETTE, new_figure, panel, to_png

MET, MISSED, FREE = PALETTE[2], PALETTE[1], PALETTE[0]


def draw(results: Sequence[dict[str, Any]], title: str) -> bytes:
    """Returns a PNG of the rows that are ratios: how many times as fast A trains as B, on a logarithmic axis."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

    rows = [r for r in results if r["kind"] == "ratio" and "failed" not in r]
    figure = new_figure(1.6 + 0.27 * max(len(rows), 1), 8.4)
    axes = panel(figure, "tokens a second, A / B (median and quartiles)", "")
    for n, r in enumerate(rows):
        color = {None: FREE, True: MET, False: MISSED}[r["met"]]
        low, high = r["quartiles"]
        axes.plot((low, high), (n, n), color=color, linewidth=5, alpha=0.35, solid_capstyle="butt")
        axes.plot(r["value"], n, "o", color=color, markersize=5.5)
        axes.annotate(
            f"{r['value']:.2f}",
            (max(high, r["value"]), n),
            (6, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=INK,
        )
        if r["target"] is not None:
            axes.plot((r["target"], r["target"]), (n - 0.38, n + 0.38), color=INK, linewidth=1.6)
    axes.axvline(1.0, color=FAINT, linewidth=1, linestyle=(0, (5, 3)))
    several = len({r["size"] for r in rows}) > 1
    axes.set_yticks(range(len(rows)), [f"{r['name']} [{r['size']}]" if several else r["name"] for r in rows], fontsize=8)
    axes.set_ylim(max(len(rows), 1) - 0.5, -0.5)
    axes.set_xscale("log")
    values = [v for r in rows for v in (*r["quartiles"], r["value"], r["target"] or r["value"])] or [1.0]
    axes.set_xlim(0.85 * min(1.0, *values), 1.35 * max(1.0, *values))
    axes.xaxis.set_major_locator(FixedLocator([0.1, 0.2, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 20, 50, 100]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    dot = dict(marker="o", linestyle="none", markersize=5.5)
    figure.legend(
        handles=[
            Line2D([], [], color=MET, label="target met", **dot),
            Line2D([], [], color=MISSED, label="target missed", **dot),
            Line2D([], [], color=FREE, label="no target", **dot),
            Line2D([], [], color=INK, marker="|", linestyle="none", markersize=9, markeredgewidth=1.6, label="target"),
        ],
        loc="outside upper center",
        ncols=4,
        frameon=False,
        labelcolor=INK,
        fontsize=8,
        title=title,
        title_fontsize=9,
    )
    return to_png(figure)

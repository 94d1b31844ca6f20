"""The report of one run: plots, and a page of HTML that needs nothing beside itself.

`python -m fedbert_jax.report --workdir DIR` writes it at any time, of a run that has not finished too.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
import math
import os
import string
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedbert_jax.errors import UserError
from fedbert_jax.metrics import BYTE_UNITS, Run, duration, load_run, number, percent, quantity, scale

if TYPE_CHECKING:  # matplotlib takes half a second to import, and only the functions that draw need it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

THREAT_MODEL = (
    "The cut keeps raw text and labels at the client; it does not by itself stop a server from inverting activations."
)
# From Okabe and Ito's set, which the colour-blind can tell apart (and Tol's indigo in place of its yellow and black).
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#332288")
INK, FAINT, GRID = "#444444", "#8a8a8a", "#e6e6e6"
MAX_LINES, MAX_BARS, MAX_ROWS = 12, 40, 2000  # clients that are shown one by one: in a plot, as bars, in the table


# --- drawing (compare.png is drawn with these too) -------------------------------------------------------------------


def new_figure(height: float = 3.8, width: float = 6.4) -> Figure:
    """Returns an empty figure, its size in inches."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    return Figure(figsize=(width, height), dpi=170, facecolor="white", layout=layout)


def panel(figure: Figure, xlabel: str, ylabel: str, position: Any = 111) -> Axes:
    """Adds axes in the house's style."""
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
    """Draws a line, with markers where the points are so few that each is worth seeing."""
    axes.plot(x, y, **{"marker": "o" if len(x) <= 30 else None, "markersize": 3.5, "linewidth": 1.8} | style)


def legend_above(axes: Axes, columns: int = 3) -> None:
    """Puts the legend where it covers no data."""
    style: dict[str, Any] = {"frameon": False, "labelcolor": INK, "handlelength": 1.6, "columnspacing": 1.4}
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=columns, **style)


def token_axis(runs: Iterable[Run]) -> tuple[float, str]:
    """Returns what to divide tokens by, and the label of their axis."""
    per, unit = scale(max(run.tokens for run in runs), ("", " (thousands)", " (millions)", " (billions)"))
    return per, f"training tokens{unit}"


def plot_name(name: str, longest: int = 24) -> str:
    """Returns a name fit for a plot: one short line, without what matplotlib takes for markup."""
    name = " ".join(name.split())
    name = name if len(name) <= longest else name[: longest - 1] + "…"
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def to_png(figure: Figure) -> bytes:
    """Returns the figure as the bytes of a PNG."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a name in a script that matplotlib's font lacks
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _no_plot(sentence: str) -> Figure:
    figure = new_figure(1.2)
    figure.text(0.5, 0.5, sentence, ha="center", va="center", color=INK)
    return figure


def _baseline(axes: Axes, value: float | None, label: str) -> None:
    if value is not None:
        axes.axhline(value, color=FAINT, linestyle=(0, (5, 3)), linewidth=1.4, label=label)


# --- the five plots --------------------------------------------------------------------------------------------------


def loss_figure(run: Run) -> Figure:
    """Draws training and held-out loss against tokens, and what guessing by frequency would reach."""
    per, label = token_axis([run])
    axes = panel(figure := new_figure(), label, "loss (nats per masked token)")
    lines = {"train_loss": ("training", PALETTE[5], 1.1), "eval_loss": ("held out", PALETTE[0], 1.8)}
    for key, (name, color, width) in lines.items():
        x, y = run.series(key)
        if x.size:
            curve(axes, x / per, y, label=name, color=color, linewidth=width)
    unigram = (run.facts.get("baselines") or {}).get("unigram_loss")
    _baseline(axes, unigram, f"guessing by frequency: {number(unigram, 2)}")
    legend_above(axes)
    return figure


def accuracy_figure(run: Run) -> Figure:
    """Draws held-out accuracy against tokens, and what always guessing the commonest token would reach."""
    per, label = token_axis([run])
    axes = panel(figure := new_figure(), label, "masked tokens predicted right (%)")
    x, y = run.series("eval_accuracy")
    if not x.size:
        return _no_plot("No evaluation yet.")
    curve(axes, x / per, 100 * y, color=PALETTE[0], label="held out")
    commonest = (run.facts.get("baselines") or {}).get("commonest_accuracy")
    _baseline(axes, None if commonest is None else 100 * commonest, f"always the commonest token: {percent(commonest)}")
    axes.set_ylim(bottom=0)
    legend_above(axes)
    return figure


def clients_figure(run: Run) -> Figure:
    """Draws held-out loss by client: a line each, or quantiles where they are many."""
    per, label = token_axis([run])
    axes = panel(figure := new_figure(), label, "held-out loss (nats per masked token)")
    rows = [row for row in run.metrics if row.get("eval_clients")]
    if not rows:
        return _no_plot("No evaluation by client yet.")
    x = np.array([row.get("tokens") or 0 for row in rows]) / per
    names = list(dict.fromkeys(name for row in rows for name in row["eval_clients"]))
    values = [[(row["eval_clients"].get(name) or {}).get("loss") for name in names] for row in rows]
    losses = np.ma.masked_invalid(np.array(values, np.float64))  # [R, clients]
    order = np.argsort(-losses[-1].filled(np.inf), kind="stable")  # from highest to lowest, as the lines end
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
    """Draws bytes sent against tokens, and which messages they are."""
    (x, up), (_, down) = run.series("uplink_bytes"), run.series("downlink_bytes")
    if not x.size or not up[-1] + down[-1]:
        return _no_plot("Nothing crossed a wire.")
    messages = {name: size for name, size in (run.facts.get("bytes_per_round") or {}).items() if size}
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
        per, unit = scale(max(messages.values()), BYTE_UNITS)
        axes = panel(figure, f"in one round ({unit})", "", grid[1])
        names = [plot_name(name.replace("_", " ")) for name in messages]
        colors = [PALETTE[1 if name.endswith("_down") else 0] for name in messages]
        bars = axes.barh(names, [size / per for size in messages.values()], color=colors, height=0.62)
        axes.bar_label(bars, [quantity(size, BYTE_UNITS) for size in messages.values()], padding=4, color=INK)
        axes.margins(x=0.16)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
    return figure


def partition_figure(run: Run) -> Figure:
    """Draws how much text clients hold and how far it is from the whole: bars, or histograms of many."""
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
        axes.xaxis.set_major_locator(MaxNLocator(4))
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


# --- the page --------------------------------------------------------------------------------------------------------

PLOTS = {
    "loss": (loss_figure, "Loss", "Below the dashed line the model knows more than how often each token occurs."),
    "accuracy": (accuracy_figure, "Accuracy", "Masked held-out tokens for which the first guess is the right one."),
    "clients": (clients_figure, "Clients", "Loss on each client's own held-out text."),
    "partition": (partition_figure, "Partition", "How much text each holds, and how unlike the whole its words are."),
    "bytes": (bytes_figure, "Traffic", "Bytes between all clients and the server."),
}
# In the dark, plots are inverted with their hues turned back; the background is what 0.9 makes of white.
PAGE = string.Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$title</title><style>
:root { --ink: #222; --soft: #666; --line: #e2e2e2; --paper: #fff; color-scheme: light dark }
@media (prefers-color-scheme: dark) { :root { --ink: #ddd; --soft: #9a9a9a; --line: #383838; --paper: #1a1a1a }
  img { filter: invert(.9) hue-rotate(180deg) } }
body { margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 66rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, sans-serif }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere }
h2 { font-size: 1.1rem; margin: 2.5rem 0 .5rem }
.soft, figcaption { color: var(--soft); font-size: .9rem } p { margin: .3rem 0; max-width: 46rem }
.key { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: 1rem; margin: 1.5rem 0 }
.key div { border-top: 2px solid var(--line); padding-top: .4rem }
.key b { display: block; color: var(--ink); font-size: 1.35rem }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: 2rem 1.5rem }
figure { margin: 0 } .plots h2 { margin-top: 0 } img { width: 100%; height: auto }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { text-align: left; font-weight: normal; padding: .25rem 1.2rem .25rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; overflow-wrap: break-word }
.facts th, thead th { color: var(--soft) } .facts td { overflow-wrap: anywhere }
.numbers td, .numbers th + th { text-align: right } .numbers td { white-space: nowrap }
.numbers tbody th { min-width: 6rem; max-width: 16rem; overflow-wrap: anywhere }
summary { cursor: pointer }
</style></head><body>
<header><h1>$title</h1><p class="soft">$subtitle</p></header>
<div class="key">$key</div>
<div class="plots">$plots</div>
$sections
<h2>What the cut protects</h2><p>$threat_model</p>
</body></html>
""")


def write_report(workdir: str | os.PathLike[str]) -> Path:
    """Writes `report/` into a workdir, over the one that is there: five PNGs and index.html, whose path it returns.

    The run may still be going on, and run.json may be missing.

    Raises:
      UserError: if `workdir` is no workdir, or holds no metrics yet.
    """
    run = load_run(workdir)
    directory = run.workdir / "report"
    directory.mkdir(exist_ok=True)
    images = {}
    for name, (draw, _, _) in PLOTS.items():
        images[name] = to_png(draw(run))
        (directory / f"{name}.png").write_bytes(images[name])
    page = directory / "index.html"
    page.write_text(_page(run, images), encoding="utf-8")
    return page


def facts(run: Run) -> dict[str, str]:
    """Returns what a reader asks first about a run, in words."""
    c, f = run.config, run.facts
    clients = f.get("num_clients") or c["federated.num_clients"]
    cohort = f.get("clients_per_round") or c["federated.clients_per_round"] or clients
    parameters = f.get("parameters") or {}
    versions = [f"{name} {version}" for name, version in (f.get("versions") or {}).items()]
    body = f", {c['federated.body']} body" if c["federated.strategy"] == "parallel" else ""
    sequences = f"{c['federated.batch_size']} sequences of {c['data.seq_len']} tokens"
    return {
        "strategy": c["federated.strategy"] + body,
        "clients": f"{_count(clients)}, of them {_count(cohort)} a round",
        "local steps": f"{c['federated.local_steps']} a round, each of {sequences} a client",
        "rounds": f"{run.rounds:,} of {c['federated.rounds']:,}",
        "held-out loss": f"{number(run.final('eval_loss'))} at the end, {number(run.best('eval_loss'))} at best",
        "held-out accuracy": f"{percent(run.final('eval_accuracy'))} at the end, "
        f"{percent(run.best('eval_accuracy', np.max))} at best",
        "tokens": quantity(run.tokens),
        "bytes a token": quantity(run.bytes / run.tokens if run.tokens else None, BYTE_UNITS),
        "time": duration(run.seconds),
        "tokens a second": quantity(run.tokens / run.seconds if run.seconds else None),
        "device": str(f.get("device") or "–"),
        "model": c["model.preset"],
        "parameters": f"{quantity(parameters.get('client'))} at a client, "
        f"{quantity(parameters.get('server'))} at the server",
        "text": f"{c['data.source']}, partition {c['data.partition.kind']}",
        "tokenizer": c["data.tokenizer"],
        "wire": f"{c['wire.codec']}, {c['wire.downlink']} hidden states down",
        "seed": str(c["seed"]),
        "versions": ", ".join(versions) or "–",
    }


def _page(run: Run, images: dict[str, bytes]) -> str:
    words = facts(run)
    finished = run.facts.get("finished", run.rounds >= run.config["federated.rounds"])
    unfinished = "" if finished else f" Not finished: {words['rounds']} rounds."
    key = {
        "held-out loss": number(run.final("eval_loss")),
        "held-out accuracy": percent(run.final("eval_accuracy")),
        "tokens": words["tokens"],
        "bytes sent": quantity(run.bytes, BYTE_UNITS),
        "training time": words["time"],
    }
    plots = [
        f'<figure><h2>{title}</h2><img alt="{title}: {caption}" src="data:image/png;base64,'
        f'{base64.b64encode(images[name]).decode()}"><figcaption>{caption}</figcaption></figure>'
        for name, (_, title, caption) in PLOTS.items()
    ]
    plots.append("<section><h2>The run</h2>" + _table(words.items()) + "</section>")
    return PAGE.substitute(
        title=html.escape(run.workdir.resolve().name),
        subtitle=html.escape(f"{words['strategy']}. {_verdict(run)}{unfinished}"),
        key="".join(f'<div class="soft">{name}<b>{html.escape(value)}</b></div>' for name, value in key.items()),
        plots="".join(plots),
        sections=_fill_mask(run) + _clients(run) + _config(run),
        threat_model=html.escape(THREAT_MODEL),
    )


def _verdict(run: Run) -> str:
    loss, unigram = run.final("eval_loss"), (run.facts.get("baselines") or {}).get("unigram_loss")
    if loss is None:
        return "Nothing has been evaluated yet."
    if not math.isfinite(loss):
        return "The held-out loss is not finite: training diverged."
    if unigram is None:
        return f"Held-out loss {loss:.3f}."
    if loss >= unigram:
        return f"Held-out loss {loss:.3f}: not yet better than guessing by frequency ({unigram:.3f})."
    return f"Held-out loss {loss:.3f}, {unigram - loss:.3f} below guessing by frequency ({unigram:.3f})."


def _clients(run: Run) -> str:
    """Returns the table of clients, the largest first, with each one's last evaluation."""
    evaluated: dict[str, Any] = next((row["eval_clients"] for row in run.metrics[::-1] if row.get("eval_clients")), {})
    known = {str(client["name"]): client for client in run.facts.get("clients") or [] if "name" in client}
    names = sorted(dict.fromkeys([*known, *evaluated]), key=lambda name: -(known.get(name, {}).get("tokens") or 0))
    if not names:
        return ""
    rows = []
    for name in names[:MAX_ROWS]:
        client, scores = known.get(name, {}), evaluated.get(name) or {}
        counts = [_count(client.get(key)) for key in ("documents", "tokens", "train_blocks", "heldout_blocks")]
        share, divergence = percent(client.get("share")), number(client.get("js_divergence"))
        rows.append([name, *counts, share, divergence, number(scores.get("loss")), percent(scores.get("accuracy"))])
    header = ["client", "documents", "tokens", "training blocks", "held-out blocks"]
    header += ["share", "JS divergence", "loss", "accuracy"]
    left_out = f"<p class=soft>The largest {MAX_ROWS:,}; all are in run.json.</p>" if len(names) > MAX_ROWS else ""
    folded = "" if len(names) <= MAX_BARS else "<details><summary>All in a table</summary>"
    end = "</details>" if folded else ""
    return f"<h2>{len(names):,} clients</h2>{folded}{_table(rows, header, 'numbers')}{left_out}{end}"


def _fill_mask(run: Run) -> str:
    rows = []
    for sentence in run.facts.get("fill_mask") or []:
        guesses = [f"{token} ({probability:.0%})" for token, probability in sentence.get("predictions") or []]
        rows.append((str(sentence.get("text", "")), ", ".join(guesses)))
    return "<h2>Filled in by the model</h2>" + _table(rows, ("sentence", "guesses"), "") if rows else ""


def _config(run: Run) -> str:
    rows = [(key, json.dumps(value)) for key, value in sorted(run.config.items())]
    return f"<h2>Configuration</h2><details><summary>All {len(rows)} keys</summary>{_table(rows)}</details>"


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _table(rows: Iterable[Sequence[str]], header: Sequence[str] = (), style: str = "facts") -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join(
        f"<tr><th>{html.escape(first)}</th>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows
    )
    head = f"<thead><tr>{head}</tr></thead>" if head else ""
    return f'<div class="wide"><table class="{style}">{head}<tbody>{body}</tbody></table></div>'


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m fedbert_jax.report", description="Writes the report of a run.")
    parser.add_argument("--workdir", required=True, help="of a run that has finished, stopped or is still going on")
    try:
        print(write_report(parser.parse_args(arguments).workdir))
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return UserError.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""An audit's rows: as JSON, as a table, as a plot, and in one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from fedbert_jax.report import audits, plots
from fedbert_jax.report.runs import percent

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table


@dataclass(frozen=True)
class Row:
    """What one attack recovered. Shares are fractions; what an attack has no number for is None."""

    knows: str  # the kind of knowledge
    attack: str
    of: str  # tokens, labels, or words
    top1: float | None  # share of tokens that the first guess is right for
    top5: float | None
    low: float  # of `top1`: the 95% interval over blocks; of `auc`: the lowest and the highest client
    high: float
    exact: float | None  # share of blocks that are read without a mistake
    bits_per_token: float | None  # learnt about a token, beyond how frequent it is
    auc: float | None  # of rare words: how well those that a client has are told from the others
    floor_random: float  # top-1 of a word drawn at random; of `auc`, .5
    floor_unigram: float  # top-1 of the commonest word, where that counts; `auc` of how frequent words are
    floor_unigram_top5: float | None
    count: int  # tokens; of `auc`, clients
    seconds: float
    round: int  # of the checkpoint

    def to_dict(self) -> dict[str, Any]:
        """Returns what JSON can hold."""
        return asdict(self)


def to_table(rows: Sequence[Row], words: dict[str, str]) -> Table:
    """Returns the table of an audit; `words` says what the kinds of knowledge are."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("who knows", "attack", "of", "recovered", "95%", "top 5", "whole blocks", "bits", "floor", "s"):
        table.add_column(
            name, justify="left" if name in ("who knows", "attack", "of") else "right", no_wrap=name != "who knows"
        )
    for row in rows:
        table.add_row(words[row.knows], row.attack, row.of, *_cells(row))
    return table


def to_markdown(rows: Sequence[Row], words: dict[str, str]) -> str:
    """Returns the table as Markdown."""
    head = "| who knows | attack | of | recovered | 95% | top 5 | whole blocks | bits | floor | s |"
    rule = "| --- | --- | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |"
    lines = [f"| {' | '.join((words[row.knows], row.attack, row.of, *_cells(row)))} |" for row in rows]
    return "\n".join([head, rule, *lines])


def _cells(row: Row) -> tuple[str, ...]:
    if row.top1 is None:
        assert row.auc is not None
        return (
            f"AUC {row.auc:.3f}",
            f"clients {row.low:.3f}–{row.high:.3f}",
            "",
            "",
            "",
            f"{row.floor_unigram:.3f}",
            f"{row.seconds:.0f}",
        )
    return (
        percent(row.top1), f"{100 * row.low:.1f}–{100 * row.high:.1f}", percent(row.top5), percent(row.exact),
        f"{row.bits_per_token:.1f}", percent(row.floor_unigram), f"{row.seconds:.0f}",
    )  # fmt: skip


def strongest(rows: Sequence[Row]) -> str:
    """Names the strongest attack for each kind of knowledge, and what it recovers."""
    said = []
    for (knows, of), row in audits.strongest([row.to_dict() for row in rows]).items():
        found = f"AUC {row['auc']:.3f} of rare words" if row["top1"] is None else f"{percent(row['top1'])} of {of}"
        said.append(f"{knows} {found} ({row['attack']})")
    return "strongest: " + ", ".join(said)


def figure(rows: Sequence[Row], words: dict[str, str]) -> Figure:
    """Draws the shares recovered, with their intervals and floors."""
    shown = [row for row in rows if row.top1 is not None][::-1]
    axes = plots.panel(drawn := plots.new_figure(1.2 + 0.34 * len(shown)), "recovered (%)", "")
    places, shares = range(len(shown)), [100 * (row.top1 or 0) for row in shown]
    below = [share - 100 * row.low for share, row in zip(shares, shown, strict=True)]
    above = [100 * row.high - share for share, row in zip(shares, shown, strict=True)]
    colors = [plots.PALETTE[0] if row.of == "tokens" else plots.PALETTE[1] for row in shown]
    bars = {"ecolor": plots.INK, "elinewidth": 1.0}
    axes.barh(places, shares, color=colors, height=0.6, xerr=[below, above], error_kw=bars)
    for place, row in zip(places, shown, strict=True):
        floor = 100 * row.floor_unigram
        axes.plot([floor, floor], [place - 0.4, place + 0.4], color=plots.INK, linestyle=(0, (3, 2)), linewidth=1.2)
    axes.set_yticks(places, [f"{row.knows.replace('_', ' ')}: {row.attack}, {row.of}" for row in shown])
    axes.set_xlim(0, 100)
    axes.grid(visible=False, axis="y")
    return drawn

"""What audits have found in runs: the strongest attack for each kind of knowledge, and runs side by side."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from fedbert_jax.report.comparison import Group
from fedbert_jax.report.runs import BYTE_UNITS, Run, number, percent, quantity

Found = dict[str, Any]  # a row of audit.json
TOKENS, LABELS, WORDS = "tokens", "labels", "words"


def read_audit(workdir: Path) -> list[Found]:
    """Returns the rows of a workdir's audit; [] if there is none, or it can't be read."""
    try:
        rows = json.loads((workdir / "audit" / "audit.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    numbers = ("top1", "auc", "floor_unigram")

    def whole(row: Any) -> bool:
        said = isinstance(row, dict) and all(isinstance(row.get(name), str) for name in ("knows", "attack", "of"))
        return said and all(isinstance(row.get(name), int | float | None) for name in numbers)

    return rows if isinstance(rows, list) and all(map(whole, rows)) else []


def share(row: Found) -> float:
    """Returns what attacks on the same thing are ordered by: the share recovered, or the AUC."""
    found = row.get("top1") if row.get("top1") is not None else row.get("auc")
    return float(found or 0.0)


def strongest(rows: Sequence[Found]) -> dict[tuple[str, str], Found]:
    """Returns the strongest attack by (kind of knowledge, what is recovered), in the order of the rows."""
    best: dict[tuple[str, str], Found] = {}
    for row in rows:
        key = (row["knows"], row["of"])
        if key not in best or share(row) > share(best[key]):
            best[key] = row
    return best


def prices(groups: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    """Returns the price list of groups that were audited: a header, and a row a group, its name first.

    What is recovered is the mean over the group's audited runs, with the standard deviation of a sample.
    """
    audited = {group.name: [strongest(rows) for run in group.runs if (rows := read_audit(run.workdir))] for group in groups}
    keys = list(dict.fromkeys(key for found in audited.values() for one in found for key in one))
    header = ["run", "audited", *(f"{knows}, {of}" for knows, of in keys), "loss by text", "bytes a token", "ms a step"]
    lines: list[list[str]] = []
    for group in groups:
        if not (found := audited[group.name]):
            continue
        cells = []
        for key in keys:
            values = [share(one[key]) for one in found if key in one]
            show = percent if key[1] != WORDS else number
            spread = f" ± {show(statistics.stdev(values))}" if len(values) > 1 else ""
            cells.append(show(statistics.mean(values)) + spread if values else "–")
        mean = lambda of: statistics.mean(map(of, group.runs))  # noqa: B023, E731
        loss = [value for run in group.runs if (value := run.final("eval_loss_by_text")) is not None]
        cells += [number(statistics.mean(loss) if loss else None), quantity(mean(_bytes_a_token), BYTE_UNITS)]
        lines.append([group.name, f"{len(found)} of {len(group.runs)}", *cells, number(1e3 * mean(_step_time), 1)])
    return header, lines


def _bytes_a_token(run: Run) -> float:
    return run.bytes / run.tokens if run.tokens else 0.0


def _step_time(run: Run) -> float:
    steps = run.final("step") or 0.0
    return run.seconds / steps if steps else 0.0


def to_table(groups: Sequence[Group]) -> Table | None:
    """Returns the price list for a terminal; None if no run was audited."""
    header, rows = prices(groups)
    table = Table(box=None, pad_edge=False, header_style="bold underline")
    for i, title in enumerate(header):
        table.add_column(title.replace(", ", "\n").replace(" ", "\n"), justify="right" if i else "left", no_wrap=i > 0)
    for row in rows:
        table.add_row(*map(Text, row))
    return table if rows else None


def to_markdown(groups: Sequence[Group]) -> str:
    """Returns the price list as Markdown; "" if no run was audited."""
    header, rows = prices(groups)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) if rows else ""


def to_dict(groups: Sequence[Group]) -> dict[str, Any]:
    """Returns what compare.json has of audits: each group's strongest attacks, run by run; {} if no run was audited."""
    found = [[list(strongest(read_audit(run.workdir)).values()) for run in group.runs] for group in groups]
    named = [{"label": group.label, "runs": runs} for group, runs in zip(groups, found, strict=True)]
    return {"audits": named} if any(any(runs) for runs in found) else {}

"""Results as Markdown: the tables of rows and of sides, and a suite's block in RESULTS.md."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.pairs import Row
from benchmarks.suites import SUITES, Suite

UNMEASURED = "unmeasured"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table; a column whose name ends in ":" is right-aligned."""
    lines = [[c.rstrip(":") for c in columns], ["---:" if c.endswith(":") else "---" for c in columns], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def value_text(kind: str, value: float) -> str:
    """Returns a row's number with its unit."""
    return {"ratio": f"{value:.2f}", "share": f"{value:.1%}", "seconds": f"{value:.1f} s"}[kind]


def verdict(result: dict[str, Any]) -> str:
    """Returns whether a row's target was met, or by how much it was missed."""
    if result["met"] is None:
        return ""
    return "met" if result["met"] else f"missed by {value_text(result['kind'], abs(result['value'] - result['target']))}"


def rows_table(rows: Sequence[Row], results: Sequence[dict[str, Any]]) -> str:
    """Returns the table of rows; those without a result are marked as unmeasured."""
    found = {(r["size"], r["name"]): r for r in results}
    columns = ("size", "A / B", "A", "B", "A, ms:", "B, ms:", "A / B:", "quartiles", "target", "verdict")
    lines = []
    for row in rows:
        r = found.get((row.size, row.name))
        if r is None or "failed" in r:
            why = UNMEASURED if r is None else f"failed: {r['failed']}".replace("|", "/")
            lines.append((row.size, row.name, "", "", "", "", "", "", row.goal, why))
            continue
        low, high = (value_text(r["kind"], q) for q in r["quartiles"])
        ms = [f"{r[k]:.0f}" if k in r else "" for k in ("a_ms", "b_ms")]
        lines.append(
            (
                row.size,
                row.name,
                r.get("a", ""),
                r.get("b", ""),
                *ms,
                value_text(r["kind"], r["value"]),
                f"{low}–{high}",
                row.goal,
                verdict(r),
            )
        )
    drop = 0 if any(row.size for row in rows) else 1  # one size: no column for it
    return markdown(columns[drop:], [line[drop:] for line in lines])


def sides_table(sides: Sequence[dict[str, Any]]) -> str:
    """Returns the table of sides: speed, FLOP/s, memory, compile time."""
    columns = (
        "size",
        "side",
        "ms:",
        "tokens/s:",
        "GFLOP/s, model:",
        "GFLOP/s, executed:",
        "of the ceiling:",
        "peak memory, MB:",
        "compile, s:",
    )
    return markdown(
        columns,
        [
            (
                s["size"],
                s["name"],
                f"{s['ms']:.0f}",
                f"{s['tokens_per_second']:,.0f}",
                f"{1e-9 * s['flops_needed']:,.1f}",
                f"{1e-9 * s['flops_executed']:,.1f}",
                "" if s["share"] is None else f"{s['share']:.1%}",
                "" if s["peak_bytes"] is None else f"{1e-6 * s['peak_bytes']:,.0f}",
                f"{s['compile_seconds']:.1f}",
            )
            for s in sides
        ],
    )


def report(suite: Suite, record: dict[str, Any], rows: Sequence[Row]) -> str:
    """Returns the report of a suite: rows, sides, sizes, machines."""
    order = {(row.size, row.name): n for n, row in enumerate(rows)}
    results = [r for r in record["rows"] if (r["size"], r["name"]) in order]
    sizes = {row.size for row in rows}
    sides = [s for s in record["sides"] if s["size"] in sizes]
    parts = [rows_table(rows, results)]
    if sides:
        parts.append(sides_table(sorted(sides, key=lambda s: list(record["sizes"]).index(s["size"]))))
        parts.append("\n".join(describe_size(name, s) for name, s in record["sizes"].items() if name in sizes))
    dates = {x["date"] for x in (*results, *sides)}
    for date, facts in record["machines"].items():
        if date in dates:
            measured = [f"{r['size']}: {r['name']}" for r in results if r["date"] == date]
            which = "" if len(dates) == 1 else "Rows of that time: " + "; ".join(measured) + ".\n"
            parts.append(describe_machine(facts) + ("\n" + which).rstrip())
    return "\n\n".join(parts)


def describe_size(name: str, s: dict[str, Any]) -> str:
    """Returns a size, described in one line."""
    return (
        f"- `{name}`: {s['hidden']} x {s['layers']}, vocabulary {s['vocab']}; a global batch is {s['clients']} clients x "
        f"{s['batch']} sequences x {s['length']} tokens, and ms are for one; rounds of {s['steps']} steps; {s['dtype']}."
    )


def describe_machine(facts: dict[str, Any]) -> str:
    """Returns the machine's facts, with the matmul ceiling."""
    c = facts["ceiling"]
    each = ", ".join(f"{library} {1e-9 * flops:,.0f}" for library, flops in c["by_library"].items())
    return (
        f"{machine.describe(facts)}\nDevice: {c['device']}; matmul ceiling ({c['n']} x {c['n']}, {c['dtype']}): "
        f"{1e-9 * c['flops']:,.0f} GFLOP/s ({each}). {facts['samples']} samples a row."
    )


def update_block(path: Path, suite: str, text: str) -> None:
    """Replaces a suite's block, between `<!-- suite:NAME -->` and `<!-- end -->`, or appends one."""
    old = path.read_text() if path.exists() else "# Results\n"
    block = f"<!-- suite:{suite} -->\n\n{text}\n\n<!-- end -->"
    pattern = re.compile(rf"<!-- suite:{suite} -->.*?<!-- end -->", re.DOTALL)
    if pattern.search(old):
        path.write_text(pattern.sub(lambda _: block, old, count=1))
    else:
        path.write_text(f"{old.rstrip()}\n\n{block}\n")


def listing() -> str:
    """Returns all suites' rows and targets."""
    lines = [(suite.name, row.size, row.name, row.goal) for suite in SUITES.values() for row in suite.rows]
    return markdown(("suite", "size", "row", "target"), lines)

"""The table of clients shows what each holds, and a sentence names those with unknown text."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from fedbert_jax.data.summary import ClientSummary, client_table, describe_left_out, describe_unknown, percent


def summary(name: str, **values: Any) -> ClientSummary:
    usual = dict(documents=2, words=9, train_blocks=3, heldout_blocks=1, tokens=48, share=0.5, js_divergence=0.25)
    return ClientSummary(name=name, **usual | dict(unknown=0.0, dropped_words=0) | values)


def printed(clients: list[ClientSummary]) -> list[list[str]]:
    """Returns the table's rows, each as its cells."""
    out = io.StringIO()
    Console(file=out, width=120).print(client_table(clients))
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.getvalue().splitlines() if line.startswith("│")]


def test_few_clients_are_listed_whole() -> None:
    clients = [
        summary("[/b]small", documents=1200, js_divergence=0.5, share=0.2),
        summary("large", train_blocks=1500, unknown=0.0421, dropped_words=61_234, share=0.8),
    ]
    assert printed(clients) == [
        ["large", "2", "1,500", "1", "80.0%", "0.250", "4.2%", "61,234"],
        ["[/b]small", "1,200", "3", "1", "20.0%", "0.500", "0.0%", "0"],
        ["all", "1,202", "1,503", "2", "100.0%", "0.375", "2.1%", "61,234"],
    ]


def test_the_header_names_the_columns() -> None:
    out = io.StringIO()
    Console(file=out, width=120).print(client_table([summary("a")]))
    text = out.getvalue()
    for word in ("documents", "blocks", "held-out", "share", "JS", "(bits)", "[UNK]", "repeated", "words"):
        assert word in text


def test_many_clients_are_abridged() -> None:
    many = [summary(f"[c{i:02d}]", train_blocks=i + 1) for i in range(50)]
    rows = printed(many)
    assert [row[0] for row in rows[:-1]] == [
        *(f"[c{i:02d}]" for i in range(49, 39, -1)),
        "... 35 more",
        *(f"[c{i:02d}]" for i in range(4, -1, -1)),
    ]
    assert rows[10][1:] == ["..."] * 7
    assert rows[-1][2] == f"{sum(range(1, 51)):,}"


@pytest.mark.parametrize("share,text", [(0.0, "0.0%"), (0.0001, "<0.1%"), (0.0006, "0.1%"), (0.5, "50.0%"), (1.0, "100.0%")])
def test_a_share_is_0_only_if_it_is_none(share: float, text: str) -> None:
    assert percent(share) == text


def test_unknown_text_is_warned_of_above_a_percent() -> None:
    assert describe_unknown([summary("a", unknown=0.01), summary("b")]) == ""
    many = [summary(f"c{n}", unknown=n / 100) for n in range(9)]
    warning = describe_unknown(many)
    assert "7 of the clients" in warning and "c8 8.0%, c7 7.0%, c6 6.0%, c5 5.0%, c4 4.0% and 2 more" in warning
    assert "c1" not in warning and warning.endswith(".")


def test_who_is_left_out_is_said_by_reason() -> None:
    assert describe_left_out({"with x": [], "without y": []}) == ""
    assert describe_left_out({"with x": ["a", "b"], "in": [], "without y": list("cdefghi")}) == (
        "2 with x: a, b; 7 without y: c, d, e, f, g and 2 more"
    )

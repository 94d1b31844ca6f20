"""Printed output: names are data, a file has no edge, and no encoding is an obstacle."""

from __future__ import annotations

import io
import sys

import pytest
from rich.table import Table

from fedbert_jax.console.output import Name, lenient_streams, make_console, plain_table, print_table, shown
from fedbert_jax.data.summary import ClientSummary, client_table


def printed(*lines: str, terminal: bool = False) -> str:
    file = io.StringIO()
    console = make_console(file=file, force_terminal=terminal, width=80 if terminal else None, color_system=None)
    for line in lines:
        console.print(line)
    return file.getvalue()


@pytest.mark.parametrize(
    "name, expected",
    [
        ("[/i]tiny :smile: $_{x}$", "[/i]tiny :smile: $_{x}$"),
        ("日本 שלום 😀", "日本 שלום 😀"),
        ("a\nb\tc", r"a\nb\tc"),
        ("\x1b[2J", r"\x1b[2J"),
        ("caf\udce9", r"caf\xe9"),  # a byte of a file name that is not UTF-8
        ("\ud83d", r"\ud83d"),
        ("evil\u202etxt", r"evil\u202etxt"),
    ],
)
def test_a_name_is_shown_as_it_is_or_escaped(name, expected):
    assert shown(name) == expected
    shown(name).encode()


@pytest.mark.parametrize("terminal", [False, True])
def test_nothing_printed_is_markup_emoji_or_folded(terminal):
    for line in ("[/i]tiny", "[bold]", "[link=x]y[/link]", ":smile: 12 'a' http://x", "a/path " * 60 + "end"):
        assert printed(line, terminal=terminal) == line + "\n"


def test_a_file_is_as_wide_as_what_is_printed():
    table = Table("a", "b")
    table.add_row("x" * 300, "y" * 300)
    file = io.StringIO()
    make_console(file=file).print(table, soft_wrap=False)
    assert "x" * 300 in file.getvalue() and "y" * 300 in file.getvalue()


def test_a_table_in_a_file_has_every_name_whole():
    long = "x" * 10_000
    clients = [("[/i]tiny", 5), ("transformers", 12_345), (long, 7), ("日本", 1)]
    summary = tuple(
        ClientSummary(
            name=s,
            documents=n,
            words=n,
            train_blocks=n,
            heldout_blocks=0,
            tokens=n,
            share=0.1,
            js_divergence=0.5,
            unknown=0.0,
            dropped_words=0,
        )
        for s, n in clients
    )
    file = io.StringIO()
    print_table(make_console(file=file), client_table(summary))
    lines = file.getvalue().splitlines()
    rows = {line.split("  ")[0]: line for line in lines}
    assert {name for name, _ in clients} <= rows.keys()
    assert "12,345" in rows["transformers"]
    # One endless name moves its own row alone.
    assert len(rows["transformers"]) == len(rows["[/i]tiny"]) < 120 < len(rows[long])


def test_columns_of_a_file_stand_under_one_another():
    table = Table("run", title="[2 runs]")
    table.add_column("loss", justify="right")
    table.add_row("日本\n(3 seeds)", "5.1\n± 0.25")
    table.add_row("[b]", "12.0")
    assert plain_table(table) == [
        "[2 runs]",
        "run          loss",
        "日本          5.1",  # each of these letters takes two columns
        "(3 seeds)  ± 0.25",
        "[b]          12.0",
    ]


def test_a_narrow_terminal_loses_no_column():
    table = Table()
    table.add_column("client", overflow="fold")
    for n in range(6):
        table.add_column(f"column {n}", no_wrap=True)
    table.add_row(Name("transformers"), *["1,234,567"] * 6)
    for width in (50, 200):
        file = io.StringIO()
        print_table(make_console(file=file, force_terminal=True, width=width, color_system=None), table)
        assert file.getvalue().count("1,234,567") == 6 and "transformers" in file.getvalue()


def test_a_terminal_is_not_filled_with_one_name():
    table = Table()
    table.add_column("client", overflow="fold")
    table.add_row(Name("a" * 10_000 + "z"))
    file = io.StringIO()
    print_table(make_console(file=file, force_terminal=True, width=80, color_system=None), table)
    assert len(file.getvalue()) < 2000 and "…" in file.getvalue() and "z" in file.getvalue()


def test_no_encoding_is_an_obstacle(monkeypatch):
    raw = io.BytesIO()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(raw, encoding="ascii", errors="strict", write_through=True))
    lenient_streams()
    make_console().print("caf\xe9 日本 \udce9 ± 1")
    assert raw.getvalue() == b"caf\\xe9 \\u65e5\\u672c \\udce9 \\xb1 1\n"

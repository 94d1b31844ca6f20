"""Stages are lines that stay; a terminal counts below them, and a log file gets a line now and then but no bars."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from fedbert_jax.console import progress
from fedbert_jax.console.progress import Stages


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def shown(terminal: bool, **options: bool) -> str:
    """Returns what is shown of a preparation in stages, with one count per second."""
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, force_terminal=terminal, width=80, **options)
    with Stages(console, clock) as stages:
        stages.stage("reading '[red]x'\n", "documents")
        for done in range(1000, 71_000, 1000):
            clock.now += 1
            stages.count(done)
        stages.stage("packing", "blocks", 2000)
        clock.now += 31
        stages.count(1500)
        stages.stage("loading")
        stages.count(5)
    return out.getvalue()


def test_a_log_file_gets_plain_lines() -> None:
    assert shown(terminal=False).splitlines() == [
        r"reading '[red]x'\n",
        "  30,000 documents",
        "  60,000 documents",
        "packing",
        "  1,500 of 2,000 blocks",
        "loading",
    ]


def test_a_terminal_counts_in_place() -> None:
    text = shown(terminal=True)
    assert "1,500 of 2,000 blocks" in text and "70,000 documents" in text
    assert r"reading '[red]x'\n" in text and "\x1b[2K" in text  # the count's line is cleared away


def test_a_console_that_says_nothing_says_nothing() -> None:
    assert shown(terminal=True, quiet=True) == shown(terminal=False, quiet=True) == ""


def test_a_live_count_ends_with_an_error() -> None:
    console = Console(file=io.StringIO(), force_terminal=True)
    stages = Stages(console)

    def fail() -> None:
        with stages:
            stages.stage("reading", "documents")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    with console.status("another live display"):  # rich refuses a second live display beside a first
        pass


@pytest.mark.parametrize("make", [progress.bar, lambda console: progress.waiting(console, "compiling")])
def test_a_log_file_gets_no_bars(make, capsys):
    with make(Console(force_terminal=False)):
        pass
    assert capsys.readouterr().out == ""

"""Output on a terminal and in a file: names and libraries' messages are printed as data, and nothing is cut off."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

# A file has no edge to fold at, but rich needs a number; nothing is padded to it.
FILE_WIDTH = 1_000_000
ALIGNED = 60  # columns of a table in a file are padded to at most this, so that one endless name stretches its own row only
ON_TERMINAL, FOLDED = 120, 12  # on a terminal: letters of a name, and how narrow a column may be folded
# Characters that move the cursor, end a line, or reverse the text after them.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060\u2066-\u2069\ufeff\ud800-\udfff]")


def shown(name: str | os.PathLike[str]) -> str:
    r"""Returns a name or a path made fit to print: what would move the cursor or cannot be encoded is escaped.

    Control characters become escapes (\n, \x1b), and so do marks that only change the direction of text; bytes of a file
    name that are not UTF-8 become escapes such as \xe9.
    """

    def escape(found: re.Match[str]) -> str:
        code = ord(found[0])
        if 0xDC80 <= code <= 0xDCFF:  # a byte that Python passes on from the system
            return f"\\x{code - 0xDC00:02x}"
        return found[0].encode("unicode_escape", "backslashreplace").decode("ascii")

    return _UNPRINTABLE.sub(escape, os.fspath(name))


def lenient_streams() -> None:
    """Makes stdout and stderr escape what their encoding lacks (LANG=C, PYTHONIOENCODING=ascii) rather than fail."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a test's stand-in may have none
            stream.reconfigure(errors="backslashreplace")


def make_console(**options: Any) -> Console:
    """Returns the console that commands print through.

    Printed text is never read as markup, emoji codes or something to highlight. The terminal itself folds lines, so that a
    path can be copied; in a file they are whole. Tables go through `print_table`.

    Args:
      options: for rich's Console, such as quiet.
    """
    from rich.console import Console

    console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True, **options)
    if not console.is_terminal and not console.is_jupyter:
        console.width = FILE_WIDTH
    return console


def is_live(console: Console) -> bool:
    """Whether what was shown can be shown anew: on a terminal, and in a notebook that has widgets."""
    widgets = console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None
    return (console.is_terminal or widgets) and not console.quiet


class Name:
    """A name in a table: whole in a file; on a terminal, without its middle if it would fill the screen."""

    def __init__(self, name: str) -> None:
        self.plain = shown(name)

    def __rich__(self) -> Text:
        from rich.text import Text

        half = ON_TERMINAL // 2
        return Text(self.plain if len(self.plain) <= ON_TERMINAL else f"{self.plain[:half]}…{self.plain[1 - half :]}")


def print_table(console: Console, table: Table) -> None:
    """Prints a table, folded to the width of a terminal or, in a file, as plain columns with each cell whole.

    A terminal too narrow for the columns that do not fold also gets the plain columns, since rich would drop some.
    """
    from rich.cells import cell_len

    stiff = [column for column in table.columns if column.no_wrap]
    widths = [max(cell_len(_plain(cell)) for cell in (column.header, *column.cells)) for column in stiff]
    needed = sum(widths) + 3 * len(table.columns) + 1 + FOLDED * (len(table.columns) - len(stiff))
    if console.is_terminal and needed <= console.width:
        console.print(table, soft_wrap=False)
    else:
        console.print("\n".join(plain_table(table)))


def plain_table(table: Table) -> list[str]:
    """Returns the lines of a table: its title, its header and its rows, in columns that are two spaces apart.

    A cell that is wider than `ALIGNED` stays whole, and moves the rest of its row to the right.
    """
    from rich.cells import cell_len

    # A cell may have several lines; the n-th lines of a row's cells stand side by side.
    cells = [[_plain(cell).split("\n") for cell in (column.header, *column.cells)] for column in table.columns]
    lengths = [[cell_len(line) for cell in column for line in cell] for column in cells]
    widths = [max((n for n in column if n <= ALIGNED), default=0) for column in lengths]

    def padded(text: str, i: int) -> str:
        gap = " " * (widths[i] - cell_len(text))
        return gap + text if table.columns[i].justify == "right" else text + gap

    def line_of(cells: Iterable[str]) -> str:
        return "  ".join(padded(text, i) for i, text in enumerate(cells)).rstrip()

    lines = [_plain(table.title)] if table.title else []
    for row in zip(*cells, strict=True):
        height = max(map(len, row))
        lines += [line_of(cell[n] if n < len(cell) else "" for cell in row) for n in range(height)]
    return lines


def _plain(renderable: Any) -> str:
    return getattr(renderable, "plain", None) or str(renderable)

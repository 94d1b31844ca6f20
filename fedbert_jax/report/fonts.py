"""Names in plots: letters that no font here has are escaped, and nothing is taken for markup."""

from __future__ import annotations

import functools
import itertools
import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING

from fedbert_jax.console.output import shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIRST = "DejaVu Sans"  # it comes with matplotlib
JOINERS = frozenset("\u200b\u200c\u200d\ufe0e\ufe0f")  # they draw nothing of their own


def plot_name(name: str, longest: int = 24, line: int = 1000) -> str:
    """Returns a name fit for a plot, without what matplotlib takes for markup or has no font for.

    Args:
      name: any text.
      longest: how many characters of it are shown; an escape counts as several.
      line: the length at which lines are folded.
    """
    name = " ".join(shown(" ".join(name.split())).split())
    without = frozenset(name) - JOINERS - covered(name)
    kept = (c for c in name if c not in JOINERS or not without)  # nothing is left to join if letters became escapes
    letters = [c if c not in without else c.encode("unicode_escape").decode() for c in kept]
    if sum(map(len, letters)) > longest:  # cut in the middle, since names of one kind often differ at their end
        end = _as_many(letters[::-1], (longest - 1) // 3)[::-1]
        letters = [*_as_many(letters, longest - 1 - sum(map(len, end))), "…", *end]
    name = "\n".join(textwrap.wrap("".join(letters), line))
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


def _as_many(letters: list[str], room: int) -> list[str]:
    """Returns the first letters that fit; an escape is never divided."""
    ends = itertools.accumulate(map(len, letters))
    return [letter for letter, end in zip(letters, ends, strict=True) if end <= room]


def covered(text: str) -> frozenset[str]:
    """Returns the characters of `text` that some font here can draw."""
    asked = frozenset(text)
    found = asked & _letters(_path_of_first())
    for path in _others() if asked - found else ():
        found |= asked & _letters(path)
    return found


def use_fonts(figure: Figure) -> None:
    """Gives every text of a figure the fonts that its letters need."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        families = _families(text.get_text())  # type: ignore[attr-defined]
        if families:
            text.set_fontfamily([FIRST, *families])  # type: ignore[attr-defined]


def _families(text: str) -> list[str]:
    """Returns the families of the other fonts that a text needs."""
    from matplotlib.font_manager import get_font

    lacking, families = frozenset(text) - _letters(_path_of_first()) - JOINERS, []
    for path in _others() if lacking else ():
        if lacking & _letters(path):
            families.append(get_font(path).family_name)
            lacking -= _letters(path)
    return families


@functools.cache
def _path_of_first() -> str:
    from matplotlib.font_manager import findfont

    return findfont(FIRST)


@functools.cache
def _others() -> tuple[str, ...]:
    """Returns the files of the other fonts that can be drawn at any size, upright ones of usual weight."""
    from matplotlib.font_manager import fontManager

    usual: Iterable[str] = (
        f.fname
        for f in fontManager.ttflist
        if f.style == "normal"
        and f.weight in (400, "normal", "regular", "book")
        and "Last Resort" not in f.name
        and not f.name.startswith(("DejaVu", "STIX", "cm"))
    )
    return tuple(sorted(set(usual)))


@functools.cache
def _letters(path: str) -> frozenset[str]:
    """Returns the characters that a font has glyphs for; none if it cannot be scaled or read."""
    from matplotlib.font_manager import get_font

    try:
        font = get_font(path)
        return frozenset(map(chr, font.get_charmap())) if font.scalable else frozenset()
    except (OSError, RuntimeError, ValueError):
        return frozenset()

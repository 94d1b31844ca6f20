"""Names in plots: unchanged if a font has their letters, escaped if none has, never a formula."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font

from fedbert_jax.report import fonts
from fedbert_jax.report.fonts import plot_name, use_fonts
from fedbert_jax.report.plots import to_png

HOSTILE = ["$_{x}$", "$" * 999, r"\$\$", "_hidden", "\x1b[0m", "caf\udce9", "שלום", "日本語" * 50, "👩\u200d🤗", " "]


@pytest.fixture
def no_other_fonts(monkeypatch):
    monkeypatch.setattr(fonts, "_others", lambda: ())


@pytest.mark.parametrize(
    "name, expected",
    [
        ("numpy", "numpy"),
        ("$_{x}$", r"\$_{x}\$"),
        ("_hidden", " _hidden"),  # matplotlib leaves out labels that begin with an underscore
        ("a\n b", "a b"),
        ("\x1b[0m", r"\x1b[0m"),
        ("caf\udce9", r"caf\xe9"),
        ("שלום", "שלום"),
        ("日本", r"\u65e5\u672c"),
        ("a_very_long_client_name_of_2024", "a_very_long_clie…of_2024"),
        ("日本語日本語", r"\u65e5\u672c…\u8a9e"),  # escapes are whole
    ],
)
def test_a_name_in_a_plot(no_other_fonts, name, expected):
    assert plot_name(name) == expected


def test_lines_are_folded_before_dollars_are_escaped(no_other_fonts):
    lines = plot_name("$" * 300, longest=300, line=99).split("\n")
    assert lines == [r"\$" * 99] * 3 + [r"\$" * 3]


def test_every_name_can_be_drawn(no_other_fonts):
    figure = Figure()
    axes = figure.add_subplot()
    for name in HOSTILE:
        axes.plot([0, 1], label=plot_name(name, 300, 50))
    axes.set_yticks(range(len(HOSTILE)), [plot_name(name) for name in HOSTILE])
    axes.legend()
    assert to_png(figure)[:4] == b"\x89PNG"


def test_another_font_that_has_the_letters_is_used(monkeypatch):
    first = frozenset(map(chr, get_font(findfont("DejaVu Sans")).get_charmap()))
    other = findfont("STIXGeneral")
    letter = next(chr(c) for c in get_font(other).get_charmap() if 0x2000 < c < 0xE000 and chr(c) not in first)
    monkeypatch.setattr(fonts, "_others", lambda: (other,))
    assert plot_name(f"a{letter}") == f"a{letter}"
    figure = Figure()
    written, plain = figure.text(0, 0, f"a{letter}"), figure.text(0, 0, "a")
    before = plain.get_fontfamily()
    use_fonts(figure)
    assert written.get_fontfamily() == ["DejaVu Sans", "STIXGeneral"] and plain.get_fontfamily() == before
    monkeypatch.setattr(fonts, "_others", lambda: ())
    assert plot_name(f"a{letter}") == f"a\\u{ord(letter):04x}"

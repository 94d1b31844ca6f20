"""Words are counted in every script, and a text is cut only where that makes no difference."""

from __future__ import annotations

import time

import pytest
from tokenizers import normalizers, pre_tokenizers

from fedbert_jax.data import words as words_lib
from fedbert_jax.data.words import BREAKS, count_words, cut


@pytest.mark.parametrize(
    "text,words",
    [
        ("", 0),
        (" one two\n\n three\tfour-five ", 4),
        ("Ça va très bien", 4),
        ("你好世界", 4),
        ("你好，世界。（再见）", 6),
        ("手机 iPhone13 手机", 5),
        ("かな と カタカナ", 7),
        ("漢字かな、交じり文", 8),
        ("한국어 텍스트", 2),
        ("สวัสดีครับผม", 3),  # 12 characters, with five to a word
        ("ສະບາຍດີ", 2),
        ("😀😀👍🏽 ok", 4),
        ("العربية لغة", 2),
        ("हिन्दी भाषा", 2),
    ],
)
def test_words_by_hand(text: str, words: int) -> None:
    assert count_words(text) == words


def test_a_long_text_is_counted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words_lib, "_PIECE", 10)
    for unit, words in (("word ", 1), ("two words\n", 2), ("字", 1), ("漢字、 abc def。", 4)):
        assert count_words(unit * 300) == words * 300


def test_thirty_megabytes_are_counted_quickly() -> None:
    start = time.process_time()
    assert count_words("four words are here " * 1_500_000) == 6_000_000
    assert time.process_time() - start < 8  # half a second


# --- cutting ---


def test_pieces_are_the_text() -> None:
    text = "abc de, 漢字漢字 f。ghi\n" * 50
    pieces = list(cut(text, 20))
    assert "".join(pieces) == text and len(pieces) > 20
    assert all(len(piece) > 20 and BREAKS.match(piece[-1]) for piece in pieces[:-1])
    assert list(cut("short", 20)) == ["short"] and list(cut("", 20)) == [""]


def test_what_has_no_place_to_cut_stays_whole_or_is_cut_anywhere() -> None:
    assert list(cut("x" * 100, 20)) == ["x" * 100]
    pieces = list(cut("x" * 100, 20, anywhere=True))
    assert "".join(pieces) == "x" * 100 and max(map(len, pieces)) == 40


def test_berts_tokenizer_divides_words_at_every_break() -> None:
    normalize = normalizers.BertNormalizer().normalize_str
    split = pre_tokenizers.BertPreTokenizer().pre_tokenize_str
    breaks = [c for c in map(chr, range(0x10000)) if BREAKS.match(c)]
    assert len(breaks) > 27_000
    words = [word for word, _ in split(normalize("".join(f"ab{c}" for c in breaks)))]
    assert words.count("ab") == len(breaks)  # none was joined to its neighbours

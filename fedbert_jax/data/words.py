"""Counts words, even of text without spaces, and cuts long texts where that makes no difference."""

from __future__ import annotations

import re
from collections.abc import Iterator

# Characters as written in a class [...] of a regular expression, both Python's and the tokenizer's.
# Han: BERT's tokenizer puts each between spaces, so each is a word.
IDEOGRAPHS = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
# Thai, Lao, Myanmar, Khmer and other scripts of South-East Asia, and Yi: written without spaces between words.
UNSPACED = (
    "\u0e01-\u0e3a\u0e40-\u0e4e\u0e80-\u0edf\u1000-\u1049\u1050-\u109f\u1780-\u17d3\u17dc-\u17dd\u1950-\u19df"
    "\u1a20-\u1a7f\u1b00-\u1b59\ua000-\ua4cf\ua980-\ua9c0\ua9e0-\ua9ef\ua9fa-\ua9fe\uaa60-\uaa7f"
)
KANA = "\u3041-\u309f\u30a1-\u30fa\u30fc-\u30ff\u3100-\u312f\u31a0-\u31bf\u31f0-\u31ff\uff66-\uff9f\U0001b000-\U0001b16f"
PICTURES = "\u2600-\u27bf\U0001f000-\U0001faff"  # emoji and the like
CJK_MARKS = "\u3000-\u3004\u3007-\u3020\u30fb\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"  # spaces and punctuation

_LETTERS_A_WORD = 5  # of UNSPACED scripts, including vowel signs: about as many as in Thai
_MARKS = re.compile(f"[{CJK_MARKS}]+")
_UNIT = re.compile(f"[{IDEOGRAPHS}{KANA}]|[{UNSPACED}]{{1,{_LETTERS_A_WORD}}}|[{PICTURES}][\ufe0f\U0001f3fb-\U0001f3ff]?")
_PIECE = 1_000_000  # characters that are looked at together, so that a document of any size takes little memory
# A cut after any of these makes no difference to a tokenizer of BERT's kind, to which each is a word of its own, or nothing.
BREAKS = re.compile("[ \t\r\n\u3000!-/:-@\\[-`{-~、。，！？；：（）「」『』《》…\u3400-\u4dbf\u4e00-\u9fff]")


def count_words(text: str) -> int:
    """Counts the words of a text, to weigh documents and clients by.

    Whatever stands between spaces is a word; so are each Chinese ideograph, kana and emoji, and every five letters in
    scripts without spaces (Thai, Lao, Khmer, Myanmar, ...).
    """
    return sum(_count(piece) for piece in cut(text, _PIECE, anywhere=True))


def _count(text: str) -> int:
    if not text.isascii():
        text = _UNIT.sub(" x ", _MARKS.sub(" ", text))
    return len(text.split())


def cut(text: str, size: int, where: re.Pattern[str] = BREAKS, anywhere: bool = False) -> Iterator[str]:
    """Yields the text in pieces of about `size` characters; most texts are a single piece.

    Args:
      text: any text.
      size: after this many characters, a piece ends with the next match of `where`.
      where: places after which a cut makes no difference.
      anywhere: if there is no such place, cut at twice the size.
    """
    start = 0
    while len(text) - start > size:
        end = min(start + 2 * size, len(text)) if anywhere else len(text)
        found = where.search(text, start + size, end)
        stop = found.end() if found else end
        yield text[start:stop]
        start = stop
    if start < len(text) or not text:
        yield text[start:] if start else text

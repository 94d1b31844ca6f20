"""Encodes text to token ids as a tokenizer does, and each word once where that makes no difference."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from fedbert_jax.data.tokenizer import token_dtype, vocab_size
from fedbert_jax.data.vocabulary import LONGEST_WORD, NO_SPACES
from fedbert_jax.data.words import BREAKS, cut

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerFast

_ENDLESS = re.compile(f"(?<![0-9A-Za-z])[0-9A-Za-z]{{{10 * LONGEST_WORD},}}")  # a word that stays [UNK] when shortened
_PIECE = 100_000  # characters that are encoded as one text; the library takes 100 bytes for each
# Where to cut text for tokenizers of unknown kind. In most, a space belongs to the word after it, so it begins a piece.
_BEFORE_SPACE = re.compile(r"(?<=[a-z])(?= [a-z])")
_SAMPLE = 20_000  # characters on which it is tested whether such cuts make no difference
_NO_SPACE = re.compile(f"[{NO_SPACES}]")
_REMEMBERED = 1 << 18  # parts whose ids are kept, some 30 MB
_LONG_PART = 64  # characters; longer ones hardly come again


def encode(
    tokenizer: PreTrainedTokenizerFast,
    texts: Iterable[str],
    batch: int = 1_000_000,
    count: Callable[[int], None] = lambda _: None,
) -> Iterator[np.ndarray]:
    """Yields the token ids of each text: [n] uint16 or int32 (`token_dtype`), without special tokens added.

    Text that spells a special token ("[MASK]" in documentation) is read as text, never as that token. To a tokenizer of
    BERT's kind, whatever stands between spaces is a text of its own, so each such part is encoded once and then looked up,
    which takes half the time (of film reviews, on two cores). Long text is encoded in pieces if that makes no difference, so
    that it takes little memory.

    Args:
      tokenizer: any fast tokenizer.
      texts: texts of any length; nothing is truncated.
      batch: about how many characters are encoded at a time, on all cores.
      count: called with the number of characters encoded so far.
    """
    dtype = token_dtype(vocab_size(tokenizer))
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())  # a copy, whose settings may be changed
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    divide = _Divider(backend)
    known: dict[str, bytes] = {}  # the ids of parts met before
    begun: list[bytes] = []  # the ids of the text whose last piece is still to come

    def flush(pending: list[tuple[list[str], bool]]) -> Iterator[np.ndarray]:
        new = list(set().union(*(parts for parts, _ in pending)) - known.keys())
        for part, encoding in zip(new, backend.encode_batch_fast(new, add_special_tokens=False), strict=True):
            known[part] = np.array(encoding.ids, dtype).tobytes()
        ids = known.__getitem__
        for parts, last in pending:
            begun.extend(map(ids, parts))
            if last:
                yield np.frombuffer(b"".join(begun), dtype)
                begun.clear()
        for part in new:
            if len(part) > _LONG_PART:
                del known[part]
        if len(known) > _REMEMBERED:
            known.clear()

    pending: list[tuple[list[str], bool]] = []  # the parts of pieces, and whether each ends its text
    characters = read = 0
    for text in texts:
        start = read
        pieces = [text] if len(text) <= _PIECE else divide(text)
        for n, piece in enumerate(pieces, 1):
            pending.append((divide.parts(piece), n == len(pieces)))
            characters += len(piece)
            read += len(piece)
            if characters >= batch:
                yield from flush(pending)
                count(read)
                pending, characters = [], 0
        read = start + len(text)  # the pieces may be shorter in all
    yield from flush(pending)
    count(read)


class _Divider:
    """Divides a text into pieces, and these into parts, whose ids, one after another, are those of the whole."""

    def __init__(self, backend: Tokenizer):
        self._backend = backend
        self._like_bert = _is_like_bert(json.loads(backend.to_str()))
        self._same: bool | None = None  # whether cuts leave the ids of a tokenizer of another kind unchanged

    def __call__(self, text: str) -> list[str]:
        if self._like_bert:
            return list(cut(_ENDLESS.sub(lambda match: match[0][: 10 * LONGEST_WORD], text), _PIECE, BREAKS))
        if self._same is None:
            pieces = list(cut(text[:_SAMPLE], _SAMPLE // 10, _BEFORE_SPACE))
            if len(pieces) > 1:
                self._same = self._ids([text[:_SAMPLE]]) == self._ids(pieces)
        return list(cut(text, _PIECE, _BEFORE_SPACE)) if self._same else [text]

    def parts(self, piece: str) -> list[str]:
        """Returns what stands between spaces, if that is what the tokenizer looks at, too; else all of the piece."""
        return piece.split() if self._like_bert and not _NO_SPACE.search(piece) else [piece]

    def _ids(self, texts: list[str]) -> list[int]:
        return [i for e in self._backend.encode_batch_fast(texts, add_special_tokens=False) for i in e.ids]


def _is_like_bert(spec: dict[str, Any]) -> bool:
    """Tells whether the tokenizer first cuts text into BERT's words, each of which then becomes tokens by itself."""

    def steps(part: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
        return [{}] if part is None else part[key] if part["type"] == "Sequence" else [part]

    normalizer = steps(spec["normalizer"], "normalizers")[0]
    return (
        spec["model"]["type"] == "WordPiece"
        and spec["model"]["max_input_chars_per_word"] <= LONGEST_WORD
        and normalizer.get("type") == "BertNormalizer"
        and normalizer["handle_chinese_chars"]
        and steps(spec["pre_tokenizer"], "pretokenizers")[-1].get("type") == "BertPreTokenizer"
        and all(token["special"] for token in spec["added_tokens"])
    )

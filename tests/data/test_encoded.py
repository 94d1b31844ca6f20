"""The file holds the documents that were given, less what is left out, and their counts are right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fedbert_jax.data.encoded import Encoded, encode_documents

WORDS = [f"w{n}" for n in range(100)]
SPECIAL = ["[CLS]", "[SEP]", "[MASK]", "[UNK]"]


def word_level(unknown: bool = True) -> Any:
    """Returns a tokenizer with ids 0 to 3 for special tokens and 4 + n for the word `wn`."""
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate([*SPECIAL, *WORDS])}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {f"{token.strip('[]').lower()}_token": token for token in (SPECIAL if unknown else SPECIAL[:3])}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def encoded(path: Path, texts: list[str], deduplicate: bool, unknown: bool = True) -> Encoded:
    told: list[int] = []
    result = encode_documents(word_level(unknown), iter(texts), path, deduplicate, told.append)
    assert told[-1] == sum(map(len, texts))
    return result


def test_documents_are_what_was_given(tmp_path: Path) -> None:
    found = encoded(tmp_path, ["w1 w2 huh", "", "eh w3 what ever w3"], deduplicate=False)
    assert found.ids[:].tolist() == [5, 6, 3, 3, 7, 3, 3, 7]
    assert found.lengths.tolist() == found.kept.tolist() == [3, 0, 5]
    assert found.usual.tolist() == [2, 0, 2] and found.unknown.tolist() == [1, 0, 3]
    assert [piece.tolist() for piece in found.pieces([2, 1, 0])] == [[3, 7, 3, 3, 7], [], [5, 6, 3]]
    assert found.ids[:].dtype == np.uint16


@pytest.mark.parametrize("texts", [[], [""], ["", ""]])
@pytest.mark.parametrize("deduplicate", [False, True])
def test_nothing_is_nothing(texts: list[str], deduplicate: bool, tmp_path: Path) -> None:
    found = encoded(tmp_path, [*texts, "w1"], deduplicate)
    assert found.kept.tolist() == [0] * len(texts) + [1]
    empty = encode_documents(word_level(), ["", ""], tmp_path, deduplicate, lambda _: None)
    assert empty.kept.tolist() == [0, 0] and not empty.usual.any() and [len(p) for p in empty.pieces([0, 1])] in ([], [0, 0])


def test_what_came_before_is_left_out_of_its_document(tmp_path: Path) -> None:
    first, second = " ".join(WORDS[:40]), " ".join(WORDS[40:80])
    found = encoded(tmp_path, [first, f"{second} {first} {'huh ' * 20} {second}", "w5 w6"], deduplicate=True)
    assert found.lengths.tolist() == [40, 140, 2]
    assert found.kept.tolist() == [40, 40, 2]  # the text between two repeats is too short
    assert [piece.tolist() for piece in found.pieces([0, 1, 2])] == [list(range(4, 44)), list(range(44, 84)), [9, 10]]
    assert found.unknown.tolist() == [0, 20, 0]  # of whole documents


def test_a_tokenizer_that_knows_everything_has_no_unknown_token(tmp_path: Path) -> None:
    assert encoded(tmp_path, ["w1 w2"], False, unknown=False).unknown.tolist() == [0]

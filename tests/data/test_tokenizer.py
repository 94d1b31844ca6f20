"""The tokenizer is the same in every process, and ids are what `transformers` would give."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerFast

from fedbert_jax.data import tokenizer as tokenizer_lib
from fedbert_jax.data.tokenizer import (
    continuation_mask,
    encode,
    load_tokenizer,
    special_ids,
    token_dtype,
    train_tokenizer,
    vocab_size,
)
from fedbert_jax.errors import UserError

LETTERS = "abcdefghijklmnopqrstuvwxyzéøß漢字0123456789-'ΣσЖ"


def make_texts(count: int = 300, seed: int = 0) -> list[str]:
    """Random words, so that many pairs of characters are equally frequent: ties are where runs could differ."""
    rng = random.Random(seed)
    words = ["".join(rng.choice(LETTERS) for _ in range(rng.randint(1, 9))) for _ in range(800)]
    return [" ".join(rng.choice(words) for _ in range(40)).capitalize() for _ in range(count)]


def fingerprint(size: int) -> str:
    vocabulary = train_tokenizer(make_texts(), size, lowercase=True).get_vocab()
    return hashlib.sha256(json.dumps(sorted(vocabulary.items())).encode()).hexdigest()


@pytest.fixture(scope="module")
def trained() -> Any:
    return train_tokenizer(make_texts(), 400, lowercase=True)


def test_another_process_trains_the_same_vocabulary() -> None:
    code = "import test_tokenizer as t; print(t.fingerprint(400), hash('a'))"
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(tokenizer_lib.__file__).parents[2])])
    env = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": path}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    vocabulary, hashed = run.stdout.split()
    assert hashed != str(hash("a"))  # it did hash otherwise
    assert {vocabulary} == {fingerprint(400) for _ in range(3)}


def test_a_trained_vocabulary_is_berts(trained: Any) -> None:
    assert len(trained) == vocab_size(trained) == 400
    assert trained.convert_ids_to_tokens(list(range(5))) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert special_ids(trained) == (0, 1, 2, 3, 4)
    assert sorted(trained.get_vocab().values()) == list(range(400))
    assert trained.tokenize("ÉÉ") == trained.tokenize("ee")  # folded, and without accents
    cased = train_tokenizer(make_texts(), 400, lowercase=False)
    assert cased.tokenize("É") != cased.tokenize("é")


def test_a_trained_tokenizer_survives_saving(trained: Any, tmp_path: Path) -> None:
    trained.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == trained.get_vocab() and loaded.model_max_length == 512
    pair = loaded("some words", "other words")
    tokens = loaded.convert_ids_to_tokens(pair["input_ids"])
    assert tokens[0] == "[CLS]" and tokens[-1] == "[SEP]" and tokens.count("[SEP]") == 2
    assert pair["token_type_ids"] == [0] * (tokens.index("[SEP]") + 1) + [1] * (len(tokens) - tokens.index("[SEP]") - 1)
    assert loaded("a [MASK]")["input_ids"][-2] == 4
    text = make_texts()[7]
    assert loaded(text)["input_ids"] == trained(text)["input_ids"]
    assert [i.tolist() for i in encode(load_tokenizer(str(tmp_path)), [text])] == [
        i.tolist() for i in encode(trained, [text])
    ]


def test_rare_characters_give_way_in_a_small_vocabulary() -> None:
    rare = "".join(chr(0x3041 + i) for i in range(80))
    small = train_tokenizer(["abcdefg " * 50, " ".join(rare), "gfedcba " + rare], 64, lowercase=True)
    assert len(small) <= 64
    assert small.unk_token_id not in small("abcdefg gfedcba", add_special_tokens=False)["input_ids"]


def test_no_text_is_refused() -> None:
    with pytest.raises(UserError, match="no text"):
        train_tokenizer(["  ", ""], 400, lowercase=True)


def test_continuation_mask(trained: Any) -> None:
    mask = continuation_mask(trained)
    assert mask.shape == (400,) and mask.dtype == bool
    for token, index in trained.get_vocab().items():
        assert mask[index] == token.startswith("##")
    assert 0 < mask.sum() < 400


def test_encode_is_what_transformers_gives(trained: Any) -> None:
    texts = ["", *make_texts(20, seed=3), "x" * 300, " a\tb\n c ", "long " * 2000]
    trained(texts[1], truncation=True, max_length=4, padding="max_length")  # settings that must not stay
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = list(encode(trained, iter(texts), batch=100))
    assert len(found) == len(texts) and all(ids.dtype == np.uint16 and ids.ndim == 1 for ids in found)
    for ids, text in zip(found, texts, strict=True):
        assert ids.tolist() == trained(text, add_special_tokens=False)["input_ids"]
    whole = list(encode(trained, texts))
    assert all(np.array_equal(a, b) for a, b in zip(found, whole, strict=True))


def test_encode_says_nothing_of_long_texts(trained: Any, capfd: pytest.CaptureFixture[str]) -> None:
    assert len(next(encode(trained, ["long words " * 1000]))) > 512
    assert "longer than" not in "".join(capfd.readouterr())


def test_a_special_token_spelt_in_text_is_text(trained: Any) -> None:
    (ids,) = encode(trained, ["a [MASK] b [SEP] [CLS] [PAD]"])
    assert not set(ids.tolist()) & {0, 2, 3, 4}


@pytest.mark.parametrize("size,dtype", [(5, np.uint16), (2**16, np.uint16), (2**16 + 1, np.int32)])
def test_ids_fit_their_type(size: int, dtype: type) -> None:
    assert token_dtype(size) == dtype
    assert np.iinfo(token_dtype(size)).max >= size - 1


def word_level(*specials: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({s: i for i, s in enumerate((*specials, "[UNK]", "a"))}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {f"{s.strip('[]').lower()}_token": s for s in specials}
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", **names)


def test_a_tokenizer_without_continuations_cannot_mask_whole_words() -> None:
    with pytest.raises(UserError, match=r"mlm\.whole_word"):
        continuation_mask(word_level("[CLS]", "[SEP]", "[MASK]"))


def test_a_tokenizer_without_mask_is_refused(tmp_path: Path) -> None:
    word_level("[CLS]", "[SEP]").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"has no \[MASK\]"):
        load_tokenizer(str(tmp_path))


def test_directories_without_a_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.tokenizer="):
        load_tokenizer(str(tmp_path))
    with pytest.raises(UserError, match=r"data\.tokenizer="):
        load_tokenizer(str(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="has no vocabulary"):
        load_tokenizer(str(tmp_path))


def test_a_directory_with_only_berts_old_files_loads(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    loaded = load_tokenizer(str(tmp_path))
    assert isinstance(loaded, BertTokenizer)
    assert next(encode(loaded, ["Hellos"])).tolist() == [5, 6]

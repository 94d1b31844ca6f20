"""Ids are those that `transformers` would give, however long the text is."""

from __future__ import annotations

import random
import unicodedata
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import BertTokenizer, PreTrainedTokenizerFast

from fedbert_jax.data import encoding as encoding_lib
from fedbert_jax.data.encoding import encode
from fedbert_jax.data.tokenizer import (
    continuation_mask,
    load_tokenizer,
    token_dtype,
)
from fedbert_jax.data.vocabulary import train_tokenizer
from fedbert_jax.errors import UserError

LETTERS = "abcdefghijklmnopqrstuvwxyzéøß漢字0123456789-'ΣσЖ"


def make_texts(count: int = 300, seed: int = 0) -> list[str]:
    """Makes random words, so that many pairs of characters are equally frequent, since runs could differ at ties."""
    rng = random.Random(seed)
    words = ["".join(rng.choice(LETTERS) for _ in range(rng.randint(1, 9))) for _ in range(800)]
    return [" ".join(rng.choice(words) for _ in range(40)).capitalize() for _ in range(count)]


@pytest.fixture(scope="module")
def trained() -> Any:
    return train_tokenizer(make_texts(), 400, lowercase=True)


def test_continuation_mask(trained: Any) -> None:
    mask = continuation_mask(trained)
    assert mask.shape == (400,) and mask.dtype == bool
    for token, index in trained.get_vocab().items():
        assert mask[index] == token.startswith("##")
    assert 0 < mask.sum() < 400


def test_encode_is_what_transformers_gives(trained: Any) -> None:
    texts = ["", *make_texts(20, seed=3), "x" * 300, " a\tb\n c ", "long " * 2000]
    trained(texts[1], truncation=True, max_length=4, padding="max_length")  # settings that must not persist
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = list(encode(trained, iter(texts), batch=100))
    assert len(found) == len(texts) and all(ids.dtype == np.uint16 and ids.ndim == 1 for ids in found)
    for ids, text in zip(found, texts, strict=True):
        assert ids.tolist() == trained(text, add_special_tokens=False)["input_ids"]
    whole = list(encode(trained, texts))
    assert all(np.array_equal(a, b) for a, b in zip(found, whole, strict=True))


# --- long texts ---

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def bert(**settings: Any) -> PreTrainedTokenizerFast:
    words = [*SPECIAL, *"abcdefgh.,漢字語", *(f"##{c}" for c in "abcdefgh"), "abc", "##def"]
    return BertTokenizer(vocab={word: n for n, word in enumerate(words)}, **settings)


def trained_as(model: models.Model, trainer: trainers.Trainer, before: Any) -> PreTrainedTokenizerFast:
    backend = Tokenizer(model)
    backend.pre_tokenizer = before
    backend.train_from_iterator(make_texts(100), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


TRAINING = dict(vocab_size=600, special_tokens=SPECIAL, show_progress=False)
BYTES = dict(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **TRAINING)
KINDS = {
    "trained": lambda: train_tokenizer(make_texts(), 400, lowercase=True),
    "trained, cased": lambda: train_tokenizer(make_texts(), 400, lowercase=False),
    "bert": bert,
    "bert without ideographs": lambda: bert(tokenize_chinese_chars=False),
    "byte-level": lambda: trained_as(
        models.BPE(),
        trainers.BpeTrainer(**BYTES),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ),
    "byte-level with a space": lambda: trained_as(
        models.BPE(),
        trainers.BpeTrainer(**BYTES),
        pre_tokenizers.ByteLevel(add_prefix_space=True),
    ),
    "unigram": lambda: trained_as(
        models.Unigram(),
        trainers.UnigramTrainer(unk_token="[UNK]", **TRAINING),
        pre_tokenizers.Metaspace(),
    ),
    "one that can't be cut": lambda: trained_as(  # all text is one word
        models.BPE(unk_token="[UNK]"),
        trainers.BpeTrainer(**TRAINING),
        pre_tokenizers.Split("\x00", "removed"),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_text_has_the_ids_of_the_whole(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding_lib, "_PIECE", 60)
    rng = random.Random(1)
    units = [
        "abc def ",
        "abcdef",
        "é",
        "e\u0301 ",
        "漢字語漢",
        "。",
        ", ",
        "\n\n",
        "  ",
        "\u3000",
        " and a.",
        "x\x1cy",
        "[MASK]",
        "ß9-",
        "z" * 1200,
        " the lazy dog",
        "กำลังภาษาไทย",
        "😀👍🏽",
    ]
    texts = ["漢字" * 100, *("".join(rng.choices(units, k=rng.randint(1, 400))) for _ in range(30))]
    made = KINDS[kind]()
    backend = Tokenizer.from_str(made.backend_tokenizer.to_str())
    backend.encode_special_tokens = True
    for text, ids in zip(texts, encode(made, texts, batch=500), strict=True):
        assert ids.tolist() == backend.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", ["trained", "byte-level", "unigram"])
def test_a_long_text_is_encoded_in_pieces(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding_lib, "_PIECE", 60)
    made, longest = KINDS[kind](), 0

    class Watched:
        encode_special_tokens = False

        def __init__(self, backend: Tokenizer):
            self.backend = backend

        def __getattr__(self, name: str) -> Any:
            return getattr(self.backend, name)

        def encode_batch_fast(self, texts: list[str], **options: Any) -> Any:
            nonlocal longest
            if len(texts) > 1:  # the whole sample is looked at once
                longest = max(longest, *map(len, texts))
            return self.backend.encode_batch_fast(texts, **options)

    class Watcher:
        @staticmethod
        def from_str(text: str) -> Any:
            return Watched(Tokenizer.from_str(text))

    monkeypatch.setattr(encoding_lib, "Tokenizer", Watcher)
    text = "the quick brown fox and the lazy dog " * 2000
    (ids,) = encode(made, [text.replace(" ", ",") if kind == "trained" else text])  # it takes what has no space as one
    assert len(ids) > 2000
    assert 60 < longest < 5000


def test_a_line_of_megabytes_is_divided() -> None:
    made = KINDS["trained"]()
    divide = encoding_lib._Divider(made.backend_tokenizer)
    ideographs = "".join(random.Random(0).choices([chr(c) for c in range(0x4E00, 0x5000)], k=300_000))
    lines = [ideographs, "a" * 3_000_000, "the quick brown fox " * 20_000, '{"a":1,' * 60_000]
    for line in lines:
        assert max(map(len, divide(line))) < 200_000
    told: list[int] = []
    found = list(encode(made, lines[:3], batch=100_000, count=told.append))
    assert [len(found[0]), found[1].tolist()] == [300_000, [made.unk_token_id]]
    assert told == sorted(told) and len(told) > 3 and told[0] < 200_000 and told[-1] == 3_700_000


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


# --- parts that come again ---


@pytest.mark.parametrize("kind", KINDS)
def test_parts_between_spaces_have_the_ids_that_they_have_in_the_text(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any character may stand at either end of a part, among them spaces of all kinds, marks and control characters."""
    rng = random.Random(2)
    odd = [chr(c) for c in range(0x3100) if chr(c).isspace() or unicodedata.category(chr(c))[0] in "MCZ"]
    units = [*"abcdefghß漢字語กΣσЖéİ", *rng.sample(odd, 150), "한국", "\U0001f600", "[MASK]", "abc", "e\u0301", "'s"]
    spaces = [" ", " ", "\n", "\t", "\r\n", "\u3000", "\u2028", "\xa0", "\x0b", "\x85", "\x1d", "\u200b"]
    make = lambda: "".join(rng.choice(units) + rng.choice(spaces) * rng.randint(0, 2) for _ in range(rng.randint(0, 30)))  # noqa: E731
    texts = [make() for _ in range(400)]
    made = KINDS[kind]()
    backend = Tokenizer.from_str(made.backend_tokenizer.to_str())
    backend.encode_special_tokens = True
    expected = [backend.encode(text, add_special_tokens=False).ids for text in texts]
    assert [ids.tolist() for ids in encode(made, texts, batch=200)] == expected
    monkeypatch.setattr(encoding_lib, "_REMEMBERED", 5)  # forgotten after every batch
    monkeypatch.setattr(encoding_lib, "_LONG_PART", 2)
    assert [ids.tolist() for ids in encode(made, texts, batch=200)] == expected


def test_a_part_is_encoded_once(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Watched:
        def __init__(self, backend: Tokenizer):
            self.__dict__["backend"] = backend

        def __getattr__(self, name: str) -> Any:
            return getattr(self.backend, name)

        def __setattr__(self, name: str, value: Any) -> None:
            setattr(self.backend, name, value)

        def encode_batch_fast(self, texts: list[str], **options: Any) -> Any:
            asked.extend(texts)
            return self.backend.encode_batch_fast(texts, **options)

    watcher = type("Watcher", (), {"from_str": lambda text: Watched(Tokenizer.from_str(text))})
    monkeypatch.setattr(encoding_lib, "Tokenizer", watcher)
    long = "ab" * 40
    assert len(list(encode(trained, [f"one two one {long}", f"two\nthree {long}"] * 3, batch=1))) == 6
    assert sorted(asked) == sorted([long] * 6 + ["one", "three", "two"])

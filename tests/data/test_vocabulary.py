"""The trained tokenizer is the same in every process, covers text of any script, and is not slowed down by odd words."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import time
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from fedbert_jax.data import vocabulary as vocabulary_lib
from fedbert_jax.data.encoding import encode
from fedbert_jax.data.tokenizer import save_tokenizer, special_ids, vocab_size
from fedbert_jax.data.vocabulary import train_tokenizer
from fedbert_jax.errors import UserError

LETTERS = "abcdefghijklmnopqrstuvwxyzéøß漢字0123456789-'ΣσЖ"


def make_texts(count: int = 300, seed: int = 0) -> list[str]:
    """Makes random words, so that many pairs of characters are equally frequent, since runs could differ at ties."""
    rng = random.Random(seed)
    words = ["".join(rng.choice(LETTERS) for _ in range(rng.randint(1, 9))) for _ in range(800)]
    return [" ".join(rng.choice(words) for _ in range(40)).capitalize() for _ in range(count)]


def fingerprint(size: int) -> str:
    vocabulary = train_tokenizer(make_texts(), size, lowercase=True).get_vocab()
    return hashlib.sha256(json.dumps(sorted(vocabulary.items())).encode()).hexdigest()


@pytest.fixture(scope="module")
def trained() -> Any:
    return train_tokenizer(make_texts(), 400, lowercase=True)


def unknown(tokenizer: Any, texts: list[str]) -> float:
    """Returns the share of [UNK] among the texts' tokens, as transformers gives them."""
    ids = [i for text in texts for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
    return ids.count(tokenizer.unk_token_id) / len(ids)


def tokens(tokenizer: Any, text: str) -> str:
    """Returns the text as the tokenizer sees it, with spaces between its words."""
    return unicodedata.normalize("NFC", " ".join(tokenizer.tokenize(text)).replace(" ##", ""))


# --- BERT's, and the same everywhere ---


def test_another_process_trains_the_same_vocabulary() -> None:
    code = "import test_vocabulary as t; print(t.fingerprint(400), hash('a'))"
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(vocabulary_lib.__file__).parents[2])])
    env = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": path}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    vocabulary, hashed = run.stdout.split()
    assert hashed != str(hash("a"))  # the other process did hash differently
    assert {vocabulary} == {fingerprint(400) for _ in range(3)}


def test_a_trained_vocabulary_is_berts(trained: Any) -> None:
    assert len(trained) == vocab_size(trained) == 400
    assert trained.convert_ids_to_tokens(list(range(5))) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert special_ids(trained) == (0, 1, 2, 3, 4)
    assert sorted(trained.get_vocab().values()) == list(range(400))
    assert trained.tokenize("ÉÉ") == trained.tokenize("ee")  # case folded, accents dropped
    cased = train_tokenizer(make_texts(), 400, lowercase=False)
    assert cased.tokenize("É") != cased.tokenize("é") != cased.tokenize("e")
    assert cased.tokenize("e\u0301") == cased.tokenize("é")  # composed or not


def test_a_trained_tokenizer_survives_saving(trained: Any, tmp_path: Path) -> None:
    save_tokenizer(trained, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == trained.get_vocab() and loaded.model_max_length == 512
    pair = loaded("some words", "other words")
    names = loaded.convert_ids_to_tokens(pair["input_ids"])
    assert names[0] == "[CLS]" and names[-1] == "[SEP]" and names.count("[SEP]") == 2
    assert pair["token_type_ids"] == [0] * (names.index("[SEP]") + 1) + [1] * (len(names) - names.index("[SEP]") - 1)
    assert loaded("a [MASK]")["input_ids"][-2] == 4
    text = make_texts()[7]
    assert loaded(text)["input_ids"] == trained(text)["input_ids"]
    # transformers 4 does not know the class that 5 writes
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_no_text_is_refused() -> None:
    for texts in (["  ", ""], [], ["x" * 1000]):
        with pytest.raises(UserError, match="no text"):
            train_tokenizer(texts, 400, lowercase=True)


def test_how_much_is_read_is_told() -> None:
    told: list[int] = []
    train_tokenizer(["some words"] * 7, 64, lowercase=True, count=told.append)
    assert told == [10 * n for n in range(1, 8)]


# --- text of any script ---


def zipf(rng: random.Random, characters: str, length: int) -> str:
    return "".join(rng.choices(characters, [1 / (k + 20) for k in range(len(characters))], k=length))


def characters(first: int, last: int, count: int) -> str:
    return "".join(map(chr, random.Random(5).sample(range(first, last), count)))


HAN, SYLLABLES = characters(0x4E00, 0x9FA5, 3000), characters(0xAC00, 0xD7A4, 2500)
THAI, KANA = "กขคงจฉชซญฐณดตถทธนบปผฝพฟภมยรลวศษสหอฮ", "をにのてはがでとしれさあいうかきくけこアイウガギパー"
ARABIC = "ابتثجحخدذرزسشصضطظعغفقكلمنهويأإآؤئءة"
FACES = ["😀", "👍🏽", "👩\u200d👩\u200d👧", "❤️", "🇩🇪", "🔥", "🚀"]


def syllables(rng: random.Random, letters: str, signs: tuple[str, ...], count: int) -> str:
    return "".join(rng.choice(letters) + rng.choice(signs) for _ in range(count))


MADE = {  # a sentence of each
    "chinese": lambda r: f"{zipf(r, HAN, 60)}，{zipf(r, HAN, 60)}。",
    "japanese": lambda r: "".join(zipf(r, HAN[:900], 2) + zipf(r, KANA, 4) for _ in range(9)) + "。",
    "korean": lambda r: " ".join(zipf(r, SYLLABLES, r.randint(1, 5)) for _ in range(9)),
    "korean without spaces": lambda r: zipf(r, SYLLABLES[:300], 150),
    "thai": lambda r: syllables(r, THAI, ("", "ั", "ี", "ู", "่", "้ำ", "า"), 200),
    "khmer": lambda r: syllables(r, "កខគឃងចឆជ", ("", "ា", "ិ", "្រ"), 150),
    "hindi": lambda r: " ".join(syllables(r, "कखगघचछजझ", ("", "ा", "ि", "्"), 4) for _ in range(9)),
    "arabic": lambda r: " ".join("".join(r.choices(ARABIC, k=5)) for _ in range(9)),
    "emoji": lambda r: "".join(r.choices(FACES, k=150)),
    "mixed": lambda r: f"the café №{r.randint(0, 99)}: {zipf(r, HAN[:600], 20)}😀Straße“ЁЖ” {syllables(r, THAI, ('ั',), 9)}",
}


@pytest.mark.parametrize(
    "script,lowercase", [*((script, True) for script in MADE), ("korean", False), ("thai", False), ("mixed", False)]
)
def test_text_of_any_script_is_known(script: str, lowercase: bool, tmp_path: Path) -> None:
    rng = random.Random(1)
    texts = [MADE[script](rng) for _ in range(250 if script == "chinese" else 80)]
    size = 4096 if script == "chinese" else 1000
    made = train_tokenizer(texts, size, lowercase)
    assert unknown(made, texts) < 0.001
    if script == "chinese":  # each character is a token, and there is room for no other
        seen = {c for text in texts for c in text}
        assert len(seen) > 2500 and len(made) == len(seen) + 5
    else:
        assert len(made) == size or script == "emoji"  # there are few emoji
    save_tokenizer(made, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text, ids in zip(texts[:20], encode(made, texts[:20]), strict=True):
        assert loaded(text, add_special_tokens=False)["input_ids"] == ids.tolist()


@pytest.mark.parametrize(
    "text,seen",
    [
        ("Çà École Ñandú", "ca ecole nandu"),
        ("Ёлка й Ώρα", "елка и ωρα"),
        ("Việt Nam", "viet nam"),
        ("กำลัง ผู้ใหญ่", "กำลัง ผู้ใหญ่"),
        ("हिन्दी में", "हिन्दी में"),
        ("தமிழ்", "தமிழ்"),
        ("한국어 텍스트", "한국어 텍스트"),
        ("がぎ パン", "がぎ パン"),
        ("العَرَبِيَّة أكل", "العربية أكل"),  # vowel points are dropped, letters stay
        ("עִבְרִית", "עברית"),
        ("漢字かな", "漢 字 かな"),
        ("ok👍🏽❤️!", "ok 👍🏽 ❤️ !"),
        ("a≤b→c", "a ≤ b → c"),
    ],
)
def test_what_lowercasing_drops(text: str, seen: str) -> None:
    assert tokens(train_tokenizer([text] * 3, 500, lowercase=True), text) == seen


def test_a_run_without_spaces_is_many_words() -> None:
    for letters in (THAI, "あいうえおかきくけこ", "가나다라마바사"):
        text = "".join(random.Random(0).choices(letters, k=1000))
        made = train_tokenizer([text], 300, lowercase=True)
        ids = made(text, add_special_tokens=False)["input_ids"]
        assert len(ids) > 100 and made.unk_token_id not in ids


# --- how the vocabulary is shared out ---


def test_rare_characters_give_way_in_a_small_vocabulary() -> None:
    rare = "".join(chr(0x10A0 + i) for i in range(80))
    small = train_tokenizer(["abcdefg " * 50, " ".join(rare), "gfedcba " + rare], 64, lowercase=False)
    assert len(small) <= 64
    assert small.tokenize("abcdefg gfedcba")[0] == "abcdefg" and "[UNK]" not in small.tokenize("gfedcba")


def test_rare_characters_leave_room_for_words() -> None:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 8))) for _ in range(2000)]
    texts = [" ".join(rng.choices(words, k=2000)) for _ in range(40)]
    texts += [" ".join(c + "x" for c in characters(0x1200, 0x1380, 300))]  # each once, among 80,000 words
    made = train_tokenizer(texts, 1000, lowercase=True)
    assert len(made) == 1000
    assert sum(len(token.removeprefix("##")) > 1 for token in made.get_vocab()) > 900  # of 1000
    assert unknown(made, texts) < 0.01


def test_a_client_of_another_script_is_known() -> None:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 8))) for _ in range(3000)]
    english = [" ".join(rng.choices(words, [1 / (k + 3) for k in range(3000)], k=2000)) for _ in range(60)]
    chinese = [zipf(rng, HAN[:1200], 400) for _ in range(40)]  # a twentieth of the text
    made = train_tokenizer(english + chinese, 4096, lowercase=True)
    assert len(made) == 4096
    assert unknown(made, chinese) < 0.01 and unknown(made, english) == 0


def test_what_words_leave_over_goes_to_rare_characters() -> None:
    texts = [" ".join("a" * n for n in range(1, 60)) for _ in range(1000)]  # many words, made up of few pieces
    rare = characters(0x1200, 0x1380, 200)
    made = train_tokenizer([*texts, " ".join(rare)], 600, lowercase=True)
    assert "".join(made.tokenize(" ".join(rare))) == rare and made.tokenize("a" * 59) == ["a" * 59]


def test_words_are_found_in_ascii_as_the_splitter_finds_them() -> None:
    rng = random.Random(0)
    text = "".join(rng.choices([chr(c) for c in range(32, 127)], k=20_000))
    split = vocabulary_lib._splitter().pre_tokenize_str
    assert vocabulary_lib._ASCII_WORDS.findall(text) == [word for word, _ in split(text)]


# --- words without end ---


@pytest.mark.parametrize("kind", ["letters", "letters and escapes", "separators of files", "accents", "cyrillic"])
def test_an_endless_word_costs_nothing(kind: str) -> None:
    rng = random.Random(0)
    endless = {
        "letters": "".join(rng.choices("abcdefghijklmnop", k=200_000)),
        "letters and escapes": "".join(c + "\x01" for c in rng.choices("abcdefghijklmnop", k=200_000)),
        "separators of files": "".join(c + "\x1c" for c in rng.choices("abcdefghijklmnop", k=200_000)),
        "accents": "".join(c + "\u0301" for c in rng.choices("abcdefghijklmnop", k=200_000)),
        "cyrillic": "".join(rng.choices("абвгдежзиклмноп", k=200_000)),
    }[kind]
    start = time.process_time()
    made = train_tokenizer([*make_texts(30), endless], 300, lowercase=True)
    assert next(encode(made, [endless])).tolist() == [made.unk_token_id]
    assert time.process_time() - start < 5  # half a second; minutes if the trainer gets the word
    assert made.get_vocab() == train_tokenizer(make_texts(30), 300, lowercase=True).get_vocab()


@pytest.mark.parametrize(
    "letters",
    ["ᄀᄂᄃᄅᄆᄇᄉᄌ", "ᅡᅢᅣᅥᅦᅧ", "가각갂", "🏻🏼🏽🏾🏿", "😀😂🔥", "\ufe0e\ufe0f", "ัิีึืุู", "がぎぐ", "字\u0301", "𝒳𝒴𝒵", "⁂※"],
)
def test_no_run_of_odd_characters_takes_long(letters: str) -> None:
    endless = "".join(random.Random(0).choices(letters, k=100_000))
    start = time.process_time()
    made = train_tokenizer([*make_texts(30), endless], 300, lowercase=True)
    assert time.process_time() - start < 5  # a second; minutes as one endless word
    assert unknown(made, [endless[:3000]]) < 0.5 or letters in ("\ufe0e\ufe0f", "𝒳𝒴𝒵")  # these do make one endless word


def test_a_long_word_that_is_short_without_its_accents_is_learnt_from() -> None:
    word = "e\u0301" * 60
    assert train_tokenizer([f"{word} ab"], 200, lowercase=True).tokenize(word) == ["e" * 60]
    assert train_tokenizer([f"{word} ab"], 200, lowercase=False).tokenize(word) == ["[UNK]"]


def test_a_url_of_any_length_is_learnt_from() -> None:
    url = "/".join(["https:", "example", "path"] * 50)
    assert train_tokenizer([url], 100, lowercase=True).tokenize(url).count("example") == 50


def test_unknown_text_is_not_counted_as_known(trained: Any) -> None:
    assert unknown(trained, ["भाषा 語"]) == 1.0
    assert np.isclose(unknown(trained, ["a b भ c"]), 0.25)

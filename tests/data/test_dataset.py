"""Preparation is whole or absent, the same in every process, and keeps held-out text out of training."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedbert_jax import config as config_lib
from fedbert_jax.config import Config
from fedbert_jax.data import dataset as dataset_lib
from fedbert_jax.data import duplicates, making, repeats
from fedbert_jax.data.dataset import Dataset, prepare
from fedbert_jax.errors import UserError

LENGTH = 16
FILES = ["heldout.npy", "meta.json", "tokenizer", "train.npy"]


def make_corpus(root: Path, clients: dict[str, int], seed: int = 0) -> Path:
    """Writes the given number of documents for each client; each document holds a word of its own."""
    rng = random.Random(seed)
    common = ["".join(rng.choice("abcdefgh") for _ in range(rng.randint(2, 5))) for _ in range(60)]
    for name, count in clients.items():
        words = rng.sample(common, 30)
        texts = []
        for i in range(count):
            half = [" ".join(rng.choice(words) for _ in range(rng.randint(3, 12))) for _ in range(2)]
            texts.append(f"{half[0]} {name}{i}q {half[1]}")
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / "notes.txt").write_text("\n\n".join(texts))
    return root


def make_config(corpus: Path, **changes: Any) -> Config:
    data = dict(source=f"text:{corpus}", tokenizer="train:256", seq_len=LENGTH, eval_fraction=0.2)
    changes["data"] = data | changes.get("data", {})
    return config_lib.from_dict(changes)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"), {"west": 60, "east": 40, "north": 20})


@pytest.fixture(scope="module")
def prepared(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Any, Path]:
    directory = tmp_path_factory.mktemp("run") / "data"
    return *prepare(make_config(corpus), directory), directory


class Told:
    """Records the progress that is reported."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, str, int | None]] = []
        self.counts: list[list[int]] = []  # by stage

    def stage(self, text: str, unit: str = "", total: int | None = None) -> None:
        self.stages.append((text.split()[0], unit, total))
        self.counts.append([])

    def count(self, done: int) -> None:
        self.counts[-1].append(done)


def same(a: Path, b: Path) -> bool:
    return all((a / n).read_bytes() == (b / n).read_bytes() for n in ("train.npy", "heldout.npy", "meta.json"))


# --- what comes out ---


def test_a_dataset_holds_every_client(prepared: tuple[Dataset, Any, Path]) -> None:
    data, tokenizer, directory = prepared
    assert sorted(os.listdir(directory)) == FILES
    assert data.client_names == ("east", "north", "west")
    assert data.vocab_size == len(tokenizer) == len(data.unigram) == 256
    assert data.special_ids == (0, 1, 2, 3, 4)
    for blocks in (data.train, data.heldout):
        assert blocks.num_clients == 3 and blocks.offsets.dtype == np.int64
        assert blocks.tokens.dtype == np.uint16 and blocks.tokens.shape == (blocks.offsets[-1], LENGTH)
        assert (blocks.tokens[:, 0] == tokenizer.cls_token_id).all()
        assert (blocks.sizes > 0).all()
    assert np.array_equal(data.unigram, np.bincount(data.train.tokens.ravel(), minlength=256))
    for c, client in enumerate(data.summary):
        assert (client.train_blocks, client.heldout_blocks) == (data.train.sizes[c], data.heldout.sizes[c])
        assert client.tokens == client.train_blocks * LENGTH
        assert 0 < client.js_divergence < 1
    assert [c.documents for c in data.summary] == [40, 20, 60]
    assert sum(c.share for c in data.summary) == pytest.approx(1)


def test_blocks_spell_the_clients_own_documents(prepared: tuple[Dataset, Any, Path], corpus: Path) -> None:
    data, tokenizer, _ = prepared
    for c, name in enumerate(data.client_names):
        texts = (corpus / name / "notes.txt").read_text().split("\n\n")
        for blocks in (data.train, data.heldout):
            stream = blocks.client(c)[:, 1:].ravel().tolist()
            pieces = " ".join(tokenizer.convert_ids_to_tokens(stream)).split(" [SEP]")
            known = {" ".join(tokenizer.tokenize(text)) for text in texts}
            assert {piece.strip() for piece in pieces[:-1]} <= known
            assert len(pieces) > 2


def test_no_document_is_both_held_out_and_trained_on(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    encode = making.encode_documents
    monkeypatch.setattr(making, "encode_documents", lambda t, texts, *a: encode(t, seen.extend(texts) or seen, *a))
    learned: list[str] = []
    train = making.train_tokenizer
    monkeypatch.setattr(making, "train_tokenizer", lambda t, *a: train(learned.extend(t) or learned, *a))
    shared = tmp_path / "c" / "both"
    shared.mkdir(parents=True)
    text = (corpus / "east" / "notes.txt").read_text()
    (shared / "a.txt").write_text(text + "\n\n" + text.upper().replace(" ", "  "))
    prepare(make_config(tmp_path / "c"), tmp_path / "data")
    assert len(seen) == len({" ".join(t.lower().split()) for t in seen}) == 40
    assert set(learned) < set(seen) and 0 < len(seen) - len(learned) < 20  # the vocabulary saw no held-out text


def test_a_vocabulary_past_16_bits_is_stored_in_32(corpus: Path, tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh", *(f"##{c}" for c in "abcdefgh")]
    words += [f"filler{i}" for i in range(2**16)]
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    data, _ = prepare(make_config(corpus, data={"tokenizer": str(tmp_path / "bert")}), tmp_path / "data")
    assert data.vocab_size == len(words) > 2**16
    assert data.train.tokens.dtype == data.heldout.tokens.dtype == np.int32
    by_model = make_config(corpus, data={"tokenizer": ""}, model={"init_from": str(tmp_path / "bert")})
    assert prepare(by_model, tmp_path / "by_model")[0].vocab_size == len(words)


# --- the same data ever after ---


def test_a_second_process_prepares_the_same(prepared: tuple[Dataset, Any, Path], corpus: Path, tmp_path: Path) -> None:
    _, _, directory = prepared
    config = json.dumps(config_lib.to_dict(make_config(corpus)))
    code = f"""
import json, pathlib
from fedbert_jax import config
from fedbert_jax.data.dataset import prepare
prepare(config.from_dict(json.loads({config!r})), pathlib.Path({str(tmp_path / "data")!r}))
"""
    root = str(Path(dataset_lib.__file__).parents[2])
    env = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": root}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)
    assert same(directory, tmp_path / "data")
    assert not any(p.name.startswith(".") for p in tmp_path.iterdir())


def test_prepared_data_is_taken_as_it_is(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus", {"a": 20, "b": 20})
    config = make_config(corpus)
    first, tokenizer = prepare(config, tmp_path / "data")
    kept = {n: np.array(getattr(first, n).tokens) for n in ("train", "heldout")}
    make_corpus(corpus, {"a": 30}, seed=5)
    (corpus / "b" / "notes.txt").unlink()
    told = Told()
    again, reloaded = prepare(config, tmp_path / "data", progress=told)
    assert told.stages == []
    for name, tokens in kept.items():
        assert np.array_equal(getattr(again, name).tokens, tokens)
        assert np.array_equal(getattr(again, name).offsets, getattr(first, name).offsets)
        assert isinstance(getattr(again, name).tokens, np.memmap) and not getattr(again, name).tokens.flags.writeable
    assert again.summary == first.summary and np.array_equal(again.unigram, first.unigram)
    assert reloaded.get_vocab() == tokenizer.get_vocab()
    cached = dataclasses.replace(
        config, data=dataclasses.replace(config.data, store="memmap", cache_dir="elsewhere", streaming=True)
    )
    prepare(cached, tmp_path / "data")  # where data is kept does not change it
    with pytest.raises(UserError, match="prepared with seq_len=16, not 32"):
        prepare(make_config(corpus, data={"seq_len": 32}), tmp_path / "data")
    with pytest.raises(UserError, match="prepared with seed=0, not 1"):
        prepare(make_config(corpus, seed=1), tmp_path / "data")
    with pytest.raises(UserError, match=r"prepared with another privacy\.client_seed"):  # what is held out follows from it
        prepare(make_config(corpus, privacy={"client_seed": 7}), tmp_path / "data")


def test_what_an_interrupted_preparation_left_is_cleared(
    prepared: tuple[Dataset, Any, Path], corpus: Path, tmp_path: Path
) -> None:
    config = json.dumps(config_lib.to_dict(make_config(corpus)))
    code = f"""
import json, os, pathlib
from fedbert_jax import config
from fedbert_jax.data import dataset, making
making.js_divergence = lambda *a: os.kill(os.getpid(), 9)  # the blocks are written, meta.json is not
dataset.prepare(config.from_dict(json.loads({config!r})), pathlib.Path("data"))
"""
    env = os.environ | {"PYTHONPATH": str(Path(dataset_lib.__file__).parents[2])}
    assert subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path).returncode == -9
    (left,) = tmp_path.iterdir()
    assert left.name != "data" and (left / "train.npy").stat().st_size > 1000
    prepare(make_config(corpus), tmp_path / "data")
    assert [p.name for p in tmp_path.iterdir()] == ["data"]
    assert same(tmp_path / "data", prepared[2])


def test_an_error_leaves_nothing(corpus: Path, tmp_path: Path) -> None:
    class Interrupt(Told):
        def stage(self, text: str, unit: str = "", total: int | None = None) -> None:
            super().stage(text, unit, total)
            if text.startswith("packing"):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(make_config(corpus), tmp_path / "data", progress=Interrupt())
    assert list(tmp_path.iterdir()) == []


def test_a_directory_of_something_else_is_not_touched(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="something else"):
        prepare(make_config(corpus), tmp_path / "data")
    assert (tmp_path / "data" / "thesis.txt").read_text() == "mine"
    (tmp_path / "data" / "thesis.txt").rename(tmp_path / "data" / "meta.json")
    with pytest.raises(UserError, match="damaged"):
        prepare(make_config(corpus), tmp_path / "data")


# --- clients too small, and too few ---


@pytest.fixture
def uneven(tmp_path: Path) -> Path:
    return make_corpus(tmp_path / "uneven", {"big": 40, "other": 40, **{f"tiny{i}": 1 for i in range(7)}})


def long_blocks(corpus: Path, **changes: Any) -> Config:
    changes["data"] = {"seq_len": 64} | changes.get("data", {})
    return make_config(corpus, **changes)


def test_small_clients_are_dropped_with_one_warning(uneven: Path, tmp_path: Path) -> None:
    warnings: list[str] = []
    data, _ = prepare(long_blocks(uneven), tmp_path / "data", warn=warnings.append)
    assert data.client_names == ("big", "other")
    assert data.train.offsets[-1] == len(data.train.tokens) and data.heldout.offsets[-1] == len(data.heldout.tokens)
    (warning,) = warnings
    assert "tiny0, tiny1, tiny2, tiny3, tiny4 and 2 more" in warning and "7" in warning


def test_a_dropped_client_leaves_nothing_held_out(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus", {"big": 40})
    for i in range(12):  # a short document and a long one: whichever is held out, the other is all there is to train on
        (corpus / f"two{i:02d}").mkdir()
        (corpus / f"two{i:02d}" / "a.txt").write_text(f"abc {i}\n\n" + f"hgf{i} " * 200)
    config = make_config(corpus, data={"deduplicate": False})  # otherwise a long document of one word is dropped
    data, _ = prepare(config, tmp_path / "data", warn=lambda _: None)
    assert 1 < len(data.client_names) < 13
    assert len(data.train.tokens) == data.train.offsets[-1] and len(data.heldout.tokens) == data.heldout.offsets[-1]


def test_small_clients_are_refused_when_asked(uneven: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.small_clients='error'.*tiny0.* and 2 more"):
        prepare(long_blocks(uneven, data={"small_clients": "error"}), tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_a_cohort_larger_than_what_is_left_is_refused(uneven: Path, tmp_path: Path) -> None:
    config = long_blocks(uneven, federated={"clients_per_round": 3})
    with pytest.raises(UserError, match=r"federated\.clients_per_round=3: accepted: at most 2"):
        prepare(config, tmp_path / "data", warn=lambda _: None)
    assert not (tmp_path / "data").exists()


def test_no_client_left_is_refused(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus", {"a": 1, "b": 1})
    with pytest.raises(UserError, match="leaves no client"):
        prepare(long_blocks(corpus), tmp_path / "data", warn=lambda _: None)


def test_a_client_with_one_document_has_no_held_out_text(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus", {"a": 40, "b": 30})
    config = make_config(corpus, data={"documents": "file"})
    warnings: list[str] = []
    data, _ = prepare(config, tmp_path / "data", warn=warnings.append)
    assert len(warnings) == 1 and "data.eval_fraction" in warnings[0]
    assert (data.train.sizes > 0).all() and data.heldout.sizes.tolist() == [0, 0]


# --- text that came before ---


def windows(blocks: np.ndarray) -> list[bytes]:
    """Returns all windows of 32 tokens in the blocks."""
    return [np.array(row[i : i + 32]).tobytes() for row in blocks for i in range(row.size - 31)]


def random_texts(rng: random.Random, count: int) -> list[str]:
    words = ["".join(rng.choice("abcdefgh") for _ in range(rng.randint(2, 5))) for _ in range(300)]
    return [" ".join(rng.choices(words, k=60)) for _ in range(count)]


def write_texts(root: Path, clients: dict[str, list[str]]) -> Path:
    for name, texts in clients.items():
        (root / name).mkdir(parents=True)
        (root / name / "a.txt").write_text("\n\n".join(texts))
    return root


def test_no_window_of_held_out_text_is_trained_on(tmp_path: Path) -> None:
    rng = random.Random(3)
    common = random_texts(rng, 30)  # every client has these, each with one word added
    names = ("east", "north", "west")
    clients = {name: random_texts(rng, 30) + [f"{text} {name}{n}" for n, text in enumerate(common)] for name in names}
    corpus = write_texts(tmp_path / "corpus", clients)
    keys = dict(seq_len=64, tokenizer="train:512")
    data, _ = prepare(make_config(corpus, data=keys | {"deduplicate": False}), tmp_path / "all")
    trained = set(windows(data.train.tokens))
    assert np.mean([window in trained for window in windows(data.heldout.tokens)]) > 0.1
    assert all(c.dropped_words == 0 for c in data.summary)

    clean, _ = prepare(make_config(corpus, data=keys), tmp_path / "once")
    trained = set(windows(clean.train.tokens))
    held_out = windows(clean.heldout.tokens)
    assert len(held_out) > 100 and not any(window in trained for window in held_out)
    assert [c.documents for c in clean.summary] == [60, 30, 30]
    assert [c.words + c.dropped_words for c in clean.summary] == [30 * 60 + 30 * 61] * 3
    assert [c.dropped_words for c in clean.summary] == [0, 30 * 61, 30 * 61]  # the added word alone is no text


def test_words_of_repeated_paragraphs_are_counted(tmp_path: Path) -> None:
    rng = random.Random(0)
    a, b, c = (random_texts(rng, 40) for _ in range(3))
    a[0] = f"{a[0]}\n{b[0]}"
    clients = {"a": a, "b": b, "c": [*a[:10], *c], "d": a, "e": [*b[5:9], "a few"], "f": ["a bit"]}
    documents = write_texts(tmp_path / "corpus", clients)
    warnings: list[str] = []
    data, _ = prepare(make_config(documents), tmp_path / "data", warn=warnings.append)
    assert data.client_names == ("a", "b", "c")
    assert [c.words for c in data.summary] == [41 * 60, 39 * 60, 40 * 60]
    assert [c.dropped_words for c in data.summary] == [0, 60, 11 * 60]
    left_out = "2 with little but repeated text (data.deduplicate): d, e; 1 without text for one training block"
    assert warnings == [f"clients left out: {left_out} of data.seq_len={LENGTH} tokens: f."]
    with pytest.raises(UserError, match=rf"^data\.small_clients='error' refuses clients: {re.escape(left_out)}"):
        prepare(make_config(documents, data={"small_clients": "error"}), tmp_path / "other")


def test_a_near_copy_of_another_client_is_named(tmp_path: Path) -> None:
    rng = random.Random(0)
    own = random_texts(rng, 10)
    near = [text.replace(" ", "\n", 1) + " end" for text in own[:5]]
    corpus = write_texts(tmp_path / "corpus", {"a": own, "b": random_texts(rng, 10), "copy": ["start " + "\n".join(near)]})
    warnings: list[str] = []
    data, _ = prepare(make_config(corpus), tmp_path / "data", warn=warnings.append)
    assert data.client_names == ("a", "b")
    assert warnings == ["clients left out: 1 with little but repeated text (data.deduplicate): copy."]


# --- text that the tokenizer doesn't know ---


def save_bert(root: Path, letters: str = "abcdefgh") -> str:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    root.mkdir()
    (root / "vocab.txt").write_text("\n".join(words))
    return str(root)


def test_a_client_of_unknown_text_is_named(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus", {"west": 40, "east": 40})
    (corpus / "teens").mkdir()
    (corpus / "teens" / "a.txt").write_text("\n\n".join(f"😀 {'🎉' * n} 🔥" * 20 for n in range(1, 30)))
    config = make_config(corpus, data={"tokenizer": save_bert(tmp_path / "bert"), "deduplicate": False})
    for name, keys in (("all", {}), ("once", {"deduplicate": True})):
        warnings: list[str] = []
        changed = dataclasses.replace(config, data=dataclasses.replace(config.data, **keys))
        data, _ = prepare(changed, tmp_path / name, warn=warnings.append)
        assert data.client_names == ("east", "west")
        assert warnings[0] == "clients left out: 1 with only unknown text for this tokenizer: teens."
    refuses = dataclasses.replace(config, data=dataclasses.replace(config.data, small_clients="error"))
    with pytest.raises(UserError, match=r"data\.small_clients='error'.*only unknown text for this tokenizer: teens"):
        prepare(refuses, tmp_path / "refused", warn=lambda _: None)


def test_a_tokenizer_that_knows_nothing_is_refused(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus", {"west": 40, "east": 40})
    bert = save_bert(tmp_path / "bert", "xyz")
    with pytest.raises(UserError, match=rf"^data\.tokenizer='{bert}' knows no word of data\.source=.*train:SIZE"):
        prepare(make_config(corpus, data={"tokenizer": bert}), tmp_path / "data")
    with pytest.raises(UserError, match=rf"^model\.init_from='{bert}' knows no word"):
        prepare(make_config(corpus, data={"tokenizer": ""}, model={"init_from": bert}), tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_no_block_is_without_a_token_to_predict(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    for name, known in (("east", 60), ("west", 50)):
        (corpus / name).mkdir(parents=True)
        rng = random.Random(known)
        texts = [" ".join(rng.choices("abcdefgh", k=30)) for _ in range(known)] + ["語 " * 90 for _ in range(20)]
        (corpus / name / "a.txt").write_text("\n\n".join(texts))
    config = make_config(corpus, data={"tokenizer": save_bert(tmp_path / "bert"), "deduplicate": False})
    warnings: list[str] = []
    data, _ = prepare(config, tmp_path / "data", warn=warnings.append)
    for blocks in (data.train.tokens, data.heldout.tokens):
        assert np.isin(blocks, data.special_ids, invert=True).any(axis=1).all()
        assert len(blocks)
    assert data.train.offsets[-1] == len(data.train.tokens) < (110 * 31 + 40 * 91) * 0.8 / (LENGTH - 1)
    shares = [1800 / (60 * 30 + 1800), 1800 / (50 * 30 + 1800)]  # [UNK] among the tokens of its text
    assert [c.unknown for c in data.summary] == pytest.approx(shares)
    (warning,) = warnings
    assert "more than 1% of the text of 2 of the clients" in warning and "west 54.5%, east 50.0%" in warning


def test_a_trained_tokenizer_of_any_script_knows_its_text(tmp_path: Path) -> None:
    rng = random.Random(0)
    for name, first in (("beijing", 0x4E00), ("seoul", 0xAC00), ("bangkok", 0x0E01)):
        (tmp_path / "c" / name).mkdir(parents=True)
        letters = [chr(first + n) for n in range(46 if name == "bangkok" else 400)]
        text = "\n\n".join("".join(rng.choices(letters, k=100)) for _ in range(40))
        (tmp_path / "c" / name / "a.txt").write_text(text)
    warnings: list[str] = []
    data, _ = prepare(make_config(tmp_path / "c", data={"tokenizer": "train:1024"}), tmp_path / "data", warn=warnings.append)
    assert warnings == [] and all(c.unknown < 0.001 for c in data.summary)
    # A fifth of the text is held out, though none has a space.
    assert all(0.1 < c.heldout_blocks / (c.heldout_blocks + c.train_blocks) < 0.3 for c in data.summary)
    beijing = data.summary[data.client_names.index("beijing")]
    assert beijing.words == 40 * 100


# --- progress ---


def test_progress_is_told_with_counts(corpus: Path, tmp_path: Path) -> None:
    told = Told()
    data, _ = prepare(make_config(corpus), tmp_path / "data", progress=told)
    names, units, totals = zip(*told.stages, strict=True)
    assert names == ("reading", "training", "encoding", "packing")
    assert units == ("documents", "characters", "characters", "blocks")
    texts = [t for n in data.client_names for t in (corpus / n / "notes.txt").read_text().split("\n\n")]
    characters = sum(map(len, texts))
    assert told.counts[0][-1] == len(texts) == 120
    assert told.counts[1][-1] == totals[1] and 0.7 * characters < totals[1] < 0.9 * characters  # a fifth is held out
    assert told.counts[2][-1] == totals[2] == characters
    assert told.counts[3][-1] == len(data.train.tokens) + len(data.heldout.tokens) <= totals[3]
    assert all(counts == sorted(counts) for counts in told.counts)


def test_text_stays_whose_first_occurrence_is_of_a_client_who_takes_no_part(tmp_path: Path) -> None:
    """The two largest of three clients are wanted; the smallest comes first, and the second begins with all of its text."""
    corpus = make_corpus(tmp_path / "corpus", {"b": 60, "c": 60})
    theirs = (corpus / "b" / "notes.txt").read_text().split("\n\n")[:40]
    (corpus / "a").mkdir()
    (corpus / "a" / "notes.txt").write_text("\n\n".join(theirs))
    data, _ = prepare(make_config(corpus, federated={"num_clients": 2}), tmp_path / "data")
    assert data.client_names == ("b", "c")
    assert [client.documents for client in data.summary] == [60, 60]
    assert [client.dropped_words for client in data.summary] == [0, 0]


def test_a_client_who_holds_out_no_block_is_named(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus", {"many": 60})
    (corpus / "one").mkdir()
    words = random.Random(1).choices("abcdefgh", k=200)
    (corpus / "one" / "notes.txt").write_text(" ".join(words))
    warnings: list[str] = []
    data, _ = prepare(make_config(corpus), tmp_path / "data", warn=warnings.append)
    assert data.heldout.sizes.tolist()[1] == 0 and data.train.sizes.min() > 0
    assert warnings == ["clients who hold out no block, so that they are not evaluated: 1: one."]


@pytest.mark.parametrize("file", ["train.npy", "heldout.npy", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize("left", [None, 0, 60, -10])  # bytes; none: the file is gone
def test_damage_is_named(
    file: str, left: int | None, corpus: Path, prepared: tuple[Dataset, Any, Path], tmp_path: Path
) -> None:
    shutil.copytree(prepared[2], tmp_path / "data")
    path = tmp_path / "data" / file
    path.unlink()
    if left is not None and path.suffix == ".npy":
        path.write_bytes((prepared[2] / file).read_bytes()[:left])
    with pytest.raises(UserError, match=f"/{file.partition('/')[0]} is (missing|damaged|missing or damaged); remove "):
        prepare(make_config(corpus), tmp_path / "data")


def test_a_file_is_no_place_for_it(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("mine")
    with pytest.raises(UserError, match="/data is a file; give another --workdir"):
        prepare(make_config(corpus), tmp_path / "data")


# --- text of any size ---


def test_a_tokenizer_learns_from_documents_spread_over_much_text(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learned: list[str] = []
    train = making.train_tokenizer
    monkeypatch.setattr(making, "train_tokenizer", lambda t, *a: train(learned.extend(t) or learned, *a))
    prepare(make_config(corpus), tmp_path / "all")
    every = learned.copy()
    monkeypatch.setattr(making, "LEARNT_FROM", sum(map(len, every)) // 4)
    learned.clear()
    data, _ = prepare(make_config(corpus), tmp_path / "some")
    assert data.client_names == ("east", "north", "west")
    places = [every.index(text) for text in learned]
    assert len(every) // 5 < len(places) < len(every) // 3
    assert sorted(set(places)) == places and max(np.diff([-1, *places, len(every)])) <= 6  # in order, and nowhere dense


def test_memory_does_not_grow_with_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 3.6 MB more text, the documents alone were 3.6 MB, and hashes of windows 8 bytes for each of 720,000 tokens."""
    monkeypatch.setattr(repeats, "_TOGETHER", 1 << 14)
    monkeypatch.setattr(duplicates, "_CHUNK", 1 << 14)
    monkeypatch.setattr(making, "LEARNT_FROM", 100_000)
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), 4)) for _ in range(500)]

    def peak(documents: int) -> int:
        path = tmp_path / f"{documents}.txt"
        path.write_text("\n\n".join(" ".join(rng.choice(words, 600)) for _ in range(documents)))
        tracemalloc.start()
        prepare(make_config(path, data=dict(seq_len=64, documents="blank_lines")), tmp_path / f"data-{documents}")
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result

    peak(50)  # what is loaded once
    small, large = peak(400), peak(1600)
    assert (tmp_path / "1600.txt").stat().st_size - (tmp_path / "400.txt").stat().st_size > 3_500_000
    assert large - small < 1_000_000, (large, small)

"""Datasets of the datasets library: saved, in a folder, by file; and the messages when they cannot be loaded."""

from __future__ import annotations

import json
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import datasets
import pytest
from sources import read, refused, write

from fedbert_jax.data.hub import split_dataset_name
from fedbert_jax.data.library import loading
from fedbert_jax.errors import UserError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rows = [("= One", "a"), ("first", "a"), ("second", "a"), ("= Two", "a"), ("third", "b")]
    lines = [json.dumps({"content": t, "site": s}) for t, s in rows]
    write(tmp_path / "set" / "train.jsonl", "\n".join(lines))
    return tmp_path / "set"


def test_a_dataset_on_disk(table: Path) -> None:
    found = read(f"hf:{table}", text_field="content", client_field="site", document_start="= ")
    assert found == [("= One\n\nfirst\n\nsecond", "a"), ("= Two", "a"), ("third", "b")]
    assert len(read(f"hf:{table}", text_field="content")) == 5
    message = refused(f"hf:{table}")
    assert "data.text_field='text'" in message and "content, site" in message
    assert "data.client_field='who'" in refused(f"hf:{table}", text_field="content", client_field="who")
    assert "data.split='dev'" in refused(f"hf:{table}", text_field="content", split="dev")
    assert "no such file or directory" in refused("hf:/no/such/place")
    for name in ("nothing-here.parquet", f"{table}/nothing.parquet", f"{table}/no/thing.csv", "./x.csv"):
        assert "no such file or directory" in refused(f"hf:{name}")


def test_a_dataset_in_this_directory(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(table)
    assert {client for _, client in read("hf:.", text_field="content")} == {"set"}
    monkeypatch.chdir(table.parent)
    (table / "sub").mkdir()
    assert {client for _, client in read("hf:set/sub/..", text_field="content")} == {"set"}


def test_name_and_config_of_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine" / "deep").mkdir(parents=True)
    write(tmp_path / "mine" / "a.csv", "")
    monkeypatch.chdir(tmp_path)
    assert split_dataset_name("Salesforce/wikitext/wikitext-103-raw-v1") == (
        "Salesforce/wikitext",
        "wikitext-103-raw-v1",
    )
    assert split_dataset_name("owner/name") == ("owner/name", None)
    assert split_dataset_name("name") == ("name", None)
    assert split_dataset_name("mine/deep") == ("mine/deep", None)
    assert split_dataset_name("mine/other") == ("mine", "other")
    assert split_dataset_name("mine/a.csv") == ("mine/a.csv", None)
    assert split_dataset_name(f"{tmp_path}/mine/other") == (f"{tmp_path}/mine", "other")


# --- saved by save_to_disk ---


def saved(texts: list[str | None], sites: list[Any], **keys: Any) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": texts, "site": sites}, **keys)


@pytest.mark.parametrize("kind", ["text", "hf"])
def test_a_saved_dataset(tmp_path: Path, kind: str) -> None:
    saved(["a", "NA", "c"], ["n", "007", "n"]).save_to_disk(tmp_path / "mine", num_shards=2)
    source = f"{kind}:{tmp_path}/mine"
    assert read(source, client_field="site") == [("a", "n"), ("NA", "007"), ("c", "n")]
    assert read(source) == [("a", "mine"), ("NA", "mine"), ("c", "mine")]
    assert read(source, split="train[1:]") == [("NA", "mine"), ("c", "mine")]
    message = refused(source, split="test")
    assert "data.split='test'" in message and f"{tmp_path}/mine has train; accepted: " in message
    assert "no column data.text_field='note'; there are: text, site" in refused(source, text_field="note")


@pytest.mark.parametrize("kind", ["text", "hf"])
def test_a_saved_dict_of_datasets(tmp_path: Path, kind: str) -> None:
    parts = datasets.DatasetDict(train=saved(["a", "b"], [1, 2]), dev=saved(["c", "d"], [3, None]))
    parts.save_to_disk(tmp_path / "mine")
    source = f"{kind}:{tmp_path}/mine"
    assert read(source, client_field="site") == [("a", "1"), ("b", "2")]
    assert read(source, split="dev[:50%]+train", client_field="site") == [("c", "3"), ("a", "1"), ("b", "2")]
    for split in ("test", "train[", "train[:x]", ""):
        message = refused(source, split=split)
        assert f"data.split={split!r}: {tmp_path}/mine has train, dev; accepted: " in message
    assert f"{tmp_path}/mine dev row 2 has null" in refused(source, split="dev", client_field="site")
    assert f"{tmp_path}/mine dev row 2 has null" in refused(source, split="dev[1:]", client_field="site")


def test_saved_datasets_beside_text_are_clients(tmp_path: Path) -> None:
    saved(["a"], ["x"]).save_to_disk(tmp_path / "t" / "north")
    datasets.DatasetDict(train=saved(["b"], ["x"])).save_to_disk(tmp_path / "t" / "south")
    write(tmp_path / "t" / "west" / "a.txt", "c")
    assert read(f"text:{tmp_path}/t") == [("a", "north"), ("b", "south"), ("c", "west")]


def test_a_saved_dataset_keeps_its_own_split_and_labels_and_no_format(tmp_path: Path) -> None:
    features = datasets.Features(text=datasets.Value("string"), site=datasets.ClassLabel(names=["World", "Sports"]))
    table = saved(["a", None, "b"], [1, 0, 0], features=features, split="validation")
    table.with_format("numpy", columns=["site"]).save_to_disk(tmp_path / "mine")
    told: list[str] = []
    for split in ("train", "validation"):
        assert read(f"hf:{tmp_path}/mine", told, client_field="site", split=split) == [("a", "Sports"), ("b", "World")]
    assert len(told) == 2 and told[0].startswith("left out 1 row whose data.text_field='text' is null; the first is ")


@pytest.mark.parametrize("name", ["caf\udce9", "a::b", "[x] *", "two\nlines"])
def test_a_dataset_may_have_any_name(tmp_path: Path, name: str) -> None:
    saved(["a"], ["n"]).save_to_disk(tmp_path / "plain")
    (tmp_path / "plain").rename(tmp_path / name)
    shown = {"caf\udce9": r"caf\xe9", "two\nlines": r"two\nlines"}.get(name, name)
    for kind in ("text", "hf"):
        assert read(f"{kind}:{tmp_path}/{name}") == [("a", shown)]
    write(tmp_path / "set" / "train.csv", "text\na\n")
    (tmp_path / name).rename(tmp_path / "old")
    (tmp_path / "set").rename(tmp_path / name)
    assert read(f"hf:{tmp_path}/{name}/train.csv") == [("a", "train.csv")]
    if name != "two\nlines":
        assert "cannot look into a path with [ ] * ? :: or" in refused(f"hf:{tmp_path}/{name}")


@pytest.mark.parametrize("damage", ["half", "gone", "state", "info"])
@pytest.mark.parametrize("kind", ["text", "hf"])
def test_a_damaged_saved_dataset_is_one_sentence(tmp_path: Path, kind: str, damage: str) -> None:
    saved(["a " * 1000], ["n"]).save_to_disk(tmp_path / "mine")
    (data,) = (tmp_path / "mine").glob("*.arrow")
    if damage == "half":
        data.write_bytes(data.read_bytes()[:700])
    elif damage == "gone":
        data.unlink()
    else:
        (tmp_path / "mine" / ("state.json" if damage == "state" else "dataset_info.json")).write_text("{")
    message = refused(f"{kind}:{tmp_path}/mine")
    assert message.startswith(f"{tmp_path}/mine cannot be loaded: a file of it is ")


# --- a folder of files ---


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "set" / "data" / "train-0.csv", "text,site\nNA,007\nnull,1\n")
    write(tmp_path / "set" / "data" / "train-1.csv", "text,site\na,\n")
    write(tmp_path / "set" / "data" / "test-0.csv", "text,site\nt,2024-01-31\nu,nan\n")
    return tmp_path / "set"


def test_csv_in_a_folder_stays_as_written_and_errors_name_file_and_line(folder: Path) -> None:
    source = f"hf:{folder}"
    assert read(source) == [("NA", "set"), ("null", "set"), ("a", "set")]
    assert read(source, split="test", client_field="site") == [("t", "2024-01-31"), ("u", "nan")]
    assert f"{folder}/data/train-1.csv line 2 has nothing" in refused(source, client_field="site")
    told: list[str] = []
    assert read(source, told, client_field="site", missing_client="drop") == [("NA", "007"), ("null", "1")]
    assert len(told) == 1
    message = refused(source, split="dev")
    assert "data.split='dev'" in message and "train, test" in message
    assert not list(folder.parent.glob("cache/*"))  # nothing was copied


@pytest.mark.parametrize(
    "split, found",
    [
        ("train[:2]", [("NA", "007"), ("null", "1")]),
        ("train[1:3]", [("null", "1"), ("a", "3")]),
        ("train[-1:]", [("b", "4")]),
        ("train[3:]+test[:50%]", [("b", "4"), ("t", "2024-01-31")]),
        ("test+train[:1]", [("t", "2024-01-31"), ("u", "nan"), ("NA", "007")]),
    ],
)
def test_a_part_of_a_split_is_read_as_the_whole_is(folder: Path, split: str, found: list[tuple[str, str]]) -> None:
    write(folder / "data" / "train-1.csv", "text,site\na,3\nb,4\n")
    assert read(f"hf:{folder}", split=split, client_field="site") == found


def test_a_folder_of_tsv_is_read_here_too(tmp_path: Path) -> None:
    write(tmp_path / "set" / "train.tsv", "text\tsite\na\t007\nb\t\n")
    assert read(f"hf:{tmp_path}/set") == [("a", "set"), ("b", "set")]
    assert f"{tmp_path}/set/train.tsv line 3 has nothing" in refused(f"hf:{tmp_path}/set", client_field="site")


def test_a_part_of_json_stays_as_written(tmp_path: Path) -> None:
    rows = ['{"text": "2024-01-31", "site": "2024-01-31"}', '{"text": "b", "site": 7}', '{"text": "c", "site": "x"}']
    write(tmp_path / "set" / "train.jsonl", "\n".join([*rows, '{"text": "d"}']))
    found = read(f"hf:{tmp_path}/set", split="train[:3]", client_field="site")
    assert found == [("2024-01-31", "2024-01-31"), ("b", "7"), ("c", "x")]
    message = refused(f"hf:{tmp_path}/set", split="train[2:]", client_field="site")
    assert f"{tmp_path}/set/train.jsonl line 4 has no field" in message


def test_files_that_the_library_does_not_see_are_named(tmp_path: Path) -> None:
    write(tmp_path / "set" / "train.csv", "text\na\n")
    write(tmp_path / "set" / "MORE.CSV", "text\nb\n")
    write(tmp_path / "set" / "README.md", "about it")
    write(tmp_path / "else" / "c.csv", "text\nc\n")
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "else")
    told: list[str] = []
    assert read(f"hf:{tmp_path}/set", told) == [("a", "set")]
    assert told == [
        f"data.source='hf:{tmp_path}/set' passes over 2 files that are in none of its splits: MORE.CSV, linked/c.csv."
    ]


def test_what_only_the_library_reads_is_read_by_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = "text;site;n\nNA;007;08\nnull;;1\n;1;1\n"
    write(tmp_path / "set" / "train.csv", rows)
    write(tmp_path / "set" / "README.md", "---\nconfigs:\n- config_name: x\n  data_files: train.csv\n  sep: ';'\n---\n")
    source = f"hf:{tmp_path}/set"
    assert read(source) == [("NA", "set"), ("null", "set")]
    assert read(source, split="train[:1]", client_field="site") == [("NA", "007")]
    assert read(source, client_field="n") == [("NA", "08"), ("null", "1")]
    assert "train row 2 has nothing in data.client_field='site'" in refused(source, client_field="site")
    assert "data.split='dev'" in refused(source, split="dev")
    assert "no column data.text_field='note'; there are: text, site, n" in refused(source, text_field="note")
    write(tmp_path / "set" / "train.csv", "text;site\na;b\nc;d;e\n")
    assert "a file of it is damaged" in refused(source)
    assert capfd.readouterr() == ("", "")


def streamed(tmp_path: Path) -> str:
    """Writes a dataset that only the library reads, whose files are three, of 1,500 rows each; returns its source."""
    for part in range(3):
        rows = "".join(f"{1500 * part + n};00{n % 2}\n" for n in range(1500))
        write(tmp_path / "set" / f"train-{part}.csv", "text;site\n" + rows)
    write(tmp_path / "set" / "dev.csv", "text;site\nNA;x\n;y\n")
    files = "[{split: train, path: 'train-*.csv'}, {split: dev, path: dev.csv}]"
    write(tmp_path / "set" / "README.md", f"---\nconfigs:\n- config_name: x\n  data_files: {files}\n  sep: ';'\n---\n")
    return f"hf:{tmp_path}/set"


@pytest.mark.parametrize(
    "split", ["train", "dev", "train[:1700]", "train[1499:1501]", "dev[1:]+train[4000:]", "train[9:9]", "train[9:5]"]
)
def test_a_stream_has_the_rows_of_the_dataset(split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = streamed(tmp_path)
    keys = dict(split=split, client_field="site")
    empty = "[9:" in split
    told: list[str] = []
    expected = refused(source, **keys) if empty else (read(source, told, **keys), told)
    with monkeypatch.context() as patch:
        patch.setattr(datasets.DatasetBuilder, "download_and_prepare", None)  # nothing is kept
        again: list[str] = []
        keys["streaming"] = True
        assert (refused(source, **keys) if empty else (read(source, again, **keys), again)) == expected


def test_only_the_rows_asked_for_are_fetched(tmp_path: Path) -> None:
    source = streamed(tmp_path)
    write(tmp_path / "set" / "train-2.csv", "text;site\na;b\nc;d;e\n")  # would be refused
    assert len(read(source, streaming=True, split="train[:1400]")) == 1400
    assert "a file of it is damaged" in refused(source, streaming=True)
    assert "train row 1501 has null" in refused(
        f"hf:{saved_rows(tmp_path)}", streaming=True, split="train[1500:]", client_field="site"
    )


def saved_rows(tmp_path: Path) -> Path:
    """Writes JSON lines of which one lacks a client, in a form that only the library reads."""
    rows = [json.dumps({"text": f"t{n}", "site": None if n == 1500 else "a"}) for n in range(1502)]
    write(tmp_path / "other" / "train.jsonl", "\n".join(rows))
    features = "dataset_info:\n  features:\n  - name: text\n    dtype: string\n  - name: site\n    dtype: string\n"
    write(tmp_path / "other" / "README.md", f"---\n{features}---\n")
    return tmp_path / "other"


@pytest.mark.parametrize("split", ["test", "train[:10%]", "train[-5:]", "train[", "train[:x]", "train+", ""])
def test_a_stream_is_refused_what_needs_its_length(split: str, tmp_path: Path) -> None:
    message = refused(streamed(tmp_path), streaming=True, split=split)
    assert f"data.split={split!r}: data.source='hf:{tmp_path}/set' has " in message
    assert "accepted with data.streaming=True: these, or rows of them counted from the beginning" in message


def test_a_stream_says_what_the_dataset_would(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = streamed(tmp_path)
    assert "no column data.text_field='note'; there are: text, site" in refused(source, streaming=True, text_field="note")
    message = refused(source, streaming=True, split="dev[1:]", client_field="site")
    assert "has no text in data.split='dev[1:]': no document" in message
    assert capfd.readouterr() == ("", "")


def test_text_files_in_a_folder_have_a_row_a_line(tmp_path: Path) -> None:
    write(tmp_path / "set" / "train.txt", "one\n\ntwo\rthree\n")
    assert read(f"hf:{tmp_path}/set") == [("one", "set"), ("two", "set"), ("three", "set")]
    assert read(f"hf:{tmp_path}/set/train.txt") == [(t, "train.txt") for t in ("one", "two", "three")]
    assert "no column data.client_field='site'; there are: text." in refused(f"hf:{tmp_path}/set", client_field="site")


def test_a_description_of_the_files_is_heeded(tmp_path: Path) -> None:
    write(tmp_path / "set" / "x.csv", "text;n\na;1\n")
    write(tmp_path / "set" / "y.csv", "text;n\nb;2\n")
    config = "configs:\n- config_name: {0}\n  data_files: {0}.csv\n  sep: ';'\n"
    write(tmp_path / "set" / "README.md", "---\n" + config.format("x") + config.format("y")[9:] + "---\n")
    assert read(f"hf:{tmp_path}/set/y", client_field="n") == [("b", "2")]
    for source in ("", "/z"):
        assert "a /CONFIG that it has; there are: x, y." in refused(f"hf:{tmp_path}/set{source}")


def test_a_file_has_no_splits(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "text\na\n")
    assert "data.split='test'" in refused(f"hf:{path}", split="test")
    assert read(f"hf:{path}") == [("a", "a.csv")]


# --- what is said ---


def boom(error: BaseException, cause: BaseException | None = None) -> str:
    with pytest.raises(UserError) as caught, loading("data.source='hf:x'"):
        raise error from cause
    return str(caught.value).removeprefix("data.source='hf:x' cannot be loaded: ")


def test_errors_of_the_library_are_said_in_our_words() -> None:
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DatasetGenerationCastError, DatasetGenerationError, DatasetNotFoundError
    from huggingface_hub.errors import HFValidationError

    hub = DatasetNotFoundError("Dataset 'x' is a gated dataset on the Hub. You must be authenticated to access it.")
    assert "ask on its page" in boom(hub)
    assert "no dataset of the Hugging Face hub" in boom(DatasetNotFoundError("Dataset 'x' doesn't exist on the Hub"))
    assert "no dataset of the Hugging Face hub" in boom(HFValidationError("Repo id must use alphanumeric chars"))
    assert "hub cannot be reached" in boom(ConnectionError("Couldn't reach 'x' on the Hub"), FileNotFoundError("x"))
    assert "no data file" in boom(EmptyDatasetError("The directory at x doesn't contain any data files"))
    assert "same columns" in boom(DatasetGenerationCastError("Please either edit the data files"))
    assert "damaged" in boom(DatasetGenerationError("An error occurred"), ValueError("x"))
    assert "never executed" in boom(RuntimeError("Dataset scripts are no longer supported, but found x.py"))
    assert "the package lance, which" in boom(ImportError("pip install it", name="lance"))
    assert boom(DatasetGenerationError("x"), OSError(28, "No space left on device")) == "No space left on device."
    assert boom(PermissionError(13, "Permission denied", "/c/x\ny")) == r"Permission denied (/c/x\ny)."
    config = ValueError("BuilderConfig 'c' not found. Available: ['a', 'b']")
    assert "a /CONFIG that it has; there are: a, b." in boom(config)
    assert "needs PyTorch" not in boom(ValueError("Please use `load_from_disk` instead.\nOr `pip install x`"))
    assert boom(ValueError("Please use `load_from_disk` instead.")) == "the datasets library stops with ValueError."


def test_a_dataset_that_nobody_knows(tmp_path: Path) -> None:  # tests are offline, see conftest.py
    assert "the Hugging Face hub cannot be reached" in refused("hf:owner/none")
    (tmp_path / "empty").mkdir()
    assert "no data file" in refused(f"hf:{tmp_path}/empty")
    assert "no data file" in refused(f"hf:{write(tmp_path / 'docs' / 'a.docx', 'x').parent}")


def test_files_of_different_formats_are_no_dataset(tmp_path: Path) -> None:
    write(tmp_path / "set" / "train.csv", "text\na\n")
    write(tmp_path / "set" / "test.txt", "b")
    assert "its files are of different formats; accepted: files of one format" in refused(f"hf:{tmp_path}/set")
    assert read(f"hf:{tmp_path}/set/train.csv") == [("a", "train.csv")]


def test_a_part_without_rows_is_named(table: Path) -> None:
    assert "has no text in data.split='train[:0]': no document" in refused(
        f"hf:{table}", text_field="content", split="train[:0]"
    )


def test_libraries_are_quiet_only_while_they_load(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    log = logging.getLogger("some.library")
    with loading("x"):
        warnings.warn("advice for programmers", stacklevel=1)
        log.error("more of it")
        list(datasets.utils.tqdm(range(3)))
    assert capfd.readouterr() == ("", "") and not caplog.records
    assert log.isEnabledFor(logging.ERROR) and datasets.is_progress_bar_enabled()
    list(datasets.utils.tqdm(range(3)))
    assert "3/3" in capfd.readouterr().err
    with pytest.raises(UserError), loading("x"):
        raise ValueError
    assert log.isEnabledFor(logging.ERROR) and datasets.is_progress_bar_enabled()


def test_nothing_of_the_library_reaches_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    saved([f"t{i}" for i in range(40)], ["n"] * 40).save_to_disk(tmp_path / "mine", num_shards=20)
    capfd.readouterr()
    assert len(read(f"hf:{tmp_path}/mine")) == 40  # with more than 16 shards, the library shows a bar
    write(tmp_path / "set" / "train.csv", "text,site\na,n\n")
    assert read(f"hf:{tmp_path}/set", split="train[:1]") == [("a", "set")]
    refused(f"hf:{tmp_path}/set", split="x")
    assert capfd.readouterr() == ("", "")
    assert os.environ["HF_HUB_OFFLINE"]

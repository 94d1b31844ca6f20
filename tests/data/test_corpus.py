"""Documents come out as the source says, in one order, or with an error that names what to mend."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedbert_jax.config import DataConfig
from fedbert_jax.data import corpus
from fedbert_jax.data.corpus import Document, drop_repeated_paragraphs, read_documents, split_dataset_name
from fedbert_jax.errors import UserError

LONG = " ".join(f"word{i}" for i in range(25))


def read(source: object, **keys: Any) -> list[tuple[str, str]]:
    return [(d.text, d.group) for d in read_documents(DataConfig(source=str(source), **keys))]


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def refused(source: object, **keys: Any) -> str:
    with pytest.raises(UserError) as caught:
        read(source, **keys)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- text: ---


def test_blank_lines_separate_documents_and_the_folder_is_the_client(tmp_path: Path) -> None:
    write(tmp_path / "north" / "a.txt", "one\ntwo\n\n \t\nthree\r\n")
    write(tmp_path / "south" / "deep" / "b.md", "\ufefffour")
    assert read(f"text:{tmp_path}") == [("one\ntwo", "north"), ("three", "north"), ("four", "deep")]


def test_a_file_can_be_a_document(tmp_path: Path) -> None:
    path = write(tmp_path / "x" / "a.txt.gz", "one\n\ntwo\n")
    assert read(f"text:{path}", documents="file") == [("one\n\ntwo", "x")]


def test_document_start_begins_documents(tmp_path: Path) -> None:
    path = write(tmp_path / "x" / "a.txt", "before\n# First\ntext\n\nmore\n# Second\nlast\n")
    found = read(f"text:{path}", document_start="# ", deduplicate=False)
    assert found == [("before", "x"), ("# First\ntext\n\nmore", "x"), ("# Second\nlast", "x")]
    assert "data.document_start='('" in refused(f"text:{path}", document_start="(")


def test_folders_of_one_name_are_different_clients(tmp_path: Path) -> None:
    for folder in ("north/2024", "south/2024", "south/2025"):
        write(tmp_path / folder / "a.txt", folder)
    clients = {client for _, client in read(f"text:{tmp_path}")}
    assert clients == {"north/2024", "south/2024", "2025"}


def test_client_pattern_names_the_client(tmp_path: Path) -> None:
    write(tmp_path / "ward-3-notes.txt", "three")
    write(tmp_path / "ward-1-notes.txt", "one")
    assert read(f"text:{tmp_path}/*.txt", client_pattern=r"ward-(\d+)") == [("one", "1"), ("three", "3")]
    odd = write(tmp_path / "other.txt", "none")
    assert str(odd) in refused(f"text:{tmp_path}", client_pattern=r"ward-(\d+)")
    assert "group" in refused(f"text:{tmp_path}", client_pattern=r"ward")


def test_which_files_a_folder_and_a_pattern_mean(tmp_path: Path) -> None:
    for name in ("a.txt", "b.py", "info.json", ".hidden/c.txt", "sub/d.text.gz"):
        write(tmp_path / name, f"text of {name}")
    assert [t for t, _ in read(f"text:{tmp_path}")] == ["text of a.txt", "text of sub/d.text.gz"]
    assert [t for t, _ in read(f"text:{tmp_path}/*.py")] == ["text of b.py"]
    assert len(read(f"text:{tmp_path}/**/*.t*")) == 2
    assert "matches no file" in refused(f"text:{tmp_path}/*.rst")
    assert "nowhere" in refused(f"text:{tmp_path}/nowhere")


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl"])
def test_text_that_is_not_utf8_is_refused_with_its_place(tmp_path: Path, name: str) -> None:
    raw = '{"text": "né"}\n'.encode() + b'{"text": "\xff"}\n'
    path = write(tmp_path / name, raw)
    assert f"{path} is not UTF-8 text: byte {raw.index(0xFF)} " in refused(f"text:{path}")


def test_a_damaged_gzip_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt.gz", "some text " * 1000)
    path.write_bytes(path.read_bytes()[:-12])
    assert str(path) in refused(f"text:{path}")


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json.gz"])
def test_json_lines(tmp_path: Path, name: str) -> None:
    rows = [{"body": "one\n\ntwo", "who": 7}, {"body": "three", "who": "x"}]
    path = write(tmp_path / "d" / name, "\n".join(map(json.dumps, rows)) + "\n\n")
    found = read(f"text:{tmp_path}", text_field="body", client_field="who")
    assert found == [("one\n\ntwo", "7"), ("three", "x")]
    assert [g for _, g in read(f"text:{path}", text_field="body")] == ["d", "d"]


def test_json_lines_that_lack_something_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "one", "who": 1}\n{"txt": "two", "who": 1}\n')
    message = refused(f"text:{path}")
    assert f"{path} line 2" in message and "data.text_field='text'" in message and "txt, who" in message
    assert "line 1 has no field data.client_field='site'" in refused(f"text:{path}", client_field="site")
    assert "line 1 is not a JSON object" in refused(f"text:{write(path, '[1]')}")
    write(path, '{"text": ""}\n{')
    assert "line 2 is not a JSON object" in refused(f"text:{path}")
    assert "is int, not text" in refused(f"text:{write(path, json.dumps(dict(text=3)))}")


def test_lone_surrogates_do_not_reach_the_tokenizer(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a \\ud800 b"}')
    assert read(f"text:{path}")[0][0].encode() == b"a ? b"


def test_an_empty_corpus_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", " \n\n\t\n")
    assert "has no text" in refused(f"text:{path}")
    assert "has no text" in refused(f"text:{path}", deduplicate=False)


# --- paragraphs seen before ---


def test_a_paragraph_seen_before_is_dropped_wherever_it_was() -> None:
    documents = [
        Document("Alpha  beta\n\ngamma", "a"),
        Document("delta\n \nalpha\nBETA", "b"),
        Document("GAMMA\n\n\n\nalpha beta", "c"),
        Document("alpha beta delta", "c"),
    ]
    texts = [d.text for d in drop_repeated_paragraphs(documents)]
    assert texts == ["Alpha  beta\n\ngamma", "delta", "", "alpha beta delta"]


def test_documents_left_empty_are_dropped(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "one\n\nOne\n\ntwo")
    assert [t for t, _ in read(f"text:{path}")] == ["one", "two"]
    assert [t for t, _ in read(f"text:{path}", deduplicate=False)] == ["one", "One", "two"]


def test_a_repeated_row_inside_a_joined_document_is_dropped(tmp_path: Path) -> None:
    rows = ["= A", "same", "only a", "= B", "same", "only b"]
    path = write(tmp_path / "a.jsonl", "\n".join(json.dumps({"text": r}) for r in rows))
    found = read(f"text:{path}", document_start="= ")
    assert [t for t, _ in found] == ["= A\n\nsame\n\nonly a", "= B\n\nonly b"]


# --- hf: ---


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rows = [("= One", "a"), ("first", "a"), ("second", "a"), ("= Two", "a"), ("third", "b")]
    lines = [json.dumps({"content": t, "site": s}) for t, s in rows]
    write(tmp_path / "set" / "train.jsonl", "\n".join(lines))
    return tmp_path / "set"


def test_a_dataset_on_disk(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(table.parent / "home"))
    found = read(f"hf:{table}", text_field="content", client_field="site", document_start="= ")
    assert found == [("= One\n\nfirst\n\nsecond", "a"), ("= Two", "a"), ("third", "b")]
    assert len(read(f"hf:{table}", text_field="content")) == 5
    message = refused(f"hf:{table}")
    assert "data.text_field='text'" in message and "content, site" in message
    assert "data.client_field='who'" in refused(f"hf:{table}", text_field="content", client_field="who")
    assert "data.split='dev'" in refused(f"hf:{table}", text_field="content", split="dev")
    assert "no such directory" in refused("hf:/no/such/place")


def test_name_and_config_of_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert split_dataset_name("Salesforce/wikitext/wikitext-103-raw-v1") == (
        "Salesforce/wikitext",
        "wikitext-103-raw-v1",
    )
    assert split_dataset_name("owner/name") == ("owner/name", None)
    assert split_dataset_name("name") == ("name", None)
    assert split_dataset_name("mine/deep") == ("mine/deep", None)
    assert split_dataset_name("mine/other") == ("mine", "other")
    assert split_dataset_name(f"{tmp_path}/mine/other") == (f"{tmp_path}/mine", "other")


# --- docs: ---


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An importable package that must not be imported."""
    root = tmp_path / "path" / "dangerous_package"
    write(root / "__init__.py", f'"""Module {LONG}."""\nraise SystemExit("the package was executed")\n')
    write(
        root / "part.py",
        f'''
class A:
    """Class {LONG}."""
    if True:
        def f(self):
            r"""Method {LONG} \\d.

                indented
            """
            def g():
                """Too short."""
add_newdoc("m", "x", ("y", """Added {LONG}."""))
other("""Not a docstring {LONG}.""")
''',
    )
    write(root / "tests" / "helper.py", f'"""Tests {LONG}."""')
    write(root / "test_part.py", f'"""Tests {LONG}."""')
    write(root / "broken.py", f'"""Broken {LONG}."""\ndef (:')
    monkeypatch.syspath_prepend(str(root.parent))
    return root


def test_docstrings_of_a_package(package: Path, tmp_path: Path) -> None:
    found = read("docs:dangerous_package", cache_dir=str(tmp_path / "cache"), deduplicate=False)
    assert [t.split()[0] for t, _ in found] == ["Module", "Class", "Method", "Added"]
    assert {g for _, g in found} == {"dangerous_package"}
    assert "\n\nindented" in found[2][0] and r"\d" in found[2][0]
    assert "dangerous_package" not in sys.modules


def test_docstrings_too_short_after_deduplication_are_dropped(package: Path, tmp_path: Path) -> None:
    write(package / "again.py", f'"""Module {LONG}.\n\nSomething new."""')
    found = read("docs:dangerous_package", cache_dir=str(tmp_path / "cache"))
    assert not any("Something new" in t for t, _ in found)
    assert len(found) == 4


def test_the_cache_is_used_and_a_damaged_one_is_made_again(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = dict(cache_dir=str(tmp_path / "cache"))
    first = read("docs:dangerous_package", **keys)
    (cache,) = (tmp_path / "cache").iterdir()
    whole = cache.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "_extract_all", lambda files: pytest.fail("parsed again"))
        assert read("docs:dangerous_package", **keys) == first
    for damaged in (whole[: len(whole) // 2], b"", gzip.compress(b"[1]\n")):
        cache.write_bytes(damaged)
        assert read("docs:dangerous_package", **keys) == first
        assert list((tmp_path / "cache").iterdir()) == [cache] and corpus.gzip.decompress(cache.read_bytes())
    os.utime(package / "part.py", (1, 2e9))  # a package without a version counts by its newest file
    read("docs:dangerous_package", **keys)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_child_processes_find_what_one_process_finds(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = corpus._package_files("dangerous_package")
    monkeypatch.setattr(corpus, "_PARALLEL_BYTES", 0)
    monkeypatch.setattr(corpus.os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    assert corpus._extract_all(files) == corpus._extract(files)
    monkeypatch.setattr(sys, "executable", "")  # an embedded interpreter has none to start
    assert corpus._extract_all(files) == corpus._extract(files)


def test_parsing_works_in_a_script_without_a_main_guard(package: Path, tmp_path: Path) -> None:
    script = write(
        tmp_path / "script.py",
        f"""
import sys
sys.path[:0] = [{str(Path(corpus.__file__).parents[2])!r}, {str(package.parent)!r}]
from fedbert_jax.config import DataConfig
from fedbert_jax.data import corpus
corpus._PARALLEL_BYTES = 0
corpus.os.sched_getaffinity = lambda pid: {{0, 1}}
print(len(corpus.read_documents(DataConfig(source="docs:dangerous_package", cache_dir={str(tmp_path / "cache")!r}))))
assert "jax" not in sys.modules
""",
    )
    assert subprocess.run([sys.executable, script], capture_output=True, check=True, text=True).stdout == "4\n"


@pytest.mark.parametrize("name", ["no_such_package", "sys", "os.path", "__main__"])
def test_a_package_without_source_is_refused(name: str) -> None:
    assert repr(name) in refused(f"docs:{name}")


def test_numpy_has_the_docstrings_of_its_c_functions() -> None:
    (path,) = (p for p in corpus._package_files("numpy") if p.name == "_add_newdocs.py")
    (texts,) = corpus._extract([path])
    assert any(t.startswith("arange(") for t in texts)

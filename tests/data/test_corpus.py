"""Documents come out as the source says, in one order, or with an error that names what to mend."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sources import read, refused, write

from fedbert_jax.data.corpus import Document, drop_repeated_paragraphs


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
    assert "is a number, not text" in refused(f"text:{write(path, json.dumps(dict(text=3)))}")


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



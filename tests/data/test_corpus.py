"""Documents come out as the source says, always in the same order, or with an error that names what to fix."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
from sources import read, refused, write

from fedbert_jax.config import DataConfig
from fedbert_jax.data import corpus
from fedbert_jax.data.corpus import read_documents


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


def test_paragraphs_end_with_any_line_end(tmp_path: Path) -> None:
    write(tmp_path / "x" / "mac.txt", "one\rtwo\r\rthree\r")
    write(tmp_path / "x" / "mixed.txt.gz", "four\r\nfive\r\n\r\nsix\n\rseven\r\reight")
    texts = ["one\ntwo", "three", "four\nfive", "six", "seven", "eight"]
    assert [t for t, _ in read(f"text:{tmp_path}")] == texts


def test_a_clients_name_is_its_folders_whatever_that_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["caf\udce9", "[b]bold", "two\nlines", "x" * 250, "שלום", r"caf\xe9"]
    for name in names:
        write(tmp_path / "t" / name / "a.txt", f"text of {names.index(name)}")
    found = dict(read(f"text:{tmp_path}/t"))
    assert [found[f"text of {i}"] for i in range(5)] == [r"caf\xe9 (2)", "[b]bold", r"two\nlines", "x" * 250, "שלום"]
    assert found["text of 5"] == r"caf\xe9"  # this folder comes first, and is another client
    monkeypatch.chdir(tmp_path / "t" / "[b]bold")
    assert read("text:a.txt") == read("text:*.txt") == read("text:.") == [("text of 1", "[b]bold")]
    monkeypatch.chdir(tmp_path / "t")
    assert read("text:שלום/../[[]*/*") == [("text of 1", "[b]bold")]


def test_text_files_have_no_splits(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "one")
    message = refused(f"text:{tmp_path}", split="train[:10%]")
    assert message == f"data.split='train[:10%]': data.source='text:{tmp_path}' has no splits; accepted: 'train'."


def test_clients_without_text_are_named(tmp_path: Path) -> None:
    write(tmp_path / "t" / "east" / "a.txt", "one\n\ntwo")
    write(tmp_path / "t" / "north" / "a.txt", "Two")
    write(tmp_path / "t" / "west" / "a.txt", "")
    write(tmp_path / "t" / "x" / "b.jsonl", '{"text": " "}')
    told: list[str] = []
    assert read(f"text:{tmp_path}/t", told) == [("one", "east"), ("two", "east"), ("Two", "north")]
    assert told == ["2 clients have no text: west, x."]


def test_a_folder_that_is_inside_another_of_its_name(tmp_path: Path) -> None:
    write(tmp_path / "2024" / "a.txt", "one")
    write(tmp_path / "2024" / "sub" / "2024" / "a.txt", "two")
    assert read(f"text:{tmp_path}/2024") == [("one", "2024"), ("two", "sub/2024")]


def test_a_linked_folder_is_the_client_that_its_link_says(tmp_path: Path) -> None:
    write(tmp_path / "else" / "site-7" / "a.txt", "one")
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "north").symlink_to(tmp_path / "else" / "site-7")
    assert read(f"text:{tmp_path}/t") == [("one", "north")]


def test_client_pattern_names_the_client(tmp_path: Path) -> None:
    write(tmp_path / "ward-3-notes.txt", "three")
    write(tmp_path / "ward-1-notes.txt", "one")
    assert read(f"text:{tmp_path}/*.txt", client_pattern=r"ward-(\d+)") == [("one", "1"), ("three", "3")]
    odd = write(tmp_path / "other.txt", "none")
    assert str(odd) in refused(f"text:{tmp_path}", client_pattern=r"ward-(\d+)")
    assert "group" in refused(f"text:{tmp_path}", client_pattern=r"ward")


def test_a_file_whose_name_has_no_client_is_dropped_if_missing_clients_are(tmp_path: Path) -> None:
    for name in ("ward-1.txt", "ward-.txt", "ward- .txt", "other.txt"):
        write(tmp_path / name, name)
    keys = dict(client_pattern=r"ward-(.*)\.txt")
    message = refused(f"text:{tmp_path}/ward*", **keys)
    assert "finds nothing in the file name" in message and "data.missing_client='drop'" in message
    told: list[str] = []
    assert read(f"text:{tmp_path}", told, missing_client="drop", **keys) == [("ward-1.txt", "1")]
    assert told == [
        f"left out 3 files in whose name data.client_pattern={keys['client_pattern']!r} finds no client; "
        f"the first is {tmp_path}/other.txt."
    ]


def test_reading_tells_how_many_documents_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.txt", "\n\n".join(f"document {i}" for i in range(50)))
    told: list[int] = []
    list(read_documents(DataConfig(source=f"text:{path}"), count=told.append))
    assert told[-1] == 50 and len(told) < 10  # at most ten times a second
    monkeypatch.setattr(corpus, "TOLD_EVERY", 0)
    told.clear()
    list(read_documents(DataConfig(source=f"text:{path}"), count=told.append))
    assert told[-1] == 50 and len(told) > 50 and told == sorted(told)


def test_a_long_document_is_not_taken_to_pieces(tmp_path: Path) -> None:
    size = 4 << 20
    path = write(tmp_path / "a.txt", "ab " * (size // 3))
    read(f"text:{path}", deduplicate=False)
    tracemalloc.start()
    try:
        read(f"text:{path}", deduplicate=False)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 3.2 * size + (4 << 20)  # a list of its words would be twenty times as large


def test_an_empty_corpus_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", " \n\n\t\n")
    assert "has no text" in refused(f"text:{path}")
    assert "has no text" in refused(f"text:{path}", deduplicate=False)

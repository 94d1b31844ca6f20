"""Lines end where any system ends them, and the cost of reading is proportional to the file's size."""

from __future__ import annotations

import gzip
import tracemalloc
from pathlib import Path

import pytest
from sources import write

from fedbert_jax.data import lines
from fedbert_jax.data.lines import read_lines
from fedbert_jax.errors import UserError

MIXED = "\ufeffone\r\ntwo\rthree\nfour\r\n\r\nsix\r\rnine \u2028 né\n\nend"
MIXED_LINES = ["one", "two", "three", "four", "", "six", "", "nine \u2028 né", "", "end"]


@pytest.mark.parametrize("name", ["a.txt", "A.TXT.GZ"])
def test_lines_end_in_any_way_wherever_a_chunk_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = tmp_path / name
    raw = MIXED.encode()
    path.write_bytes(gzip.compress(raw) if name.endswith("GZ") else raw)
    for size in (*range(1, len(raw) + 1), 1 << 20):  # a chunk ends at every place once
        monkeypatch.setattr(lines, "_CHUNK", size)
        assert list(read_lines(path)) == MIXED_LINES, size


@pytest.mark.parametrize(
    "content, expected",
    [
        ("", []),
        ("\n", [""]),
        ("\r", [""]),
        ("\r\n", [""]),
        ("a", ["a"]),
        ("a\r", ["a"]),
        ("a\r\n\r", ["a", ""]),
        ("\ufeff", []),
        ("a\n\ufeffb", ["a", "\ufeffb"]),
    ],
)
def test_a_files_last_line_may_have_an_end_or_none(tmp_path: Path, content: str, expected: list[str]) -> None:
    assert list(read_lines(write(tmp_path / "a.txt", content))) == expected


@pytest.mark.parametrize("size", [1, 2, 3, 5, 1 << 20])
@pytest.mark.parametrize(
    "raw, byte, line",
    [
        (b"ok\r\nn\xc3\xa9\rbad \xff here\n", 12, 3),
        (b"\xff", 0, 1),
        (b"one\r\ntwo \xc3", 9, 2),  # cut in the middle of a letter
        (b"\xef\xbb\xbfone\n\r\xe9", 8, 3),
    ],
)
def test_what_is_not_utf8_is_refused_with_byte_and_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raw: bytes, byte: int, line: int, size: int
) -> None:
    monkeypatch.setattr(lines, "_CHUNK", size)
    path = write(tmp_path / "a.txt", raw)
    with pytest.raises(UserError) as caught:
        list(read_lines(path))
    assert str(caught.value) == f"{path} is not UTF-8 text: byte {byte} of the file, in line {line}, cannot be decoded."


def test_text_in_utf16_is_called_so(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "hello".encode("utf-16"))
    with pytest.raises(UserError, match=r"a\.txt is UTF-16 text; accepted: UTF-8\.$"):
        list(read_lines(path))


def test_a_gzip_file_that_is_damaged_or_none(tmp_path: Path) -> None:
    whole = gzip.compress(b"some text " * 1000)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    for raw in (whole[:-12], whole[:20], b"plain text", bytes(flipped)):
        (tmp_path / "a.txt.gz").write_bytes(raw)
        with pytest.raises(UserError, match=r"a\.txt\.gz is no gzip file, or a damaged one\.$"):
            list(read_lines(tmp_path / "a.txt.gz"))
    (tmp_path / "a.txt.gz").write_bytes(b"")  # as `touch` leaves one
    assert list(read_lines(tmp_path / "a.txt.gz")) == []
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"one\n") + gzip.compress(b"two\n"))  # as `cat` joins two
    assert list(read_lines(tmp_path / "a.txt.gz")) == ["one", "two"]


def test_a_file_that_cannot_be_read_is_named_with_the_systems_reason(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.txt cannot be read: No such file or directory\.$"):
        list(read_lines(tmp_path / "gone.txt"))


def test_one_long_line_is_held_twice_at_most(tmp_path: Path) -> None:
    size = 8 << 20
    path = write(tmp_path / "a.txt", b"word " * (size // 5))
    tracemalloc.start()
    try:
        (line,) = read_lines(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(line) == size // 5 * 5
    assert peak < 2 * size + 6 * (1 << 20)  # its parts and the whole, and a few chunks

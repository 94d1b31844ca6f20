"""A source means the files that a user would expect, each once, and nothing is passed over in silence."""

from __future__ import annotations

import os
import re
import socket
import time
from pathlib import Path

import pytest
from sources import write

from fedbert_jax.data.files import find_files
from fedbert_jax.errors import UserError


def find(root: Path, pattern: str = "") -> tuple[list[str], str]:
    """Returns the files found, relative to root, and the warning."""
    told: list[str] = []
    found = find_files(f"{root}/{pattern}" if pattern else str(root), told.append)
    assert len(told) < 2
    return [str(path.relative_to(root)) for path in found], "".join(told)


def none_found(source: object) -> str:
    with pytest.raises(UserError) as caught:
        find_files(str(source), lambda _: None)
    return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Makes two clients in the folder itself, and one by a link to another folder."""
    root = tmp_path / "texts"
    write(root / "east" / "a.txt", "east")
    write(root / "south" / "NOTES.TXT", "south")
    write(tmp_path / "else" / "north" / "a.txt", "north")
    (root / "north").symlink_to(tmp_path / "else" / "north")
    return root


ALL = ["east/a.txt", "north/a.txt", "south/NOTES.TXT"]


# --- which files ---


@pytest.mark.parametrize("pattern", ["", "**/*.txt", "*/*.txt", "*", "**/*", "**", "*/**/*.TXT", "*/*[st].txt"])
def test_links_are_followed_and_suffixes_taken_in_any_case(folder: Path, pattern: str) -> None:
    expected = ["south/NOTES.TXT"] if pattern == "*/*[st].txt" else ALL
    if pattern == "*/*[st].txt":
        (folder / "south" / "NOTES.TXT").rename(folder / "south" / "notes.TXT")
        expected = ["south/notes.TXT"]
    assert find(folder, pattern) == (expected, "")


@pytest.mark.parametrize(
    "name",
    [
        "a.txt",
        "a.TEXT",
        "a.Md",
        "a.jsonl",
        "a.ndjson",
        "a.csv",
        "a.TSV",
        "a.parquet",
        "a.txt.gz",
        "a.jsonl.GZ",
        "a.json.gz",
    ],
)
def test_suffixes_that_a_folder_is_searched_for(tmp_path: Path, name: str) -> None:
    write(tmp_path / "x" / "deep" / name, "")
    assert find(tmp_path) == ([f"x/deep/{name}"], "")


def test_a_file_by_name_and_a_pattern_take_any_suffix(tmp_path: Path) -> None:
    write(tmp_path / "a.py", "")
    write(tmp_path / "b.json", "")
    assert find(tmp_path, "a.py") == (["a.py"], "")
    assert find(tmp_path, "*.json") == (["b.json"], "")
    assert find(tmp_path, "*") == (["a.py", "b.json"], "")


def test_a_name_with_brackets_is_a_name_if_there_is_such_a_file(tmp_path: Path) -> None:
    write(tmp_path / "data[1]" / "a.txt", "")
    assert find(tmp_path, "data[1]") == (["data[1]/a.txt"], "")


def test_patterns_mean_what_they_mean_in_a_shell(tmp_path: Path) -> None:
    for name in ("a.txt", "x/a.txt", "x/y/a.txt", "x/y/b.md", "x/z/y/a.txt", "x/.hid/a.txt", ".top/a.txt", "x/.c.txt"):
        write(tmp_path / name, "")
    assert find(tmp_path, "**/y/*.txt")[0] == ["x/y/a.txt", "x/z/y/a.txt"]
    assert find(tmp_path, "*/*.txt")[0] == ["x/a.txt"]
    assert find(tmp_path, "**/a.txt")[0] == ["a.txt", "x/a.txt", "x/y/a.txt", "x/z/y/a.txt"]
    assert find(tmp_path, "x/**/y/**/*.txt")[0] == ["x/y/a.txt", "x/z/y/a.txt"]
    assert find(tmp_path, "**/y")[0] == ["x/y/a.txt", "x/y/b.md", "x/z/y/a.txt"]  # a matched folder is searched
    assert find(tmp_path, "?/y") == (["x/y/a.txt", "x/y/b.md"], "")
    assert find(tmp_path, "*/.*/*.txt")[0] == ["x/.hid/a.txt"]
    assert find(tmp_path, "*/.c.t?t")[0] == ["x/.c.txt"]
    assert find(tmp_path, ".top/*")[0] == [".top/a.txt"]


def test_a_pattern_may_be_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "x" / "a.txt", "")
    monkeypatch.chdir(tmp_path)
    for pattern in ("*/*.txt", "**/*.txt", "x/*", "./*/a.txt", "*/./a.txt", "x", "x/../*/*.txt"):
        assert [p.resolve() for p in find_files(pattern, pytest.fail)] == [tmp_path / "x" / "a.txt"], pattern
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_files("~/x/*.txt", pytest.fail) == [tmp_path / "x" / "a.txt"]


def test_a_folder_called_like_a_file_is_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "x.txt" / "a.txt", "")
    write(tmp_path / "x.txt" / "b.pdf", "")
    assert find(tmp_path)[0] == ["x.txt/a.txt"]
    assert find(tmp_path, "*.txt")[0] == ["x.txt/a.txt"]


def test_a_saved_dataset_is_found_as_a_whole(tmp_path: Path) -> None:
    for name in (
        "one/state.json",
        "one/dataset_info.json",
        "one/data-00000-of-00001.arrow",
        "two/dataset_dict.json",
        "two/train/state.json",
        "three/state.json",
    ):
        write(tmp_path / name, "{}")
    found, told = find(tmp_path)
    assert found == ["one", "two"]
    assert "1 for the suffix (three/state.json)" in told
    assert find(tmp_path, "*")[0] == ["one", "two"] and find(tmp_path, "one")[0] == ["one"]


# --- links ---


@pytest.mark.parametrize("pattern", ["", "**/*.txt", "*"])
def test_loops_end_and_are_said(folder: Path, pattern: str) -> None:
    (folder / "east" / "up").symlink_to(folder)
    (folder / "self").symlink_to(folder / "self")
    found, told = find(folder, pattern)
    assert found == ALL
    assert "1 leading back to a folder around it (east/up)" in told and "1 leading nowhere (self)" in told


def test_links_round_in_circles_outside_end(tmp_path: Path) -> None:
    for k in range(12):  # paths without repetition through these: 12 factorial
        write(tmp_path / "else" / str(k) / "a.txt", "")
        for other in range(12):
            (tmp_path / "else" / str(k) / f"to{other}").symlink_to(tmp_path / "else" / str(other))
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "in").symlink_to(tmp_path / "else" / "0")
    for pattern in ("", "**/*.txt"):
        found, told = find(tmp_path / "t", pattern)
        assert len(found) == 12 and "already read under another name" in told


@pytest.mark.parametrize("pattern", ["", "**/*.txt", "*/*.txt"])
def test_what_can_be_reached_twice_is_read_once_by_its_own_name(folder: Path, pattern: str) -> None:
    (folder / "a-copy").symlink_to(folder / "east")
    (folder / "a-first").mkdir()
    (folder / "a-first" / "also.txt").symlink_to(folder / "east" / "a.txt")
    found, told = find(folder, pattern)
    assert found == ALL
    assert "passes over 2 files or folders" in told and "already read under another name" in told
    assert "a-copy" in told and "a-first/also.txt" in told


def test_a_link_that_a_pattern_asks_for_is_found_although_the_folder_it_leads_to_was_seen(tmp_path: Path) -> None:
    write(tmp_path / "t" / "b-real" / "a.txt", "")
    (tmp_path / "t" / "north").symlink_to("b-real")
    assert find(tmp_path / "t", "**/north/*.txt")[0] == ["north/a.txt"]


def test_hard_links_are_files_of_their_own(tmp_path: Path) -> None:
    os.link(write(tmp_path / "a.txt", ""), tmp_path / "b.txt")
    assert find(tmp_path) == (["a.txt", "b.txt"], "")


# --- what is passed over ---


def test_what_is_passed_over_is_counted_by_reason_and_named(folder: Path, tmp_path: Path) -> None:
    for k in range(1200):
        write(folder / "east" / "scans" / f"{k:04d}.pdf", "")
    write(folder / "east" / ".hidden.txt", "")
    write(folder / ".git" / "deep" / "a.txt", "")
    write(folder / "noend", "")
    os.mkfifo(folder / "east" / "pipe.txt")
    (folder / "west").symlink_to(tmp_path / "gone")
    found, told = find(folder)
    assert found == ALL
    assert told.startswith(f"data.source='text:{folder}' passes over 1,205 files or folders: ")
    reasons = set(re.findall(r"[\d,]+ [a-z ]+ \([^)]*\)", told))
    assert "2 hidden (.git, east/.hidden.txt)" in reasons
    assert "1 neither file nor folder (east/pipe.txt)" in reasons and "1 leading nowhere (west)" in reasons
    (rest,) = (r for r in reasons if "suffix" in r)
    assert rest.startswith("1,201 for the suffix (noend, east/scans/0000.pdf, east/scans/0001.pdf and 1,198 more)")
    assert len(told) < 500


def test_a_pattern_passes_over_only_what_it_means_or_cannot_follow(folder: Path, tmp_path: Path) -> None:
    write(folder / "east" / "scan.pdf", "")
    write(folder / "east" / ".hidden.txt", "")
    os.mkfifo(folder / "east" / "pipe.txt")
    os.mkfifo(folder / "east" / "pipe")
    (folder / "west").symlink_to(tmp_path / "gone")
    found, told = find(folder, "**/*.txt")
    assert found == ALL
    assert "passes over 2 files or folders" in told and "east/pipe.txt" in told and "(west)" in told


def test_folders_that_cannot_be_opened_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scandir(path: str, real=os.scandir):  # root may open anything, so permissions alone prove nothing
        if path.endswith("east"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    for pattern in ("", "**/*.txt"):
        assert find(folder, pattern) == (ALL[1:], find(folder, pattern)[1])
        assert "1 that cannot be opened (east)" in find(folder, pattern)[1]


def test_names_of_what_is_passed_over_are_data(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "")
    for name in (b"caf\xe9.pdf", b"two\nlines.pdf", b"x" * 200 + b".pdf"):
        with open(os.path.join(os.fsencode(tmp_path), name), "w"):
            pass
    _, told = find(tmp_path)
    told.encode()
    assert r"caf\xe9.pdf" in told and r"two\nlines.pdf" in told and "\n" not in told and "x" * 61 not in told


# --- none at all ---


def test_a_source_without_files_says_what_there_is(tmp_path: Path) -> None:
    for nothing in ("", "\0", "a\0*"):
        assert "names no file" in none_found(nothing)
    assert "matches no file" in none_found(tmp_path / "nowhere") and len(none_found("/" + "x" * 5000)) < 600
    assert "matches no file" in none_found(tmp_path / "no*")
    write(tmp_path / "f" / "a.pdf", "")
    message = none_found(tmp_path / "f")
    assert ".txt" in message and "passed over: 1 for the suffix (a.pdf)" in message
    (tmp_path / "dead.txt").symlink_to("nowhere.txt")
    assert "1 leading nowhere (dead.txt)" in none_found(tmp_path / "dead.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    assert "1 neither file nor folder (pipe.txt)" in none_found(tmp_path / "pipe.txt")
    assert "1 neither file nor folder (null)" in none_found("/dev/null")
    (tmp_path / "empty").mkdir()
    assert "passed over" not in none_found(tmp_path / "empty")


def test_thousands_of_files_take_no_time_to_speak_of(tmp_path: Path) -> None:
    for k in range(3000):
        (tmp_path / f"{k % 30}").mkdir(exist_ok=True)
        (tmp_path / f"{k % 30}" / f"{k}.txt").touch()
    start = time.process_time()
    assert len(find(tmp_path)[0]) == 3000
    assert time.process_time() - start < 2


def test_a_socket_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.txt", "")
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s.txt")
        assert "1 neither file nor folder (s.txt)" in find(tmp_path)[1]

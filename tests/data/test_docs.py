"""Docstrings are extracted from packages without executing them, quickly and the same each time."""

from __future__ import annotations

import errno
import gzip
import os
import subprocess
import sys
from pathlib import Path

import pytest
from sources import read, refused, write

from fedbert_jax.data import docs

LONG = " ".join(f"word{i}" for i in range(25))


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


def test_the_cache_is_used_and_a_damaged_one_is_made_again(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = dict(cache_dir=str(tmp_path / "cache"))
    first = read("docs:dangerous_package", **keys)
    (cache,) = (tmp_path / "cache").iterdir()
    whole = cache.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(docs, "_extract_all", lambda files: pytest.fail("parsed again"))
        assert read("docs:dangerous_package", **keys) == first
    for damaged in (whole[: len(whole) // 2], b"", gzip.compress(b"[1]\n")):
        cache.write_bytes(damaged)
        assert read("docs:dangerous_package", **keys) == first
        assert list((tmp_path / "cache").iterdir()) == [cache] and gzip.decompress(cache.read_bytes())
    os.utime(package / "part.py", (1, 2e9))  # a package without a version goes by its newest file
    read("docs:dangerous_package", **keys)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_full_disk_leaves_nothing_in_the_cache(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(docs.os, "replace", full)
    keys = dict(cache_dir=str(tmp_path / "cache"))
    assert read("docs:dangerous_package", **keys) == read("docs:dangerous_package", **keys)
    assert not list((tmp_path / "cache").iterdir())


def test_child_processes_find_what_one_process_finds(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = docs._package_files("dangerous_package")
    monkeypatch.setattr(docs, "_PARALLEL_BYTES", 0)
    monkeypatch.setattr(docs.os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    assert docs._extract_all(files) == docs._extract(files)
    monkeypatch.setattr(sys, "executable", "")  # an embedded interpreter has none to start
    assert docs._extract_all(files) == docs._extract(files)


def test_parsing_works_in_a_script_without_a_main_guard(package: Path, tmp_path: Path) -> None:
    script = write(
        tmp_path / "script.py",
        f"""
import sys
sys.path[:0] = [{str(Path(docs.__file__).parents[2])!r}, {str(package.parent)!r}]
from fedbert_jax.config import DataConfig
from fedbert_jax.data import corpus, docs
docs._PARALLEL_BYTES = 0
docs.os.sched_getaffinity = lambda pid: {{0, 1}}
print(len(list(corpus.read_documents(DataConfig(source="docs:dangerous_package", cache_dir={str(tmp_path / "cache")!r})))))
assert "jax" not in sys.modules
""",
    )
    assert subprocess.run([sys.executable, script], capture_output=True, check=True, text=True).stdout == "4\n"


@pytest.mark.parametrize("name", ["no_such_package", "sys", "os.path", "__main__"])
def test_a_package_without_source_is_refused(name: str) -> None:
    assert repr(name) in refused(f"docs:{name}")


def test_numpy_has_the_docstrings_of_its_c_functions() -> None:
    (path,) = (p for p in docs._package_files("numpy") if p.name == "_add_newdocs.py")
    (texts,) = docs._extract([path])
    assert any(t.startswith("arange(") for t in texts)


def test_another_process_really_does_the_parsing(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def here(files: object) -> list[list[str]]:
        raise AssertionError("this process parses, so the other one failed")

    monkeypatch.setattr(docs, "_extract", here)
    assert [t.split()[0] for t in docs._extract_in_child([package / "part.py"])[0]] == ["Class", "Method", "Added"]

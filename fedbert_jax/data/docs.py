"""Docstrings of installed packages: real text that every installation has."""

from __future__ import annotations

import ast
import contextlib
import gzip
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import warnings
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fedbert_jax.config import DataConfig
from fedbert_jax.errors import UserError

DOCS_PACKAGES = ("numpy", "scipy", "jax", "flax", "orbax", "transformers", "datasets", "pandas")
DOCS_MIN_WORDS = 20  # shorter docstrings ("See base class.") say nothing
_DOCS_VERSION = 1  # raise it when the extraction changes, so that old caches are not used
_PARALLEL_BYTES = 4_000_000  # less source than this is parsed before a second interpreter has started


def read_docstrings(what: str, data: DataConfig) -> Iterator[tuple[str, str]]:
    """Yields each docstring of at least DOCS_MIN_WORDS words and its package, for the packages that `what` lists.

    The result is cached in `data.cache_dir`, keyed by the packages' versions.

    Raises:
      UserError: for a package without Python source.
    """
    packages = [name.strip() for name in what.split(",") if name.strip()] or DOCS_PACKAGES
    files = {name: _package_files(name) for name in dict.fromkeys(packages)}
    owners = importlib.metadata.packages_distributions()
    versions = {n: [f"{d} {importlib.metadata.version(d)}" for d in sorted(set(owners.get(n, [])))] for n in files}
    for name, version in versions.items():  # a folder without metadata goes by the age of its newest file
        version += [] if version else [str(max(p.stat().st_mtime_ns for p in files[name]))]
    key = hashlib.sha256(json.dumps([_DOCS_VERSION, DOCS_MIN_WORDS, list(versions.items())]).encode()).hexdigest()[:24]
    root = data.cache_dir or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "fedbert_jax")
    cache = Path(root).expanduser() / f"docs-{key}.jsonl.gz"
    try:
        with gzip.open(cache, "rt", encoding="utf-8") as file:
            documents = [(text, group) for group, text in map(json.loads, file)]
        if not documents:
            raise EOFError  # an empty file is a valid gzip file
    except (OSError, EOFError, zlib.error, ValueError, TypeError):  # absent or damaged: made again
        texts = iter(_extract_all([path for paths in files.values() for path in paths]))
        documents = [(t, name) for name, paths in files.items() for _ in paths for t in next(texts)]
        with contextlib.suppress(OSError):  # a read-only home only costs the next run a parse
            cache.parent.mkdir(parents=True, exist_ok=True)
            temporary = cache.with_suffix(f".{os.getpid()}.tmp")
            try:
                with gzip.open(temporary, "wt", compresslevel=3, encoding="utf-8") as file:
                    file.writelines(json.dumps([group, text]) + "\n" for text, group in documents)
                os.replace(temporary, cache)
            finally:  # leaves nothing behind on a full disk
                temporary.unlink(missing_ok=True)
    yield from documents


def _package_files(package: str) -> list[Path]:
    """Returns the package's Python files without its tests; the package itself is never executed."""
    spec = importlib.util.find_spec(package) if package.isidentifier() and package != "__main__" else None
    files = []
    for root in map(Path, (spec.submodule_search_locations or [spec.origin or ""]) if spec else []):
        for path in sorted(root.rglob("*.py")) if root.is_dir() else [root]:
            parts = path.relative_to(root.parent).parts
            test = {"tests", "test"} & set(parts) or re.match(r"test_|conftest\.|.*_test\.py", parts[-1])
            files += [path] if path.suffix == ".py" and not test else []
    if not files:
        raise UserError(f"data.source=docs: names {package!r}, which is not an installed package with Python source.")
    return files


def _extract_all(files: Sequence[Path]) -> list[list[str]]:
    """Returns each file's docstrings, parsed in as many processes as there are CPUs (4 at most).

    The processes are plain subprocesses, not a multiprocessing pool: a pool's children import the caller's __main__ again
    (and jax with it, seconds each), which a script without a __main__ guard does not survive; a fork after jax has started
    threads can deadlock.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(cpus, 4) if sum(path.stat().st_size for path in files) > _PARALLEL_BYTES else 1
    if workers == 1:
        return _extract(files)
    texts: list[list[str]] = [[] for _ in files]
    with ThreadPoolExecutor(workers) as pool:
        for k, found in enumerate(pool.map(_extract_in_child, [files[k::workers] for k in range(workers)])):
            texts[k::workers] = found
    return texts


def _extract_in_child(files: Sequence[Path]) -> list[list[str]]:
    # ast.parse makes a million objects and no cycle, so the garbage collector would waste a fifth of its time.
    code = f"import gc, json, sys, {__name__} as c; gc.disable(); "
    code += "json.dump(c._extract(json.load(sys.stdin)), sys.stdout)"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).resolve().parents[2]), *sys.path])}
    paths = json.dumps([str(path) for path in files]).encode()
    try:
        return list(json.loads(subprocess.check_output([sys.executable, "-c", code], input=paths, env=env)))
    except (OSError, ValueError, subprocess.CalledProcessError):  # no interpreter to start: parse here, more slowly
        return _extract(files)


def _extract(files: Iterable[str | Path]) -> list[list[str]]:
    """Returns each file's docstrings of at least DOCS_MIN_WORDS words; a file that does not parse has none."""
    result = []
    with warnings.catch_warnings(action="ignore"):  # about invalid escapes in other people's strings
        for path in files:
            tree: ast.AST = ast.Module([], [])
            with contextlib.suppress(OSError, SyntaxError, ValueError, RecursionError, MemoryError, SystemError):
                tree = ast.parse(Path(path).read_bytes())
            texts = (t for t in _docstrings(tree) if len(t.split()) >= DOCS_MIN_WORDS)
            result.append([inspect.cleandoc(t).encode("utf-8", "replace").decode() for t in texts])
    return result


def _docstrings(tree: ast.AST) -> Iterator[str]:
    """Yields the docstrings of modules, classes and functions, and those passed to `add_newdoc`, in text order."""
    if isinstance(tree, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield ast.get_docstring(tree, clean=False) or ""
    elif isinstance(tree, ast.Expr) and isinstance(tree.value, ast.Call):
        called = tree.value.func
        if "add_newdoc" in (getattr(called, "id", "") or getattr(called, "attr", "")):
            constants = (n.value for a in tree.value.args for n in ast.walk(a) if isinstance(n, ast.Constant))
            yield from (c for c in constants if isinstance(c, str))  # the names among them are too short to be kept
    for block in ("body", "handlers", "orelse", "finalbody"):
        for child in getattr(tree, block, ()):
            yield from _docstrings(child)

"""Text to documents: docstrings of installed packages, text files, or a Hugging Face dataset."""

from __future__ import annotations

import ast
import collections
import contextlib
import glob
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from fedbert_jax.config import DataConfig
from fedbert_jax.errors import UserError

DOCS_PACKAGES = ("numpy", "scipy", "jax", "flax", "orbax", "transformers", "datasets", "pandas")
DOCS_MIN_WORDS = 20  # shorter docstrings ("See base class.") say nothing
FOLDER_SUFFIXES = (".txt", ".text", ".md", ".jsonl", ".txt.gz", ".text.gz", ".md.gz", ".jsonl.gz", ".json.gz")
_DOCS_VERSION = 1  # raise it when the extraction changes, so that old caches are not used
_PARALLEL_BYTES = 4_000_000  # less source than this is parsed before a second interpreter has started


@dataclass(frozen=True)
class Document:
    """A piece of text that is never divided between clients, nor between training and held-out text."""

    text: str
    group: str  # whom it comes from: the natural client


def read_documents(data: DataConfig) -> list[Document]:
    """Reads every document of `data.source`, in an order that only the source decides.

    `docs:[PACKAGE,...]` reads docstrings, a package a group. `text:GLOB` reads a file, what a pattern matches, or a
    folder's `FOLDER_SUFFIXES` files (plain `.json` only where a pattern names it, since folders hold metadata);
    `.jsonl` and `.json` hold one object a line. `hf:NAME[/CONFIG]` reads a dataset, see `split_dataset_name`.

    Raises:
      UserError: naming the key, file, line, byte or column that cannot be read, or if there is no text.
    """
    kind, _, what = data.source.partition(":")
    documents = {"docs": _read_docs, "text": _read_text, "hf": _read_hf}[kind](what, data)
    min_words = DOCS_MIN_WORDS if kind == "docs" else 1
    if data.deduplicate:
        documents = drop_repeated_paragraphs(documents)
    kept = [d for d in documents if len(d.text.split()) >= min_words]
    if not kept:
        raise UserError(f"data.source={data.source!r} has no text: no document in it has {min_words} words.")
    return kept


def drop_repeated_paragraphs(documents: Iterable[Document]) -> Iterator[Document]:
    """Yields the documents without each blank-line separated paragraph that came before, in any of them.

    Paragraphs are compared without case and with runs of whitespace as one space. A document may be left empty.
    """
    seen: set[int] = set()  # 8-byte hashes: 10M paragraphs fit in memory, and none collide in practice
    for document in documents:
        kept = []
        for paragraph in re.split(r"\n\s*\n", document.text):
            key = " ".join(paragraph.lower().split()).encode()
            digest = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
            if key and digest not in seen:
                seen.add(digest)
                kept.append(paragraph)
        yield Document("\n\n".join(kept), document.group)


def _join(rows: Iterable[tuple[str, str]], data: DataConfig, starts: Callable[[str], object]) -> Iterator[Document]:
    """Joins rows of (text, group) to documents: a new one at `data.document_start` (or `starts`) or another group."""
    if data.document_start:
        starts = _pattern("data.document_start", data.document_start).match
    parts: list[str] = []
    current = ""
    for text, group in rows:
        if parts and (group != current or starts(text)):
            yield Document("\n".join(parts).strip(), current)
            parts = []
        parts.append(text)
        current = group
    if parts:
        yield Document("\n".join(parts).strip(), current)


def _pattern(key: str, value: str) -> re.Pattern[str]:
    try:
        return re.compile(value)
    except re.error as error:
        raise UserError(f"{key}={value!r} is not a regular expression: {error}.") from error


def _read_text(what: str, data: DataConfig) -> Iterator[Document]:
    client = _pattern("data.client_pattern", data.client_pattern) if data.client_pattern else None
    if client and not client.groups:
        raise UserError(f"data.client_pattern={data.client_pattern!r} has no (group) to take the client's name from.")
    files = _find_files(what)
    folders = _folder_names({path.absolute().parent for path in files})
    for path in files:
        group = folders[path.absolute().parent]
        if client:
            match = client.search(path.name)
            if not match or match[1] is None:
                raise UserError(f"data.client_pattern={data.client_pattern!r} does not match the file name of {path}.")
            group = match[1]
        if path.name.removesuffix(".gz").endswith((".jsonl", ".json")):
            yield from _join(_json_rows(path, group, data), data, lambda row: True)
        else:
            lines = ((line, group) for line in _lines(path))
            yield from _join(lines, data, lambda line: data.documents == "blank_lines" and not line.strip())


def _find_files(what: str) -> list[Path]:
    pattern = os.path.expanduser(what)
    found: set[Path] = set()
    for path in map(Path, [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)):
        if path.is_file():
            found.add(path)
        elif "**" not in pattern:  # which has the folders' files already
            inside = (p for p in path.rglob("*") if p.name.endswith(FOLDER_SUFFIXES) and p.is_file())
            found.update(p for p in inside if not any(part.startswith(".") for part in p.relative_to(path).parts))
    if not found:
        raise UserError(f"data.source='text:{what}' matches no file (in a folder: {', '.join(FOLDER_SUFFIXES)}).")
    return sorted(found)


def _folder_names(folders: set[Path]) -> dict[Path, str]:
    """Names each folder: its own name, or, where two share one, its path below all folders' common parent."""
    counts = collections.Counter(folder.name for folder in folders)
    common = os.path.commonpath(folders)
    return {f: f.name if counts[f.name] == 1 else os.path.relpath(f, common) for f in folders}


def _lines(path: Path) -> Iterator[str]:
    """Yields the file's lines without their ends."""
    offset = 0
    try:
        with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as file:
            for line in file:
                text = line.decode("utf-8").rstrip("\r\n")
                yield text if offset else text.removeprefix("\ufeff")
                offset += len(line)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: byte {offset + error.start} cannot be decoded.") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error


def _json_rows(path: Path, group: str, data: DataConfig) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        row = None
        with contextlib.suppress(ValueError):
            row = json.loads(line)
        if not isinstance(row, dict):
            raise UserError(f"{path} line {number} is not a JSON object; accepted: one object on each line.")
        for key, field in (("data.text_field", data.text_field), ("data.client_field", data.client_field)):
            if field and field not in row:
                raise UserError(f"{path} line {number} has no field {key}={field!r}; there are: {', '.join(row)}.")
        text = row[data.text_field]
        if not isinstance(text, str):
            raise UserError(f"{path} line {number}: field {data.text_field!r} is {type(text).__name__}, not text.")
        text = text.encode("utf-8", "replace").decode()  # lone surrogates, which JSON can hold and a tokenizer cannot
        yield text + "\n", str(row[data.client_field]) if data.client_field else group


def split_dataset_name(what: str) -> tuple[str, str | None]:
    """Returns NAME and CONFIG: NAME is the longest prefix that is a local directory, else OWNER/NAME of the hub."""
    parts = os.path.expanduser(what).rstrip("/").split("/")
    for end in range(len(parts), 0, -1):
        if os.path.isdir("/".join(parts[:end])):
            return "/".join(parts[:end]), "/".join(parts[end:]) or None
    if parts[0] in ("", ".", ".."):
        raise UserError(f"data.source='hf:{what}': there is no such directory.")
    return "/".join(parts[:2]), "/".join(parts[2:]) or None


def _read_hf(what: str, data: DataConfig) -> Iterator[Document]:
    import datasets  # here, because it takes a second and only this source needs it

    name, config = split_dataset_name(what)
    try:
        table = datasets.load_dataset(name, config, split=data.split)
    except Exception as error:  # loaders raise what their formats raise
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise UserError(f"data.source='hf:{what}', data.split={data.split!r} cannot be loaded: {reason}.") from error
    columns = {"data.text_field": data.text_field, "data.client_field": data.client_field or data.text_field}
    for key, column in columns.items():
        if column not in table.column_names:
            raise UserError(f"{key}={column!r} is no column of hf:{what}; there are: {', '.join(table.column_names)}.")

    def rows() -> Iterator[tuple[str, str]]:
        for batch in table.select_columns(sorted(set(columns.values()))).iter(batch_size=1000):
            for i, text in enumerate(batch[data.text_field]):
                if not isinstance(text, str | None):
                    raise UserError(f"data.text_field={data.text_field!r} holds {type(text).__name__}, not text.")
                yield f"{text or ''}\n", str(batch[data.client_field][i]) if data.client_field else what

    yield from _join(rows(), data, lambda row: True)


def _read_docs(what: str, data: DataConfig) -> Iterator[Document]:
    packages = [name.strip() for name in what.split(",") if name.strip()] or DOCS_PACKAGES
    files = {name: _package_files(name) for name in dict.fromkeys(packages)}
    owners = importlib.metadata.packages_distributions()
    versions = {n: [f"{d} {importlib.metadata.version(d)}" for d in sorted(set(owners.get(n, [])))] for n in files}
    for name, version in versions.items():  # a folder on the path without metadata counts by its newest file
        version += [] if version else [str(max(p.stat().st_mtime_ns for p in files[name]))]
    key = hashlib.sha256(json.dumps([_DOCS_VERSION, DOCS_MIN_WORDS, list(versions.items())]).encode()).hexdigest()[:24]
    root = data.cache_dir or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "fedbert_jax")
    cache = Path(root).expanduser() / f"docs-{key}.jsonl.gz"
    try:
        with gzip.open(cache, "rt", encoding="utf-8") as file:
            documents = [Document(text, group) for group, text in map(json.loads, file)]
        if not documents:
            raise EOFError  # an empty file is a valid gzip file
    except (OSError, EOFError, zlib.error, ValueError, TypeError):  # absent, or damaged and made again
        texts = iter(_extract_all([path for paths in files.values() for path in paths]))
        documents = [Document(t, name) for name, paths in files.items() for _ in paths for t in next(texts)]
        with contextlib.suppress(OSError):  # a read-only home costs the next run a parse, no more
            cache.parent.mkdir(parents=True, exist_ok=True)
            temporary = cache.with_suffix(f".{os.getpid()}.tmp")
            with gzip.open(temporary, "wt", compresslevel=3, encoding="utf-8") as file:
                file.writelines(json.dumps([d.group, d.text]) + "\n" for d in documents)
            os.replace(temporary, cache)
    yield from documents


def _package_files(package: str) -> list[Path]:
    """Returns the package's Python files, tests left out; the package itself is never executed."""
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

    Plain subprocesses, not a multiprocessing pool: a pool's children import the caller's __main__ again (jax with it,
    seconds each), which a script without a __main__ guard does not survive; a fork after jax has threads can deadlock.
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
    # ast.parse makes a million objects and no cycle: a fifth of its time would be the collector's.
    code = "import gc, json, sys, fedbert_jax.data.corpus as c; gc.disable(); "
    code += "json.dump(c._extract(json.load(sys.stdin)), sys.stdout)"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).resolve().parents[2]), *sys.path])}
    paths = json.dumps([str(path) for path in files]).encode()
    try:
        return list(json.loads(subprocess.check_output([sys.executable, "-c", code], input=paths, env=env)))
    except (OSError, ValueError, subprocess.CalledProcessError):  # no interpreter to start: slower, not impossible
        return _extract(files)


def _extract(files: Iterable[str | Path]) -> list[list[str]]:
    """Returns the docstrings of at least DOCS_MIN_WORDS words in each file; one that does not parse has none."""
    result = []
    with warnings.catch_warnings(action="ignore"):  # of invalid escapes in other people's strings
        for path in files:
            tree: ast.AST = ast.Module([], [])
            with contextlib.suppress(OSError, SyntaxError, ValueError, RecursionError, MemoryError):
                tree = ast.parse(Path(path).read_bytes())
            texts = (t for t in _docstrings(tree) if len(t.split()) >= DOCS_MIN_WORDS)
            result.append([inspect.cleandoc(t).encode("utf-8", "replace").decode() for t in texts])
    return result


def _docstrings(tree: ast.AST) -> Iterator[str]:
    """Yields the docstrings of modules, classes and functions, and those that `add_newdoc` is given, in text order."""
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

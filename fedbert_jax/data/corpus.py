"""Reads documents from docstrings of installed packages, text files and tables, or a Hugging Face dataset."""

from __future__ import annotations

import collections
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedbert_jax.config import DataConfig
from fedbert_jax.data.docs import DOCS_MIN_WORDS, read_docstrings
from fedbert_jax.data.files import find_files
from fedbert_jax.data.hub import read_dataset, read_saved
from fedbert_jax.data.lines import read_lines
from fedbert_jax.data.names import ClientNames, printable
from fedbert_jax.data.rows import LeftOut, listed
from fedbert_jax.data.tables import read_table, table_format
from fedbert_jax.errors import UserError

TOLD_EVERY = 0.1  # minimum seconds between two reports of how many documents have been read

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Document:
    """A piece of text that is never divided between clients, nor between training and held-out text."""

    text: str
    group: str  # the natural client it comes from


def read_documents(
    data: DataConfig, *, warn: Callable[[str], None] = log.warning, count: Callable[[int], None] = lambda _: None
) -> Iterator[Document]:
    """Yields every document of `data.source`, in an order that depends on the source alone.

    `docs:[PACKAGE,...]` reads docstrings, with one group per package. `text:GLOB` reads what `find_files` finds: plain text,
    and tables (JSON, CSV, parquet, saved datasets), in which each row is a document. `hf:NAME[/CONFIG]` reads a dataset, see
    `split_dataset_name`. `ClientNames` names the groups.

    Args:
      data: says where the text is, and what a document is.
      warn: called with a sentence each about files that were passed over and, at the end, rows left out and clients without
        text.
      count: called now and then, and at the end, with the number of documents read so far.

    Raises:
      UserError: naming the key, file, line, row, byte or column that cannot be read, or if there is no text.
    """
    kind, _, what = data.source.partition(":")
    min_words = DOCS_MIN_WORDS if kind == "docs" else 1
    left_out, names = LeftOut(), ClientNames()
    documents: Iterable[Document] = (Document(text, names(group)) for text, group in _read(kind, what, data, left_out, warn))
    kept, told = 0, time.monotonic()
    holders: set[str] = set()
    for document in documents:
        if len(document.text.split(None, min_words - 1)) >= min_words:  # doesn't list all words of a long line
            yield document
            kept += 1
            holders.add(document.group)
        if time.monotonic() - told >= TOLD_EVERY:
            count(kept)
            told = time.monotonic()
    count(kept)
    if not kept:
        words = "a word" if min_words == 1 else f"{min_words} words"
        why = "".join(f"; {sentence.removesuffix('.')}" for sentence in left_out.sentences())
        part = f" in data.split={data.split!r}" if kind == "hf" else ""
        raise UserError(f"data.source={data.source!r} has no text{part}: no document in it has {words}{why}.")
    for sentence in left_out.sentences():
        warn(sentence)
    if without := [client for client in names.given() if client not in holders]:
        warn(f"{len(without):,} client{'s have' if len(without) > 1 else ' has'} no text: {listed(without)}.")


def _read(
    kind: str, what: str, data: DataConfig, left_out: LeftOut, warn: Callable[[str], None]
) -> Iterator[tuple[str, str]]:
    """Yields each document's text and group."""
    if kind == "docs":
        return read_docstrings(what, data)
    if kind == "hf":
        return _join(read_dataset(what, data, left_out, warn), data, "\n\n", lambda row: True)
    files = find_files(what, warn)
    if data.split != "train" and not any(path.is_dir() for path in files):
        raise UserError(f"data.split={data.split!r}: data.source={data.source!r} has no splits; accepted: 'train'.")
    return _read_text(files, data, left_out)


def _join(
    parts: Iterable[tuple[str, str]], data: DataConfig, between: str, starts: Callable[[str], object]
) -> Iterator[tuple[str, str]]:
    """Joins parts of text into documents: a new one begins at `data.document_start` (or `starts`) and with a new group."""
    if data.document_start:
        starts = _pattern("data.document_start", data.document_start).match
    held: list[str] = []
    current = ""
    for text, group in parts:
        if held and (group != current or starts(text)):
            yield between.join(held).strip(), current
            held = []
        held.append(text)
        current = group
    if held:
        yield between.join(held).strip(), current


def _pattern(key: str, value: str) -> re.Pattern[str]:
    try:
        return re.compile(value)
    except re.error as error:
        raise UserError(f"{key}={value!r} is not a regular expression: {error}.") from error


def _read_text(files: Sequence[Path], data: DataConfig, left_out: LeftOut) -> Iterator[tuple[str, str]]:
    blank_lines = data.documents == "blank_lines"
    for path, client in _clients(files, data, left_out):
        if not data.client_field or not (path.is_dir() or table_format(path)):
            yield "", client  # so that a client with only empty files is known, too
        if path.is_dir() or table_format(path):
            rows = (read_saved if path.is_dir() else read_table)(path, client, data, left_out)
            yield from _join(rows, data, "\n\n", lambda row: True)
        else:
            lines = ((line, client) for line in read_lines(path))
            yield from _join(lines, data, "\n", lambda line: blank_lines and (not line or line.isspace()))


def _clients(files: Sequence[Path], data: DataConfig, left_out: LeftOut) -> Iterator[tuple[Path, str]]:
    """Yields each file and its client: what `data.client_pattern` finds in its name or, without a pattern, its folder."""
    if not data.client_pattern:
        folders = {path: Path(os.path.abspath(path if path.is_dir() else path.parent)) for path in files}
        names = _folder_names(set(folders.values()))
        yield from ((path, names[folder]) for path, folder in folders.items())
        return
    pattern = _pattern("data.client_pattern", data.client_pattern)
    shown = f"data.client_pattern={data.client_pattern!r}"
    if not pattern.groups:
        raise UserError(f"{shown} has no (group) to take the client's name from.")
    for path in files:
        match = pattern.search(path.name)
        client = (match[1] or "").strip() if match else ""
        if client:
            yield path, client
        elif data.missing_client == "drop":
            left_out.add("file", f"in whose name {shown} finds no client", printable(str(path)))
        else:
            why = "finds nothing in" if match else "does not match"
            way_out = "data.missing_client='drop' leaves such files out"
            raise UserError(f"{shown} {why} the file name of {printable(str(path))}; {way_out}.")


def _folder_names(folders: set[Path]) -> dict[Path, str]:
    """Names each folder: by its own name or, if two share one, by its path below the common parent of all folders."""
    counts = collections.Counter(folder.name for folder in folders)
    common = os.path.commonpath(folders)
    below = {f: os.path.relpath(f, common) for f in folders}
    return {f: (f.name or str(f)) if counts[f.name] == 1 or below[f] == "." else below[f] for f in folders}

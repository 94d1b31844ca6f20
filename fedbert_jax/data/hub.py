"""`hf:` sources: datasets of the hub, in a local folder or file, or saved by the datasets library's `save_to_disk`."""

from __future__ import annotations

import dataclasses
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fedbert_jax.config import DataConfig
from fedbert_jax.data.arrow import ROWS_AT_ONCE, arrow_rows, undamaged
from fedbert_jax.data.files import is_saved_dataset
from fedbert_jax.data.library import loading
from fedbert_jax.data.lines import read_lines
from fedbert_jax.data.names import printable
from fedbert_jax.data.rows import LeftOut, column, listed, texts_and_clients
from fedbert_jax.data.tables import read_table, table_format
from fedbert_jax.errors import UserError

# `datasets` is imported in functions: it takes a second, and only these sources need it.


def split_dataset_name(what: str) -> tuple[str, str | None]:
    """Returns NAME and CONFIG: NAME is a file, the longest beginning that is a directory, or else OWNER/NAME of the hub."""
    parts = os.path.expanduser(what).rstrip("/").split("/")
    for end in range(len(parts), 0, -1):
        name = "/".join(parts[:end])
        if os.path.isdir(name) or (end == len(parts) and os.path.isfile(name)):
            return name, "/".join(parts[end:]) or None
    if parts[0] in ("", ".", "..") or (len(parts) == 1 and table_format(Path(parts[0]))):
        raise UserError(f"data.source='hf:{printable(what)}': there is no such file or directory.")
    return "/".join(parts[:2]), "/".join(parts[2:]) or None


def read_dataset(what: str, data: DataConfig, left_out: LeftOut) -> Iterator[tuple[str, str]]:
    """Yields the text and client of each row of `data.split` of the dataset that `split_dataset_name` finds.

    Without `data.client_field` the client is the dataset: a local one goes by the name of its file or folder.

    Raises:
      UserError: if it cannot be loaded, lacks a column or the split, or has a row that `texts_and_clients` refuses.
    """
    name, config = split_dataset_name(what)
    path = Path(name)
    source = f"data.source='hf:{printable(what)}'"
    client = path.absolute().name if path.exists() else what
    if path.is_file():
        if data.split != "train":
            raise UserError(f"data.split={data.split!r}: {source} is one file; accepted: train, which is all of it.")
        yield from _read_files([path], client, data, left_out)
    elif path.is_dir() and not config and is_saved_dataset(os.listdir(path)):
        yield from read_saved(path, client, data, left_out)
    else:
        splits = _files(name, config, source) if path.is_dir() else {}
        if splits and data.split.isidentifier():
            _parts(data.split, dict.fromkeys(splits, 0), source)
        if data.split in splits:
            yield from _read_files(splits[data.split], client, data, left_out)
        else:
            yield from _read_loaded(name, config, client, data, left_out, source)


def read_saved(folder: Path, client: str, data: DataConfig, left_out: LeftOut) -> Iterator[tuple[str, str]]:
    """Yields the text and client of each row of `data.split` in a folder that `save_to_disk` made.

    Raises:
      UserError: if it is damaged, lacks a column or the split, or has a row that `texts_and_clients` refuses.
    """
    import datasets

    shown = printable(str(folder))
    with loading(shown):
        saved = datasets.load_from_disk(str(folder))
    if isinstance(saved, datasets.Dataset):  # is all there is, even if it once was a split
        saved = {"train": saved, str(saved.split or "train"): saved}
    for name, start, end in _parts(data.split, {name: len(table) for name, table in saved.items()}, shown):
        yield from _read_rows(saved[name], start, end, f"{shown} {name}", client, data, left_out)


def _read_loaded(
    name: str, config: str | None, client: str, data: DataConfig, left_out: LeftOut, source: str
) -> Iterator[tuple[str, str]]:
    """Reads what only the datasets library can, through its cache."""
    import datasets

    with loading(source):
        builder = datasets.load_dataset_builder(name, config)
        if hasattr(builder.config, "converters"):  # CSV: pandas would take NA for nothing and 007 for 7
            as_written = {column: str for column in (data.text_field, data.client_field) if column}
            builder = datasets.load_dataset_builder(name, config, converters=as_written, na_filter=False)
        builder.download_and_prepare()
        lengths = {split: info.num_examples for split, info in builder.info.splits.items()}
    for split, start, end in _parts(data.split, lengths, source):
        with loading(source):
            table = builder.as_dataset(split=split)
        yield from _read_rows(table, start, end, f"{source} {split}", client, data, left_out)


def _read_rows(
    table: Any, start: int, end: int, where: str, client: str, data: DataConfig, left_out: LeftOut
) -> Iterator[tuple[str, str]]:
    """Reads rows of a `datasets.Dataset`; numbers begin at 1, and count from its beginning."""
    schema = table.features.arrow_schema
    columns = [name for name in dict.fromkeys([data.text_field, data.client_field]) if name in schema.names]
    with undamaged(where, "Arrow"):
        batches = table.with_format("arrow", columns=columns).select(range(start, end)).iter(ROWS_AT_ONCE)
        rows = ((start + number, text, owner) for number, text, owner in arrow_rows(schema, batches, where, data))
        yield from texts_and_clients(rows, f"{where} row", client, data, left_out)


def _parts(split: str, lengths: Mapping[str, int], where: str) -> list[tuple[str, int, int]]:
    """Returns name, first row and end of each part that `data.split` asks for; `test+train[:10%]` asks for two."""
    import datasets

    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        have = f"{where} has {listed(list(lengths))}"
        raise UserError(f"data.split={split!r}: {have}; accepted: these, or a part, as in train[:10%].") from error
    return [(part.splitname, part.from_, part.to) for part in parts]


# --- files ---


def _files(name: str, config: str | None, source: str) -> dict[str, list[Path]]:
    """Returns the files of each split of a local dataset if they can be read here, else {}.

    The datasets library knows which files belong to which split. But it reads them into a cache on disk, cannot tell file
    and line of what is wrong in them, and lets pandas guess at the types of CSV.
    """
    import datasets

    with tempfile.TemporaryDirectory() as cache, loading(source):
        builder = datasets.load_dataset_builder(name, config, cache_dir=cache)
    settings, usual = builder.config, type(builder.config)()
    own = {"name", "version", "data_dir", "data_files", "description"}
    fields = {field.name for field in dataclasses.fields(settings)} - own
    special = {field for field in fields if getattr(settings, field) != getattr(usual, field)}
    files = {str(split): [Path(file) for file in found] for split, found in (settings.data_files or {}).items()}
    every = [file for found in files.values() for file in found]
    if all(re.search(r"\.tsv(\.gz)?$", file.name, re.IGNORECASE) for file in every):
        special -= {"sep"}
    known = all(file.is_file() and (table_format(file) or _is_text(file)) for file in every)
    return files if known and not special and builder.info.features is None else {}


def _is_text(path: Path) -> bool:
    return path.name.lower().removesuffix(".gz").endswith(".txt")


def _read_files(files: Iterable[Path], client: str, data: DataConfig, left_out: LeftOut) -> Iterator[tuple[str, str]]:
    """Reads files as the datasets library understands them: each line of plain text is a row of a column called text."""
    for path in files:
        if table_format(path):
            yield from read_table(path, client, data, left_out)
            continue
        where = printable(str(path))
        column(["text"], "data.text_field", data.text_field, where)
        if data.client_field:
            column(["text"], "data.client_field", data.client_field, where)
        lines = ((number, line, None) for number, line in enumerate(read_lines(path), 1))
        yield from texts_and_clients(lines, f"{where} line", client, data, left_out)

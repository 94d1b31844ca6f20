"""Reads `hf:` sources: datasets on the hub, in a local folder or file, or saved by the datasets library's `save_to_disk`."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedbert_jax.config import DataConfig
from fedbert_jax.data.arrow import ROWS_AT_ONCE, arrow_rows, undamaged
from fedbert_jax.data.files import find_files, is_saved_dataset
from fedbert_jax.data.library import loading
from fedbert_jax.data.lines import read_lines
from fedbert_jax.data.names import LONGEST, printable, shortened
from fedbert_jax.data.rows import LeftOut, Row, column, listed, texts_and_clients
from fedbert_jax.data.tables import table_format, table_rows
from fedbert_jax.errors import UserError

GLUE = "nyu-mll/glue"  # not its older name `glue`, since a folder of that name in the working directory would take its place

# `datasets` is imported in functions: it takes a second, and only these sources need it.


def split_dataset_name(what: str) -> tuple[str, str | None]:
    """Returns NAME and CONFIG. NAME is a file, else the longest prefix that is a directory, else OWNER/NAME on the hub."""
    parts = os.path.expanduser(what).rstrip("/").split("/")
    looks_like_file = bool(table_format(Path(parts[-1])))
    for end in range(len(parts), 0, -1):
        name = "/".join(parts[:end])
        if os.path.isfile(name) and end == len(parts):
            return name, None
        if os.path.isdir(name):
            if looks_like_file and end < len(parts):
                break
            return name, "/".join(parts[end:]) or None
    if parts[0] in ("", ".", "..") or (looks_like_file and len(parts) != 2) or os.path.isdir(parts[0]):
        raise UserError(f"data.source='hf:{shortened(what, LONGEST)}': there is no such file or directory.")
    return "/".join(parts[:2]), "/".join(parts[2:]) or None


def read_dataset(what: str, data: DataConfig, left_out: LeftOut, warn: Callable[[str], None]) -> Iterator[tuple[str, str]]:
    """Yields the text and client of each row of `data.split` of the dataset that `split_dataset_name` finds.

    Without `data.client_field` the whole dataset is one client; a local one is named after its file or directory.

    Args:
      what: what follows `hf:`.
      data: names the columns and the split.
      left_out: records rows left out.
      warn: called with a sentence about files in a directory that are in none of its splits.

    Raises:
      UserError: if it cannot be loaded, lacks a column or the split, or has a row that `texts_and_clients` refuses.
    """
    name, config = split_dataset_name(what)
    source = f"data.source='hf:{shortened(what, LONGEST)}'"
    path = Path(os.path.abspath(name))
    if not path.exists():
        yield from _read_loaded(name, config, what, data, left_out, source)
    elif path.is_file():
        if data.split != "train":
            raise UserError(f"data.split={data.split!r}: {source} is one file; accepted: train, which is all of it.")
        yield from _read_piece(path, 0, None, path.name, data, left_out)
    elif not config and is_saved_dataset(os.listdir(path)):
        yield from read_saved(path, path.name, data, left_out)
    elif splits := _files(path, config, source):
        _warn_of_others(path, splits, source, warn)
        for file, start, end in _pieces(splits, data, source):
            yield from _read_piece(file, start, end, path.name, data, left_out)
    else:
        yield from _read_loaded(str(path), config, path.name, data, left_out, source)


def read_saved(folder: Path, client: str, data: DataConfig, left_out: LeftOut) -> Iterator[tuple[str, str]]:
    """Yields the text and client of each row of `data.split` in a folder that `save_to_disk` made.

    Raises:
      UserError: if it is damaged, lacks a column or the split, or has a row that `texts_and_clients` refuses.
    """
    import datasets

    shown = printable(str(folder))
    with loading(shown), tempfile.TemporaryDirectory() as elsewhere:
        plain = Path(elsewhere, "saved")  # a name that is UTF-8, and can't be taken for an address
        plain.symlink_to(folder.absolute())
        saved = datasets.load_from_disk(str(plain))
    if isinstance(saved, datasets.Dataset):  # it is all there is, even if it once was a split
        saved = {"train": saved, str(saved.split or "train"): saved}
    for name, start, end in _parts(data.split, {name: len(table) for name, table in saved.items()}, shown):
        yield from _read_rows(saved[name], start, end, f"{shown} {name}", client, data, left_out)


def _read_loaded(
    name: str, config: str | None, client: str, data: DataConfig, left_out: LeftOut, source: str
) -> Iterator[tuple[str, str]]:
    """Reads, through the datasets library's cache, what only that library can read."""
    import datasets

    with loading(source):
        builder = datasets.load_dataset_builder(name, config)
        if hasattr(builder.config, "converters"):  # CSV: pandas would read NA as null and 007 as 7
            as_written = {column: str for column in (data.text_field, data.client_field) if column}
            builder = datasets.load_dataset_builder(name, config, converters=as_written, na_filter=False)
        if data.streaming:
            tables = builder.as_streaming_dataset()
    if data.streaming:
        for split, start, end in _rows_by_number(data.split, list(tables), source):
            yield from _read_streamed(tables[split], start, end, f"{source} {split}", client, data, left_out)
        return
    with loading(source):
        # Local files are always read again, since with settings given the library doesn't notice when they change.
        fresh = "reuse_cache_if_exists" if os.path.isdir(name) else None
        builder.download_and_prepare(download_mode=fresh)
        lengths = {split: info.num_examples for split, info in builder.info.splits.items()}
    for split, start, end in _parts(data.split, lengths, source):
        with loading(source):
            table = builder.as_dataset(split=split)
        yield from _read_rows(table, start, end, f"{source} {split}", client, data, left_out)


def _read_rows(
    table: Any, start: int, end: int, where: str, client: str, data: DataConfig, left_out: LeftOut
) -> Iterator[tuple[str, str]]:
    """Reads rows of a `datasets.Dataset`; their numbers begin at 1 and count from its beginning."""
    schema = table.features.arrow_schema
    columns = [name for name in dict.fromkeys([data.text_field, data.client_field]) if name in schema.names]
    with undamaged(where, "Arrow"):
        batches = table.with_format("arrow", columns=columns).select(range(start, end)).iter(ROWS_AT_ONCE)
        rows = ((start + number, text, owner) for number, text, owner in arrow_rows(schema, batches, where, data))
        yield from texts_and_clients(rows, f"{where} row", client, data, left_out)


def _read_streamed(
    stream: Any, start: int, end: int | None, where: str, client: str, data: DataConfig, left_out: LeftOut
) -> Iterator[tuple[str, str]]:
    """Reads rows of a `datasets.IterableDataset` as `_read_rows` does, while they arrive."""
    features = stream.features  # None for some formats, until the first row has been read
    part = stream.skip(start) if start else stream
    batches = _while_loading((part if end is None else part.take(end - start)).with_format("arrow"), where)
    first = next(batches, None)
    if first is None:
        return
    schema = first.schema if features is None else features.arrow_schema
    with undamaged(where, "Arrow"):
        rows = arrow_rows(schema, itertools.chain([first], batches), where, data)
        yield from texts_and_clients(((start + n, *row) for n, *row in rows), f"{where} row", client, data, left_out)


def _while_loading(stream: Any, where: str) -> Iterator[Any]:
    """Yields the tables of a stream; what it raises and says is dealt with as by `loading`, even in the midst of it."""
    batches = stream.iter(ROWS_AT_ONCE)
    while True:
        with loading(where):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def _rows_by_number(split: str, names: Sequence[str], where: str) -> list[tuple[str, int, int | None]]:
    """Returns what `_parts` does, for splits of unknown length; an end of None is the split's end."""
    found = []
    for part in [split] if split in names else split.split("+"):
        match = re.fullmatch(r"\s*([^\[\]]+?)\s*(?:\[(\d*):(\d*)\])?\s*", part)
        if not match or match[1] not in names:
            raise UserError(
                f"data.split={split!r}: {where} has {listed(names)}; accepted with data.streaming=True: these, or rows "
                "of them counted from the beginning, as in train[:1000000]."
            )
        found.append((match[1], int(match[2] or 0), int(match[3]) if match[3] else None))
    return found


def _parts(split: str, lengths: Mapping[str, int], where: str) -> list[tuple[str, int, int]]:
    """Returns the name, first row and end of each part that `data.split` asks for; `test+train[:10%]` asks for two."""
    import datasets

    if split in lengths:
        return [(split, 0, lengths[split])]
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    except (ValueError, AssertionError) as error:
        have = f"{where} has {listed(list(lengths))}"
        raise UserError(
            f"data.split={split!r}: {have}; accepted: these, a part, as in train[:10%], or several with + between."
        ) from error
    return [(part.splitname, part.from_, part.to) for part in parts]


# --- files ---


def _files(path: Path, config: str | None, source: str) -> dict[str, list[Path]]:
    """Returns the files of each split of a local dataset if they can be read here, else {}.

    The datasets library knows which files belong to which split. But it reads them into a cache on disk, cannot name the
    file and line of a mistake, and guesses types: CSV's 007 becomes 7, and JSON's "2024-01-31" a time.
    """
    import datasets

    if re.search(r"[\udc80-\udcff[\]*?]|::|://", str(path)):
        refused = "[ ] * ? :: or letters that are not UTF-8"
        raise UserError(f"{source}: the datasets library cannot look into a path with {refused}; accepted: other names.")
    with tempfile.TemporaryDirectory() as cache, loading(source):
        builder = datasets.load_dataset_builder(str(path), config, cache_dir=cache)
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


def _warn_of_others(path: Path, splits: Mapping[str, Sequence[Path]], source: str, warn: Callable[[str], None]) -> None:
    """Warns of files that a search of the directory finds but the datasets library doesn't: behind links, in capitals."""
    taken = {os.path.realpath(file) for files in splits.values() for file in files}
    others = [file for file in find_files(str(path), lambda _: None) if os.path.realpath(file) not in taken]
    names = [str(file.relative_to(path)) for file in others if file.name.lower() != "readme.md"]
    if names:
        things = "files that are" if len(names) > 1 else "file that is"
        warn(f"{source} passes over {len(names):,} {things} in none of its splits: {listed(names)}.")


def _pieces(splits: Mapping[str, Sequence[Path]], data: DataConfig, source: str) -> Iterator[tuple[Path, int, int | None]]:
    """Yields the rows that `data.split` asks for as file, first row and end; an end of None is the file's end."""
    if data.split in splits:
        yield from ((file, 0, None) for file in splits[data.split])
        return
    wanted = {split: files if split in data.split else [] for split, files in splits.items()}  # the others aren't read
    sizes = {split: [sum(1 for _ in _rows(file, data)[1]) for file in files] for split, files in wanted.items()}
    for split, start, end in _parts(data.split, {split: sum(counts) for split, counts in sizes.items()}, source):
        for file, size in zip(splits[split], sizes[split], strict=True):
            if start < size and end > 0:
                yield file, max(start, 0), min(end, size)
            start, end = start - size, end - size


def _read_piece(
    path: Path, start: int, end: int | None, client: str, data: DataConfig, left_out: LeftOut
) -> Iterator[tuple[str, str]]:
    where, rows = _rows(path, data)
    return texts_and_clients(itertools.islice(rows, start, end), where, client, data, left_out)


def _rows(path: Path, data: DataConfig) -> tuple[str, Iterator[Row]]:
    """Returns a file's rows as the datasets library reads them: a line of plain text is a row with one column, `text`."""
    if table_format(path):
        return table_rows(path, data)
    where = printable(str(path))
    column(["text"], "data.text_field", data.text_field, where)
    if data.client_field:
        column(["text"], "data.client_field", data.client_field, where)
    return f"{where} line", ((number, line, None) for number, line in enumerate(read_lines(path), 1))

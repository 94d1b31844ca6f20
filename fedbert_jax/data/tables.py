"""Reads files of rows: finds out their format, and parses JSON and CSV."""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from fedbert_jax.config import DataConfig
from fedbert_jax.data.arrow import arrow_file_rows, parquet_rows
from fedbert_jax.data.lines import read_lines
from fedbert_jax.data.names import printable
from fedbert_jax.data.rows import Absent, LeftOut, Number, Row, column, listed, texts_and_clients
from fedbert_jax.errors import UserError

LARGEST_CELL = 2**31 - 1  # characters; Python's csv stops at 131,072 unless told, and takes no more than this
_FORMATS = {"jsonl": "json", "ndjson": "json", "json": "json", "csv": "csv", "tsv": "csv"}
_BINARY = {"parquet": "parquet", "arrow": "arrow"}


def table_format(path: Path) -> str:
    """Returns the format of a file of rows by its suffix, in any case; "" for plain text."""
    name = path.name.lower()
    inner = name.removesuffix(".gz")
    formats = _FORMATS | _BINARY if inner == name else _FORMATS  # only text formats are read through .gz
    return formats.get(inner.rpartition(".")[2], "") if "." in inner else ""


def table_rows(path: Path, data: DataConfig) -> tuple[str, Iterator[Row]]:
    """Returns the words that, with a row's number after them, name its place, and the rows of a file with a `table_format`.

    Raises:
      UserError: while the rows are read, naming the file, and the line, item or row.
    """
    unit, rows = _READERS[table_format(path)](path, data)
    return f"{printable(str(path))} {unit}", rows


def read_table(path: Path, client: str, data: DataConfig, left_out: LeftOut) -> Iterator[tuple[str, str]]:
    """Yields the text and client of each row of a file, and raises UserError, as `texts_and_clients` does."""
    where, rows = table_rows(path, data)
    return texts_and_clients(rows, where, client, data, left_out)


# --- JSON ---


class _Repeating(dict[str, Any]):
    """A JSON object in which a name occurs twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    return row if len(row) == len(pairs) else _Repeating(row)


_JSON = json.JSONDecoder(
    object_pairs_hook=_object,
    parse_int=Number,
    parse_float=Number,
    parse_constant=lambda name: None if name == "NaN" else Number(name),  # NaN: pandas' null
)


def _json(path: Path, data: DataConfig) -> tuple[str, Iterator[Row]]:
    """Reads one object per line or, in a .json file, an array of objects."""
    shown = printable(str(path))
    numbered = enumerate(read_lines(path), 1)
    lines: Iterator[tuple[int, str]] = ((number, line) for number, line in numbered if line and not line.isspace())
    accepted = "one object on each line"
    if path.name.lower().removesuffix(".gz").endswith(".json"):
        accepted += ", or an array of objects"
        number, line = first = next(lines, (1, ""))
        if line.lstrip().startswith("["):
            try:
                items = _JSON.decode("\n".join([line, *(line for _, line in numbered)]))
            except (ValueError, RecursionError) as error:
                number += getattr(error, "lineno", 1) - 1
                raise UserError(f"{shown} line {number} is not JSON; accepted: {accepted}.") from error
            return "item", _fields(enumerate(items, 1), f"{shown} item", accepted, data)
        lines = itertools.chain([first] if line else [], lines)
    return "line", _fields(((number, _parsed(line)) for number, line in lines), f"{shown} line", accepted, data)


def _parsed(line: str) -> Any:
    with contextlib.suppress(ValueError, RecursionError):
        return _JSON.decode(line)
    return None


def _fields(rows: Iterable[tuple[int, Any]], where: str, accepted: str, data: DataConfig) -> Iterator[Row]:
    text, client = data.text_field, data.client_field
    for number, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{where} {number} is not a JSON object; accepted: {accepted}.")
        if isinstance(row, _Repeating):
            raise UserError(f"{where} {number} has a field twice; there are: {listed(list(row))}.")
        there = None if text in row and (not client or client in row) else Absent(list(row))
        yield number, row.get(text, there), row.get(client, there)


# --- CSV ---


def _csv_rows(path: Path, data: DataConfig) -> Iterator[Row]:
    """Reads a header and cells as pandas and spreadsheets write them; all cells are text, whatever they look like."""
    shown = printable(str(path))
    lines = (line + "\n" for line in read_lines(path))  # a quoted cell keeps its line ends
    first = next(lines, "")
    separators = "\t" if path.name.lower().removesuffix(".gz").endswith(".tsv") else ",;\t"
    fitting = (c for c in separators if data.text_field in _stripped(next(csv.reader([first], delimiter=c), [])))
    separator = next(fitting, separators[0])
    csv.field_size_limit(LARGEST_CELL)
    reader = csv.reader(itertools.chain([first] if first else [], lines), delimiter=separator, strict=True)
    start = 1
    try:
        header = _stripped(next(reader, []))
        if not header:
            return
        text = column(header, "data.text_field", data.text_field, shown)
        client = column(header, "data.client_field", data.client_field, shown) if data.client_field else None
        start = reader.line_num + 1
        for cells in reader:
            if any(cells[len(header) :]):
                raise UserError(
                    f"{shown} line {start} has {len(cells)} cells, but the header has {len(header)}; "
                    f"a cell that holds {separator!r} needs quotation marks around it."
                )
            if cells:  # an empty line is not a row
                row: list[str | None] = cells + [None] * (len(header) - len(cells))
                yield start, row[text], None if client is None else row[client]
            start = reader.line_num + 1
    except csv.Error as error:
        open_end = "unexpected end" in str(error)
        why = "begins a quoted cell that never ends" if open_end else "has a quotation mark where a quoted cell goes on"
        raise UserError(f'{shown}: the row of line {start} {why}; accepted: "" for a quotation mark in quotes.') from error


def _stripped(cells: list[str]) -> list[str]:
    return [cell.strip() for cell in cells]


_READERS: dict[str, Callable[[Path, DataConfig], tuple[str, Iterator[Row]]]] = {
    "json": _json,
    "csv": lambda path, data: ("line", _csv_rows(path, data)),
    "parquet": lambda path, data: ("row", parquet_rows(path, data)),
    "arrow": lambda path, data: ("row", arrow_file_rows(path, data)),
}

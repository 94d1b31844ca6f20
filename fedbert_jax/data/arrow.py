"""Rows of parquet files, of Arrow files and of the datasets library's tables, which are Arrow too."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedbert_jax.config import DataConfig
from fedbert_jax.data.names import printable
from fedbert_jax.data.rows import Row, column
from fedbert_jax.errors import UserError

if TYPE_CHECKING:  # pyarrow comes with the datasets library, and few sources need it
    import pyarrow as pa

ROWS_AT_ONCE = 1000  # how many rows are Python objects at a time


def parquet_rows(path: Path, data: DataConfig) -> Iterator[Row]:
    """Yields the rows of a parquet file; raises UserError for one that cannot be read or lacks a column."""
    from pyarrow.parquet import ParquetFile

    shown = printable(str(path))
    with undamaged(shown, "parquet"), path.open("rb") as file, ParquetFile(file) as table:
        columns = [name for name in (data.text_field, data.client_field) if name]
        yield from arrow_rows(table.schema_arrow, table.iter_batches(ROWS_AT_ONCE, columns=columns), shown, data)


def arrow_file_rows(path: Path, data: DataConfig) -> Iterator[Row]:
    """Yields the rows of an Arrow file in either of its two forms, as `parquet_rows` does."""
    import pyarrow as pa

    shown = printable(str(path))
    with undamaged(shown, "Arrow"), path.open("rb") as file:
        if file.read(6) == b"ARROW1":
            whole = pa.ipc.open_file(file)
            batches = (whole.get_batch(i) for i in range(whole.num_record_batches))
            yield from arrow_rows(whole.schema, batches, shown, data)
        else:  # a stream, as the datasets library writes them
            file.seek(0)
            stream = pa.ipc.open_stream(file)
            yield from arrow_rows(stream.schema, stream, shown, data)


@contextlib.contextmanager
def undamaged(shown: str, kind: str) -> Iterator[None]:
    """Turns what pyarrow raises while it reads the file `shown` into UserError."""
    import pyarrow as pa

    try:
        yield
    except OSError as error:
        why = f": {error.strerror}" if error.strerror else f" as {kind}: it is damaged, or something else"
        raise UserError(f"{shown} cannot be read{why}.") from error
    except pa.ArrowException as error:
        raise UserError(f"{shown} cannot be read as {kind}: it is damaged, or something else.") from error


def arrow_rows(
    schema: pa.Schema, tables: Iterable[pa.Table | pa.RecordBatch], where: str, data: DataConfig
) -> Iterator[Row]:
    """Yields the rows of Arrow tables; a client that is a class label in the schema goes by the label's name.

    Raises:
      UserError: if a column is missing or there twice, or a text is not UTF-8.
    """
    import pyarrow as pa

    column(schema.names, "data.text_field", data.text_field, where)
    if data.client_field:
        column(schema.names, "data.client_field", data.client_field, where)
    labels = _labels(schema, data.client_field)
    number = 0
    for table in tables:
        columns = [table.column(name) for name in (data.text_field, data.client_field) if name]
        try:
            for values in columns:
                values.validate(full=True)  # otherwise, damage in an Arrow file can crash the process
        except pa.ArrowInvalid as error:
            rows = f"rows {number + 1:,} to {number + table.num_rows:,}"
            raise UserError(f"{where} is damaged or has text that is not UTF-8, somewhere in its {rows}.") from error
        texts = columns[0].to_pylist()
        clients = columns[1].to_pylist() if data.client_field else [None] * len(texts)
        for text, client in zip(texts, clients, strict=True):
            number += 1
            yield number, text, labels.get(client, client) if labels else client


def _labels(schema: pa.Schema, wanted: str) -> dict[Any, str | None]:
    """Returns the names of a column's class labels, which the datasets library writes into the schema; {} if none."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        feature = json.loads(schema.metadata[b"huggingface"])["info"]["features"][wanted]
        if feature["_type"] == "ClassLabel":
            return {-1: None, **dict(enumerate(feature["names"]))}  # it writes -1 for a missing label
    return {}

"""Reads the lines of a text file, plain or gzipped, at a cost proportional to its size whatever its lines are."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path

from fedbert_jax.data.names import printable
from fedbert_jax.errors import UserError

_CHUNK = 1 << 20  # bytes read at a time


def read_lines(path: Path) -> Iterator[str]:
    r"""Yields the lines of UTF-8 text without their ends, which are \n, \r\n or \r, even mixed, and without a BOM.

    Raises:
      UserError: naming the file, and the line and byte that are not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    translator = io.IncrementalNewlineDecoder(decoder, translate=True)  # handles a \r\n divided between two chunks
    started: list[str] = []  # the parts of the last line so far; joined once, when it ends
    number, before, at_start = 1, 0, True
    for chunk in _chunks(path):
        try:
            text = translator.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            byte = before - (len(error.object) - len(chunk)) + error.start  # the chunk was appended to what was left over
            read = "\r" * (translator.getstate()[1] & 1) + error.object[: error.start].decode()  # & 1: a pending \r
            number += read.replace("\r\n", "\n").replace("\r", "\n").count("\n")
            if not before and chunk.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise UserError(f"{printable(str(path))} is UTF-16 text; accepted: UTF-8.") from error
            raise UserError(
                f"{printable(str(path))} is not UTF-8 text: byte {byte} of the file, in line {number}, cannot be decoded."
            ) from error
        if text and at_start:
            text, at_start = text.removeprefix("\ufeff"), False
        before += len(chunk)
        first, *rest = text.split("\n")
        started.append(first)
        if rest:
            yield "".join(started)
            yield from rest[:-1]
            started = rest[-1:]
            number += len(rest)
    last = "".join(started)
    if last:
        yield last


def _chunks(path: Path) -> Iterator[bytes]:
    """Yields the file's bytes in chunks, and an empty chunk at its end."""
    try:
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                yield chunk
        yield b""
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{printable(str(path))} is no gzip file, or a damaged one.") from error
    except OSError as error:
        raise UserError(f"{printable(str(path))} cannot be read: {error.strerror or error}.") from error

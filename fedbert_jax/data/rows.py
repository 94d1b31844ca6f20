"""Checks what a row of any table must have, whatever its format: text, and a client if one is asked for."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedbert_jax.config import DataConfig
from fedbert_jax.data.names import shortened
from fedbert_jax.errors import UserError

NAMED = 20  # how many of the existing columns an error names

Row = tuple[int, Any, Any]  # the number of its line, item or row; then its text and its client, as the file has them

_SURROGATES = re.compile("[\ud800-\udfff]")  # JSON can hold these, and UTF-8 cannot


@dataclass(frozen=True)
class Absent:
    """Stands for the value of a field that a row lacks."""

    there: Sequence[str]  # the fields it has


class Number(str):
    """A number as its file writes it: 1.10 stays 1.10, and one of 5,000 digits is no problem."""

    __slots__ = ()


@dataclass
class LeftOut:
    """Counts what reading leaves out, and remembers where each kind first occurred."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    first: dict[tuple[str, str], str] = field(default_factory=dict)

    def add(self, thing: str, why: str, where: str) -> None:
        """Counts a row or file."""
        self.counts[thing, why] += 1
        self.first.setdefault((thing, why), where)

    def sentences(self) -> list[str]:
        """Returns a sentence for each kind of thing left out."""
        return [
            f"left out {count:,} {thing}{'s' if count > 1 else ''} {why}; the first is {self.first[thing, why]}."
            for (thing, why), count in self.counts.items()
        ]


def column(names: Sequence[str], key: str, wanted: str, where: str) -> int:
    """Returns the index of a column; raises UserError if there is no such column, or more than one."""
    if names.count(wanted) != 1:
        many = "more than one" if wanted in names else "no"
        raise UserError(f"{where} has {many} column {key}={wanted!r}; there are: {listed(names)}.")
    return names.index(wanted)


def listed(names: Sequence[str]) -> str:
    """Returns the first names on one line."""
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return ", ".join(shortened(name) for name in names[:NAMED]) + more


def texts_and_clients(
    rows: Iterable[Row], where: str, client: str, data: DataConfig, left_out: LeftOut
) -> Iterator[tuple[str, str]]:
    """Yields each row's text and client.

    A row with null text is left out and counted. With `data.missing_client='drop'`, so is a row whose client is null, absent
    or empty. A client's name is a text without the space around it, or a number, date, true or false as it is written.

    Args:
      rows: in order.
      where: the words that, with a row's number after them, name its place.
      client: the client of every row, unless `data.client_field` is set.
      data: names the fields.
      left_out: records what is left out.

    Raises:
      UserError: naming the place, if a text is not text, or a client is not a name or is missing.
    """
    for number, text, owner in rows:
        if text is None:
            left_out.add("row", f"whose data.text_field={data.text_field!r} is null", f"{where} {number}")
            continue
        if isinstance(text, Absent):
            fields = listed(text.there)
            raise UserError(f"{where} {number} has no field data.text_field={data.text_field!r}; there are: {fields}.")
        if isinstance(text, Number) or not isinstance(text, str):
            raise UserError(f"{where} {number}: data.text_field={data.text_field!r} is {_kind(text)}, not text.")
        if not text.isascii() and _SURROGATES.search(text):
            text = text.encode("utf-8", "replace").decode()  # tokenizers accept no surrogates
        if data.client_field:
            if isinstance(owner, list | dict | bytes):
                wanted = f"data.client_field={data.client_field!r}"
                raise UserError(f"{where} {number}: {wanted} is {_kind(owner)}, not a name.")
            client, missing = _client(owner, data.client_field)
            if missing and (not text or text.isspace()):
                continue  # there is nothing that a client could hold
            if missing and data.missing_client == "error":
                raise UserError(
                    f"{where} {number} {missing}; accepted: a client in every row, "
                    "or data.missing_client='drop', which leaves out the rows without one."
                )
            if missing:
                why = f"whose data.client_field={data.client_field!r} is null, missing or empty"
                left_out.add("row", f"{why}, by data.missing_client='drop'", f"{where} {number}")
                continue
        yield text, client


def _client(value: Any, wanted: str) -> tuple[str, str]:
    """Returns a client's name and "", or "" and what is wrong with it."""
    if isinstance(value, Absent):
        return "", f"has no field data.client_field={wanted!r} (there are: {listed(value.there)})"
    if value is None or value != value:  # NaN is how pandas writes a missing value
        return "", f"has null for data.client_field={wanted!r}"
    if isinstance(value, bool):
        return str(value).lower(), ""
    name = str(value).strip()
    return name, "" if name else f"has nothing in data.client_field={wanted!r}"


def _kind(value: Any) -> str:
    kinds = {bool: "true or false", list: "a list", dict: "an object", bytes: "bytes"}
    named = (words for kind, words in kinds.items() if isinstance(value, kind))
    return next(named, "a number" if isinstance(value, Number | int | float) else f"a {type(value).__name__}")

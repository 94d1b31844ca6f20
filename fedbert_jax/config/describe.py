"""The help text of each key, taken from the schema's comments so that it is written only once."""

from __future__ import annotations

import ast
import inspect
import io
import textwrap
import tokenize
from collections.abc import Iterator
from typing import Any, NamedTuple

from fedbert_jax.config.keys import flatten, kind_of, sections, to_dict, type_of
from fedbert_jax.config.schema import Config


class Key(NamedTuple):
    """A key as --help shows it."""

    name: str  # dotted
    default: Any
    accepted: str  # in words
    comment: str


def describe() -> Iterator[tuple[str, str, list[Key]]]:
    """Yields each section's dotted name ("" for the outermost), its description, and its keys, in the schema's order."""
    defaults = flatten(to_dict(Config()))
    for section, cls in sections().items():
        dot = section + "." * bool(section)
        comments = _comments(cls)
        names = [name for name in comments if dot + name in defaults]
        keys = [Key(dot + n, defaults[dot + n], kind_of(dot + n), comments[n]) for n in names]
        yield section, " ".join((cls.__doc__ or "").split()), keys


def show_default(key: str) -> str:
    """Returns `key=default` as it may be typed after `--config.` in a shell."""
    default = flatten(to_dict(Config()))[key]
    return f"{key}={_quoted(default, type_of(key))}"


def show_help(width: int | None = None) -> str:
    """Returns every section with its keys: one per line, followed by what it accepts and what it means.

    Args:
      width: where to fold lines, which then continue indented; None: nowhere.
    """
    lines = []
    for section, about, keys in describe():
        lines += ["", f"{section}: {about}" if section else "Keys outside a section:"]
        for key in keys:
            lines.append(f"  {show_default(key.name)}  ({key.accepted}) {key.comment}")
    if width is None:
        return "\n".join(lines)
    return "\n".join(
        textwrap.fill(line, width, subsequent_indent=" " * (6 if line.startswith(" ") else 2), break_on_hyphens=False)
        for line in lines
    )


def _quoted(value: Any, kind: Any) -> str:
    if kind is str or isinstance(value, (str, list)):
        return "'" + ("()" if value == [] else str(value)) + "'"
    return str(value)


def _comments(cls: type) -> dict[str, str]:
    """Returns the comment of each field of a dataclass: the lines just above it, then the comment behind it."""
    source = textwrap.dedent(inspect.getsource(cls))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
    whole_lines = {n for n, line in enumerate(source.splitlines(), 1) if line.lstrip().startswith("#")}
    (body,) = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    found = {}
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first = node.lineno
            while first - 1 in whole_lines:
                first -= 1
            lines = range(first, (node.end_lineno or node.lineno) + 1)
            found[node.target.id] = " ".join(comments[n] for n in lines if n in comments)
    return found

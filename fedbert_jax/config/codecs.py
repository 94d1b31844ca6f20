"""Which codecs there are: the wire's own, and those registered from outside the package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# By name, what makes the channel for a receiver's type; None: `federated.wire` does.
CODECS: dict[str, Callable[[Any], Any] | None] = {"float32": None, "bfloat16": None, "int8": None}


def register_codec(name: str, make: Callable[[Any], Any]) -> None:
    """Adds the codec `wire.codec=name` in this process; call it before the config is read.

    Raises:
      ValueError: if the name can't be printed, another codec has it, or `make` is no function.
    """
    if not (isinstance(name, str) and name.strip() == name != "" and name.isprintable()):
        raise ValueError(f"a codec's name is {name!r}: accepted: text that can be printed, without spaces around it")
    if not callable(make):
        raise ValueError(f"the codec {name!r} is made by {make!r}: accepted: a function of a dtype")
    if name in CODECS and CODECS[name] is not make:
        raise ValueError(f"there is a codec {name!r} already")
    CODECS[name] = make

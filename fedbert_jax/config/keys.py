"""The keys as dotted names: which ones exist, what they accept, and a configuration flattened to them."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from fedbert_jax.config.arrangement import ARRANGEMENTS
from fedbert_jax.config.codecs import CODECS
from fedbert_jax.config.schema import Config
from fedbert_jax.errors import ConfigError

WORDS = {int: "an integer", float: "a number", bool: "true or false", str: "text"}


def to_dict(config: Config) -> dict[str, Any]:
    """Returns a nested plain dict that `from_dict` reads back and JSON can hold."""
    return dataclasses.asdict(config)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns `{"federated.rounds": 3, ...}` for a nested mapping."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            flat.update(flatten(value, key + "."))
        else:
            flat[key] = list(value) if isinstance(value, tuple) else value
    return flat


def replace(config: Config, changes: Mapping[str, Any]) -> Config:
    """Returns the config with new values for dotted keys; validates nothing."""

    def inner(node: Any, changes: Mapping[str, Any]) -> Any:
        fields: dict[str, Any] = {}
        for key, value in changes.items():
            name, _, rest = key.partition(".")
            fields[name] = inner(fields.get(name, getattr(node, name)), {rest: value}) if rest else value
        return dataclasses.replace(node, **fields)

    return typing.cast(Config, inner(config, changes))


def listed(text: str | None) -> list[str]:
    """Returns the parts of a comma-separated value."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def sections(cls: type = Config, prefix: str = "") -> dict[str, type]:
    """Returns every section's class by its dotted name, which is "" for the outermost."""
    found = {prefix: cls}
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            found |= sections(typing.cast(type, kind), _join(prefix, name))
    return found


def all_keys() -> list[str]:
    """Returns every key a config may set, dotted, in the schema's order."""
    return list(_kinds())


def type_of(key: str) -> Any:
    """Returns the type that the schema gives a dotted key, such as `int | None`."""
    return _kinds()[key]


def kind_of(key: str) -> str:
    """Returns in words what type of value a dotted key accepts."""
    if key == "federated.strategy":  # text, since a strategy may be registered from outside
        return " or ".join(dict.fromkeys(repr(name) for name, *_ in ARRANGEMENTS))
    if key == "wire.codec":  # this, too
        return ", ".join(map(repr, [*CODECS][:-1])) + f" or {[*CODECS][-1]!r}"
    found = type_of(key)
    args = typing.get_args(found)
    if typing.get_origin(found) is Literal:
        return ", ".join(map(repr, args[:-1])) + f" or {args[-1]!r}" * (len(args) > 1) if len(args) > 1 else repr(args[0])
    if typing.get_origin(found) is tuple:
        return "a sentence, or several as ('...', '...')"
    if isinstance(found, types.UnionType):
        return "true, false or None" if bool in args else f"{WORDS[args[0]]} or None"
    return WORDS[found]


def unknown_key(key: str) -> ConfigError:
    """Returns the error for an unknown key: which part of it is wrong, what may be meant, and what is accepted there."""
    known, path, names = sections(), "", key.split(".")
    while names and _join(path, names[0]) in known:
        path = _join(path, names.pop(0))
    accepted = ", ".join(_join(path, name) for name in typing.get_type_hints(known[path]))
    if not names:
        return ConfigError(f"config key {key} is a section; accepted: its keys, {accepted}.")
    wrong = _join(path, names[0])
    if wrong in all_keys():
        return ConfigError(f"config key {key} does not exist: {wrong} is no section, but takes {kind_of(wrong)}.")
    meant = _meant(key, path, names)
    hint = f" (did you mean {meant}?)" if meant else ""
    why = f", as there is no section {wrong}" if len(names) > 1 else ""
    return ConfigError(f"config key {key} does not exist{why}{hint}; accepted: {accepted}.")


def _meant(key: str, path: str, names: list[str]) -> str:
    """Returns the key or section that a wrong one resembles, or ""; `names` are its parts below `path`, the first wrong."""
    here = list(typing.get_type_hints(sections()[path]))
    for name in difflib.get_close_matches(names[0].lower(), here, n=1):
        mended = ".".join([_join(path, name), *names[1:]])
        if mended in all_keys() or mended in sections():
            return mended
    same_name = [known for known in all_keys() if known.rpartition(".")[2] == names[-1].lower()]
    alike = [] if path else difflib.get_close_matches(key, all_keys(), n=1, cutoff=0.6)
    return next(iter([*same_name, *alike]), "")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


@functools.cache
def _kinds() -> dict[str, Any]:
    return {
        _join(section, name): kind
        for section, cls in sections().items()
        for name, kind in typing.get_type_hints(cls).items()
        if not dataclasses.is_dataclass(kind)
    }

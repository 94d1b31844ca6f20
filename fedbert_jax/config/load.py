"""Builds a `Config` from a ConfigDict or a plain mapping: the only way in, which refuses unknown keys and wrong types."""

from __future__ import annotations

import ast
import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

import ml_collections
from ml_collections import config_dict

from fedbert_jax.config.check import validate
from fedbert_jax.config.keys import all_keys, kind_of, type_of, unknown_key
from fedbert_jax.config.schema import Config
from fedbert_jax.errors import ConfigError


def default_config() -> ml_collections.ConfigDict:
    """Returns every key with its default, as a ConfigDict that a `configs/*.py` changes and returns."""
    return _to_config_dict(Config)


def _to_config_dict(cls: type) -> ml_collections.ConfigDict:
    result = ml_collections.ConfigDict()
    hints = typing.get_type_hints(cls)
    defaults = cls()
    for f in dataclasses.fields(cls):
        kind, value = hints[f.name], getattr(defaults, f.name)
        if dataclasses.is_dataclass(kind):
            result[f.name] = _to_config_dict(typing.cast(type, kind))
        elif type(None) in typing.get_args(kind):
            inner = next(a for a in typing.get_args(kind) if a is not type(None))
            result[f.name] = value if value is not None else config_dict.placeholder(inner)
        else:
            result[f.name] = value
    return result


def from_dict(values: Mapping[str, Any] | ml_collections.ConfigDict) -> Config:
    """Builds and validates a `Config`.

    Args:
      values: nested mapping of keys to values; keys left out keep their defaults.

    Raises:
      ConfigError: for an unknown key, a value of the wrong type, or a combination that cannot run.
    """
    if isinstance(values, ml_collections.ConfigDict):
        values = values.to_dict()
    config = _build(Config, values, "")
    validate(config)
    return config


def from_text(key: str, text: str) -> Any:
    """Returns the value that a text on the command line means for a key.

    Raises:
      ConfigError: if the key does not exist, or the text is not a value of its type.
    """
    if key not in all_keys():
        raise unknown_key(key)
    wanted = type_of(key)
    if isinstance(wanted, types.UnionType):
        if text.lower() == "none":
            return None
        wanted = next(a for a in typing.get_args(wanted) if a is not type(None))
    if typing.get_origin(wanted) is tuple:
        return _sentences(key, text)
    try:
        if wanted is bool:
            return {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}[text.lower()]
        return wanted(text) if wanted in (int, float) else text
    except (ValueError, KeyError):
        raise ConfigError(f"config key {key}={text!r}: accepted: {kind_of(key)}.") from None


def _sentences(key: str, text: str) -> tuple[str, ...]:
    """Reads a single sentence, or the text of a tuple or list of sentences."""
    try:
        found = ast.literal_eval(text) if text.strip().startswith(("(", "[")) else None
    except (ValueError, SyntaxError):  # a sentence that begins with a bracket
        found = None
    found = (found,) if isinstance(found, str) else found  # ('...') is no tuple to Python
    if found is None:
        return (text,) if text.strip() else ()
    if not isinstance(found, (tuple, list)) or not all(isinstance(sentence, str) for sentence in found):
        raise ConfigError(f"config key {key}={text!r}: accepted: {kind_of(key)}.")
    return tuple(found)


def _build(cls: type, values: Any, prefix: str) -> Any:
    if not isinstance(values, Mapping):
        raise ConfigError(f"config key {prefix.rstrip('.')}={values!r} is a section; accepted: a mapping of its keys.")
    hints = typing.get_type_hints(cls)
    fields = {}
    for name, value in values.items():
        if name not in hints:
            raise unknown_key(prefix + str(name))
        kind = hints[name]
        if dataclasses.is_dataclass(kind):
            fields[name] = _build(typing.cast(type, kind), value, f"{prefix}{name}.")
        else:
            fields[name] = _convert(value, kind, prefix + name)
    return cls(**fields)


def _convert(value: Any, kind: Any, key: str) -> Any:
    args = typing.get_args(kind)
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # a NumPy scalar
        value = value.item()
    if typing.get_origin(kind) is Literal:
        if value not in args:
            raise ConfigError(f"config key {key}={value!r}: accepted: {kind_of(key)}.")
        return value
    if typing.get_origin(kind) in (types.UnionType, typing.Union):  # T | None
        if value is None:
            return None
        kind = next(a for a in args if a is not type(None))
    if typing.get_origin(kind) is tuple:
        value = (value,) if isinstance(value, str) else value
        if not isinstance(value, (tuple, list)) or not all(isinstance(v, args[0]) for v in value):
            raise ConfigError(f"config key {key}={value!r}: accepted: {kind_of(key)}.")
        return tuple(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"config key {key}={value!r} is {type(value).__name__}; accepted: {kind_of(key)}.")
    return value

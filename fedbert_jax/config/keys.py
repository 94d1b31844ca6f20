"""The keys as dotted names: which there are, what they accept, and a configuration flattened to them."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any

from fedbert_jax.config.schema import Config
from fedbert_jax.errors import ConfigError


def to_dict(config: Config) -> dict[str, Any]:
    """Returns the nested plain dict that `from_dict` takes back; JSON can hold it."""
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


def listed(text: str | None) -> list[str]:
    """Returns the parts of a value that holds several, with commas between."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def kind_of(key: str) -> str:
    """Returns in words what type of value a dotted key accepts; "" if words for it are lacking."""
    *sections, name = key.split(".")
    cls: Any = Config
    for section in sections:
        cls = typing.get_type_hints(cls)[section]
    kind = typing.get_type_hints(cls)[name]
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    words = {int: "an integer", float: "a number", bool: "true or false"}
    return next((words[k] for k in kinds if k in words), "")


def all_keys(cls: type = Config, prefix: str = "") -> list[str]:
    """Returns every key a config may set, dotted."""
    keys = []
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            keys += all_keys(typing.cast(type, kind), f"{prefix}{name}.")
        else:
            keys.append(prefix + name)
    return keys


def unknown_key(key: str) -> ConfigError:
    """Returns the error for a key that does not exist, with the nearest that does."""
    near = difflib.get_close_matches(key, all_keys(), n=1, cutoff=0.5)
    group = key.rpartition(".")[0]
    siblings = [k for k in all_keys() if k.rpartition(".")[0] == group]
    if not group or not siblings:
        siblings = sorted({k.split(".")[0] for k in all_keys()})
    accepted = ", ".join(siblings)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return ConfigError(f"config key {key} does not exist{hint}; accepted: {accepted}.")

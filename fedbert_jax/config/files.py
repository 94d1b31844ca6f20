"""Config files: those that come with the package, by name, and anybody's own; what they return, and changes to that."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import re
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

import fedbert_jax
from fedbert_jax.config.extent import choose
from fedbert_jax.config.keys import all_keys, unknown_key
from fedbert_jax.config.load import from_dict
from fedbert_jax.config.schema import Config
from fedbert_jax.errors import ConfigError

NAME = r"[A-Za-z0-9_]+"  # of a config that comes along


def directory() -> Path:
    """Returns where the package's config files are: in an installed package, or beside the package in a checkout."""
    package = Path(fedbert_jax.__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def names() -> tuple[str, ...]:
    """Returns the names of the config files that come with the package."""
    return tuple(sorted(path.stem for path in directory().glob("*.py")))


def load_config(name: str | os.PathLike[str], changes: Mapping[str, Any] | None = None) -> Config:
    """Reads a config, changes it and validates it.

    Args:
      name: of a config that comes with the package ("demo", "text", ...), or a file whose `get_config()` returns one.
      changes: values by dotted key, such as {"federated.rounds": 20}; `fedbert train --help` lists the keys.

    Raises:
      ConfigError: for an unknown key, a value of the wrong type, or a combination that cannot run.
    """
    values, changes = read_config(name), known(changes or {})
    _change(values, changes)
    return choose(from_dict(values), changes)


def known(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the changes; raises ConfigError for a key that there isn't."""
    for key in changes:
        if key not in all_keys():
            raise unknown_key(str(key))
    return dict(changes)


def _change(values: ConfigDict, changes: Mapping[str, Any]) -> None:
    """Sets keys, dotted, to other values; whether these are accepted is for `from_dict` to say."""
    with values.unlocked(), values.ignore_type():  # the schema decides the types
        for key, value in changes.items():
            *sections, name = key.split(".")
            node = values
            for section in sections:
                if not isinstance(node.get(section), ConfigDict):
                    node[section] = ConfigDict()
                node = node[section]
            node[name] = value


def read_config(file: str | os.PathLike[str]) -> ConfigDict:
    """Runs a config file and returns what its `get_config()` returns; config files call it, too, to build on another one.

    Args:
      file: a path, or the name of a config that comes with the package, such as "demo", unless there is a file of that name.

    Raises:
      ConfigError: if there is no such file, it fails, or it returns no config.
    """
    path = Path(file).expanduser()
    if re.fullmatch(NAME, str(file)) and not os.path.isfile(path) and str(file) in names():
        path = directory() / f"{file}.py"
    if not os.path.isfile(path):  # raises no error for a name that is too long
        kind = "is a directory" if os.path.isdir(path) else "is no file"
        what = kind if os.path.lexists(path) else "does not exist"
        raise ConfigError(f"config file {file} {what}; accepted: a FILE.py, or one of {', '.join(names())}.")
    loader = importlib.machinery.SourceFileLoader("fedbert_config", str(path))
    spec = importlib.util.spec_from_file_location("fedbert_config", path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    try:
        code = compile(path.read_bytes(), str(path), "exec")
        exec(code, module.__dict__)
        if not callable(getattr(module, "get_config", None)):
            raise ConfigError(f"config file {file} has no get_config(); accepted: one that returns the config.")
        values = module.get_config()
    except ConfigError:
        raise
    except Exception as e:  # the file's own code runs here
        raise ConfigError(f"config file {file} fails{_where(e, str(path))}: {type(e).__name__}: {_first(e)}") from e
    if isinstance(values, FrozenConfigDict):
        return values.as_configdict()
    if isinstance(values, ConfigDict):
        return values
    if isinstance(values, Mapping):
        return ConfigDict(dict(values))
    raise ConfigError(
        f"config file {file}: get_config() returns {type(values).__name__}; accepted: a ConfigDict, as "
        "fedbert_jax.config.default_config() makes it."
    )


def _where(error: Exception, path: str) -> str:
    if isinstance(error, SyntaxError):
        return f" at line {error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return f" at line {lines[-1]}" if lines else ""


def _first(error: Exception) -> str:
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    return " ".join(text.split())[:300]

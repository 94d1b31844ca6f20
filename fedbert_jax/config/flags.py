"""main's command line: its flags and `--config.KEY=VALUE` in any order, and the config file they change.

The arguments are read here rather than by ml_collections' config_flags, which requires an order and says little about a
mistake.
"""

from __future__ import annotations

import difflib
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import fedbert_jax
from fedbert_jax import config as config_lib
from fedbert_jax.config import Config, all_keys, files, from_text, type_of
from fedbert_jax.config.describe import show_default, show_help
from fedbert_jax.errors import ConfigError

# What a flag takes, and what it is for.
FLAGS: dict[str, tuple[str, str]] = {
    "config": ("NAME", "what to train: a FILE.py whose get_config() returns it, or the name of one that comes along: NAMES"),
    "workdir": ("DIR", "the run's directory: made if it isn't there, gone on with if it is"),
    "distributed": ("", "train with other processes that run the same command"),
    "coordinator": ("HOST:PORT", "of process 0"),
    "processes": ("P", "how many processes there are"),
    "process": ("I", "which of them this is, from 0"),
    "join_timeout": ("SECONDS", "in which all processes have to be there (300)"),
    "help": ("", "print this, and every key with its default"),
    "list_keys": ("", "print every key with its default"),
    "version": ("", "print the version"),
}
INTEGERS = ("processes", "process", "join_timeout")
EXAMPLE = {"config": "NAME, such as demo, or FILE.py", "workdir": "DIR"}
YES, NO = ("true", "t", "1", "yes"), ("false", "f", "0", "no")


@dataclass(frozen=True)
class Given:
    """A parsed command line."""

    flags: dict[str, Any] = field(default_factory=dict)  # by name; only those that were given
    keys: dict[str, Any] = field(default_factory=dict)  # config keys, dotted, with their values

    def need(self, name: str) -> str:
        """Returns the value of a required flag.

        Raises:
          ConfigError: if it is missing.
        """
        if not self.flags.get(name):
            raise ConfigError(f"no {name} given; accepted: --{name} {EXAMPLE[name]}.")
        return str(self.flags[name])


def parse(arguments: Sequence[str]) -> Given:
    """Parses a command line; order doesn't matter, and of repeated arguments the last one counts.

    Args:
      arguments: without the command's name. `--flag VALUE` is `--flag=VALUE`, and `--nokey` is `--key=false`.

    Raises:
      ConfigError: for an unknown flag or key, a value that is missing or of the wrong type, or an argument without a flag.
    """
    if any(a == "-h" or a.lstrip("-").startswith("help") for a in arguments if a.startswith("-")):  # whatever else is wrong
        return Given({"help": True})
    flags: dict[str, Any] = {}
    keys: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("-") or argument.strip("-") == "":
            raise _stray(argument)
        name, equals, text = argument.lstrip("-").partition("=")
        name, negated = _without_no(name)
        if negated:
            if equals:
                raise ConfigError(f"{argument}: accepted: --no{name} or --{name}={text}, not both at once.")
            text = "false"
        elif not equals:
            text = _next_value(argument, _is_switch(name), rest)
        if name.startswith("config."):
            key = name.removeprefix("config.")
            keys[key] = from_text(key, text)
        elif name in FLAGS:
            flags[name] = _flag_value(name, text)
        else:
            raise _unknown_flag(argument, name)
    return Given(flags, keys)


def load_config(given: Given) -> Config:
    """Reads the config file, applies the command line's changes, and validates the result.

    Raises:
      ConfigError: if the file is missing, fails, or has a key or value that can't be used.
    """
    return files.load_config(given.need("config"), given.keys)


def tell_about(given: Given, usage: str) -> str | None:
    """Returns what --help, --list_keys or --version prints; None if none of them was given.

    Args:
      given: the command line.
      usage: how the command is used, in a few lines.
    """
    if given.flags.get("help"):
        width = min(shutil.get_terminal_size().columns, 120) if sys.stdout.isatty() else None
        shown = {name: f"--{name} {value}".strip() for name, (value, _) in FLAGS.items()}
        flags = "\n".join(f"  {shown[name]:24}  {about}" for name, (_, about) in FLAGS.items())
        flags = flags.replace("NAMES", ", ".join(files.names()))
        keys = f"Keys, as --config.KEY=VALUE after the file's; each with its default, and what it takes:\n{show_help(width)}"
        return f"{usage.strip()}\n\n{flags}\n\n{keys}"
    if given.flags.get("list_keys"):
        return "\n".join(map(show_default, all_keys()))
    return f"fedbert_jax {fedbert_jax.__version__}" if given.flags.get("version") else None


# --- one argument -----------------------------------------------------------------------------------------------------


def _is_switch(name: str) -> bool:
    if name.startswith("config."):
        key = name.removeprefix("config.")
        return key in all_keys() and type_of(key) in (bool, bool | None)
    return name in FLAGS and FLAGS[name][0] == ""


def _without_no(name: str) -> tuple[str, bool]:
    """Strips the "no" of a switch (`--nodistributed`, `--noconfig.data.lowercase`); returns the name and whether it did."""
    return (name[2:], True) if name.startswith("no") and _is_switch(name[2:]) else (name, False)


def _next_value(argument: str, switch: bool, rest: list[str]) -> str:
    """Takes the value of a flag without "=" from the arguments that follow it."""
    there = bool(rest) and not rest[0].startswith("--")
    if switch:
        return rest.pop(0) if there and rest[0].lower() in YES + NO else "true"
    if not there:
        flag = argument.lstrip("-")
        if not flag.startswith("config.") and flag not in FLAGS:
            raise _unknown_flag(argument, flag)
        if flag.startswith("config.") and flag.removeprefix("config.") not in all_keys():
            raise config_lib.unknown_key(flag.removeprefix("config."))
        after = f", but {rest[0]} after it" if rest else ""
        raise ConfigError(f"{argument} has no value{after}; accepted: {_usage(flag)}.")
    return rest.pop(0)


def _usage(name: str) -> str:
    if name.startswith("config."):
        return f"--{name}=VALUE"
    return f"--{name} {FLAGS[name][0]}".strip()


def _flag_value(name: str, text: str) -> Any:
    if name in INTEGERS:
        if not re.fullmatch(r"-?[0-9]{1,18}", text):
            raise ConfigError(f"--{name}={text}: accepted: an integer.")
        return int(text)
    if _is_switch(name):
        if text.lower() not in YES + NO:
            raise ConfigError(f"--{name}={text}: accepted: --{name}, or --no{name}.")
        return text.lower() in YES
    if not text:
        raise ConfigError(f"--{name} has no value; accepted: {_usage(name)}.")
    return text


def _stray(argument: str) -> ConfigError:
    """Returns the error for an argument that belongs to no flag."""
    flag = argument.partition("=")[0]
    if argument[:1] in ("–", "—", "−"):
        meant = f" (did you mean --{argument.lstrip('–—−-')}, with two hyphens?)"
    elif argument.endswith(".py"):
        meant = f" (did you mean --config {argument}?)"
    elif flag in all_keys() or flag.startswith("config."):
        meant = f" (did you mean --config.{argument.removeprefix('config.')}?)"
    else:
        meant = ""
    accepted = "--config FILE.py, --workdir DIR and --config.KEY=VALUE"
    return ConfigError(f"unexpected argument {argument!r}{meant}; accepted: {accepted}.")


def _unknown_flag(argument: str, name: str) -> ConfigError:
    flag = argument.partition("=")[0]
    same = [key for key in all_keys() if name.lower() in (key, key.rpartition(".")[2])]
    close = difflib.get_close_matches(name.lower().replace("-", "_"), [*FLAGS, "config."], n=1)
    prefix = difflib.get_close_matches(name.partition(".")[0].lower(), ["config"], n=1) if "." in name else []
    if same:
        meant = " or ".join(f"--config.{key}" for key in same[:3])
    elif prefix and name.partition(".")[2] in all_keys():
        meant = f"--config.{name.partition('.')[2]}"
    else:
        meant = f"--{close[0]}" if close else ""
    hint = f" (did you mean {meant}?)" if meant else ""
    accepted = ", ".join(f"--{name}" for name in FLAGS)
    return ConfigError(f"there is no flag {flag}{hint}; accepted: {accepted} and --config.KEY=VALUE.")

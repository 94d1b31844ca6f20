"""python -m fedbert_jax.study FILE.toml --workdir DIR [--jobs N] [--seeds N] [--arms NAME,...] [--config.KEY=VALUE ...]

Trains configs with changes over seeds, a process a run, and ends in their comparison. When given again, it goes on.

FILE says what is run; "strategies" is one that comes with the package:

  config = "demo"               a name or a file, for arms without one of their own
  seeds = 3                     0, 1 and 2; or a list of them
  [changes]                     to every run, by key
  federated.rounds = 100        "None" is None, which TOML has no word for
  [arms.gradients]              an arm a section; without any, the config is the only one
  [arms.parallel]
  config = "parallel"
  client_optimizer.learning_rate = [4e-3, 6e-3]   of a list, each value is an arm of its own
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedbert_jax import cli, disk
from fedbert_jax import config as config_lib
from fedbert_jax.config.files import directory, load_config, names
from fedbert_jax.console.output import make_console, shown
from fedbert_jax.errors import ConfigError, UserError

NAME = r"[A-Za-z0-9][A-Za-z0-9._+-]*"  # of an arm: a part of its workdir's name
Say = Callable[[str], None]


class Stopped(UserError):
    """A command failed or was interrupted; its exit code is this one's."""

    def __init__(self, text: str, exit_code: int):
        super().__init__(text)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Arm:
    """One of the configurations compared: a config and changes to it, by dotted key."""

    config: str
    changes: Mapping[str, Any]


@dataclass(frozen=True)
class Study:
    """What is run: every arm with every seed."""

    arms: dict[str, Arm]
    seeds: tuple[int, ...]


def read_study(path: Path) -> Study:
    """Reads a study's file, or the one of that name that comes with the package.

    Raises:
      UserError: if there is none, or it says something that isn't understood.
    """
    if not path.exists() and (directory() / f"{path}.toml").is_file():
        path = directory() / f"{path}.toml"
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"the study {path} can't be read ({getattr(error, 'strerror', None) or error}).") from error
    if unknown := [key for key in found if key not in ("config", "seeds", "changes", "arms")]:
        raise UserError(f"{path}: {unknown[0]}: accepted: config, seeds, changes and arms.")
    config, seeds, changes, arms = (found.get(key) for key in ("config", "seeds", "changes", "arms"))
    for name, table in (("changes", changes), ("arms", arms)):
        if table is not None and not isinstance(table, dict):
            raise UserError(f"{path}: {name} is no section; accepted: [{name}].")
    sections = arms or {Path(config).stem if isinstance(config, str) else "": {}}
    made: dict[str, Arm] = {}
    for name, own in sections.items():
        if not isinstance(own, dict):
            raise UserError(f"{path}: arms.{name} is no section; accepted: [arms.{name}].")
        own = dict(own)
        base = own.pop("config", config)
        if not isinstance(base, str):
            raise UserError(f"{path}: config: accepted: the name of one ({', '.join(names())}) or a file.")
        beside = path.parent / base  # a file is named from where the study is
        base = str(beside.resolve()) if beside.is_file() else base
        wanted = config_lib.flatten(changes or {}) | config_lib.flatten(own)
        if "seed" in wanted:
            raise UserError(f"{path}: seed={wanted['seed']!r}: accepted: seeds = [{wanted['seed']}], beside config.")
        for suffix, chosen in _each({key: _read(value) for key, value in wanted.items()}):
            arm = name + suffix
            if not re.fullmatch(NAME, arm):
                raise UserError(f"{path}: arms.{arm}: accepted as a name: letters, digits and . _ + -.")
            made[arm] = Arm(base, chosen)
    return Study(made, _seeds(path, 1 if seeds is None else seeds))


def _read(value: Any) -> Any:
    if isinstance(value, list):
        return [_read(one) for one in value]
    return None if value == "None" else value


def _each(changes: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields every choice of one value for each key that has a list of them, with what it adds to an arm's name."""
    lists = [key for key, value in changes.items() if isinstance(value, list) and key != "fill_mask"]
    for values in itertools.product(*(changes[key] for key in lists)):
        suffix = "".join(f"-{re.sub(r'[^A-Za-z0-9._+-]', '_', str(value))}" for value in values)
        yield suffix, {**changes, **dict(zip(lists, values, strict=True))}


def _seeds(path: Path, seeds: Any) -> tuple[int, ...]:
    if isinstance(seeds, int) and not isinstance(seeds, bool) and seeds > 0:
        return tuple(range(seeds))
    if isinstance(seeds, list) and seeds and all(isinstance(s, int) and not isinstance(s, bool) for s in seeds):
        return tuple(dict.fromkeys(seeds))
    raise UserError(f"{path}: seeds={seeds!r}: accepted: how many, or a list of integers.")


def check(study: Study, more: Mapping[str, Any]) -> None:
    """Raises `ConfigError` for the first arm that can't run, before any does."""
    for name, arm in study.arms.items():
        try:
            config = load_config(arm.config, {**arm.changes, **more})
            if config.task != "pretrain":
                raise ConfigError(f"config key task={config.task!r}: accepted in a study: 'pretrain'.")
        except ConfigError as error:
            raise ConfigError(f"arm {name}: {error}") from error


def command_of(arm: Arm, seed: int, workdir: Path, more: Sequence[str]) -> list[str]:
    """Returns the command of one run."""
    flags = [f"--config.{key}={_typed(value)}" for key, value in {**arm.changes, "seed": seed}.items()]
    main = [sys.executable, "-m", "fedbert_jax.main", "--config", arm.config, "--workdir", str(workdir)]
    return [*main, *flags, *more]


def _typed(value: Any) -> str:
    return repr(tuple(value)) if isinstance(value, list) else str(value)


# --- commands, some at a time -----------------------------------------------------------------------------------------


def run(name: str, command: list[str], root: Path, say: Say, cwd: Path | None = None) -> None:
    """Runs a command to its end, unless that has been done; its output goes to a log.

    Raises:
      Stopped: if it fails, or is interrupted.
    """
    done = root / f"{name}.done"
    if done.exists() and json.loads(done.read_text()) == command:
        return
    say(f"{name} ...")
    with (root / f"{name}.log").open("a") as log:
        code = subprocess.run(command, cwd=cwd, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        why = _last_line(root / f"{name}.log")
        raise Stopped(
            f"{name} stopped{f': {why}' if why else ''} (see {log.name}); the same command goes on from there", code
        )
    disk.write_atomically(done, json.dumps(command))


def _last_line(log: Path) -> str:
    """Returns the sentence that a command ended with, without "error: "; "" if it said none."""
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1].removeprefix("error: ").rstrip(".") if lines and lines[-1].startswith("error: ") else ""


def all_of(jobs: dict[str, list[str]], root: Path, at_once: int, say: Say, cwd: Path | None = None) -> None:
    """Runs commands by name, `at_once` at a time.

    Raises:
      Stopped: if one of them stopped; those that have begun come to their end first.
      KeyboardInterrupt: for Ctrl-C, which the commands under way get, too, and end with what they have saved.
    """
    with ThreadPoolExecutor(at_once) as pool:
        futures = [pool.submit(run, name, command, root, say, cwd) for name, command in jobs.items()]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code.

    Raises:
      UserError: for a study that can't run, or a run of it that stopped.
    """
    parser = cli.Parser(
        prog=cli.program("study"),
        description=cli.usage(__doc__, "study"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, metavar="FILE.toml")
    parser.add_argument("--workdir", type=Path, required=True, metavar="DIR", help="for all runs: DIR/ARM-SEED, and its log")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at once (default: 1)")
    parser.add_argument("--seeds", type=int, metavar="N", help="0 to N - 1, in place of the file's")
    parser.add_argument("--arms", metavar="NAME,...", help="only these")
    given = sys.argv[1:] if arguments is None else list(arguments)
    flags = parser.parse_args([word for word in given if not word.startswith("--config.")])
    more = [word for word in given if word.startswith("--config.")]
    study = read_study(flags.file)
    for name in ("jobs", "seeds"):
        if (value := getattr(flags, name)) is not None and value < 1:
            raise UserError(f"--{name} {value}: accepted: at least 1.")
    named = config_lib.listed(flags.arms) or list(study.arms)
    if unknown := [name for name in named if name not in study.arms]:
        raise UserError(f"--arms {unknown[0]}: accepted: {', '.join(study.arms)}.")
    seeds = study.seeds if flags.seeds is None else tuple(range(flags.seeds))
    check(Study({name: study.arms[name] for name in named}, seeds), _changes(more))

    root = flags.workdir
    with disk.writing(root):
        root.mkdir(parents=True, exist_ok=True)
    runs = {f"{name}-{seed}": (study.arms[name], seed) for seed in seeds for name in named}
    jobs = {run: command_of(arm, seed, root / run, more) for run, (arm, seed) in runs.items()}
    console = make_console()
    cli.raise_on_interrupt()
    all_of(jobs, root, flags.jobs, lambda text: console.print(shown(text)))

    from fedbert_jax import compare

    return compare.main([*(str(root / run) for run in runs), "--out", str(root / "compare")])


def _changes(more: Sequence[str]) -> dict[str, Any]:
    """Returns the values of `--config.KEY=VALUE`."""
    found = {}
    for word in more:
        key, equals, text = word.removeprefix("--config.").partition("=")
        if not equals:
            raise ConfigError(f"{word}: accepted: --config.KEY=VALUE.")
        found[key] = config_lib.from_text(key, text)
    return found


if __name__ == "__main__":
    cli.run(main)

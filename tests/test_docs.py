"""The docs: every command as printed, as far as that is cheap; every link; every file, key and option that is named."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import inspect
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from benchmarks import machine
from fedbert_jax import export
from fedbert_jax.config import ARRANGEMENTS, all_keys, flags

ROOT = Path(__file__).parents[1]
PAGES = [*map(ROOT.joinpath, ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")), *sorted(ROOT.glob("docs/*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
# Where code stands in a page; how what is typed begins; and what is added to the page's last command.
CODE = re.compile(r"^```\w*\n(?P<fence>.*?)^```|(?P<lines>(?:^ {4}[^\n]*\n)+)|`(?P<span>[^`]+)`", re.M | re.S)
TYPED = re.compile(r"\.venv/bin/\w|python3 -|make [.\w]|launch/\w|sbatch |pre-commit |for \w+ in ")
ADDED = re.compile(r"(\.\.\. )?(?=--config\.\w)")


class Parsed(Exception):
    """A command took its arguments; it would go to work now."""


def typed(page: Path) -> Iterator[str]:
    """What a reader types, from the page's top to its end."""
    last = ""
    for match in CODE.finditer(page.read_text()):
        block = textwrap.dedent(match["fence"] or match["lines"] or "")
        text = "\n".join(re.findall(r"^\$ (.+)", block, re.M)) or block
        if match["span"]:
            text = " ".join(match["span"].replace("\\|", "|").split())  # in a table's cell a bar has a backslash
        elif ADDED.match(text):
            text = f"{last} {ADDED.sub('', text, count=1)}"
        if TYPED.match(text):
            last = text.rstrip() if "-m fedbert_jax.main --config " in text else last
            yield text


def commands(script: str) -> list[list[str]]:
    """What a shell would run, word by word. It runs none of it: each is a function here, and PATH is empty."""
    programs = {*re.findall(r"(?:\.venv/bin|launch)/[\w.-]+", script), "python3", "make", "sbatch", "pre-commit"}
    functions = "".join(f'{name}() {{ printf "%s\\0" {name} "$@"; echo; }}\n' for name in programs)
    done = subprocess.run(["bash", "-euc", f"PATH=\n{functions}{script}"], capture_output=True, text=True)
    assert done.returncode == 0, f"{script}: {done.stderr}"
    return [words.split("\0") for words in done.stdout.split("\0\n")[:-1]]


@functools.cache
def run(*command: str) -> str:
    """What a command prints that does nothing else."""
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"MAKEFLAGS": ""}, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout, f"{command}: {done.stderr}"
    return done.stdout


def check_module(module: str, *arguments: str) -> None:
    """Runs `python -m module` where it only prints, else up to where it has taken its arguments and would go to work."""
    found = importlib.util.find_spec(module)
    assert found is not None, f"there is no module {module}"
    if module.partition(".")[0] not in ("fedbert_jax", "benchmarks"):
        return
    if {"--help", "--list", "--list_keys", "--version"} & set(arguments):
        run(sys.executable, "-m", module, *arguments)
    elif module == "fedbert_jax.main":
        given = flags.parse(arguments)
        assert flags.load_config(given) and given.need("workdir")
    else:
        main = importlib.import_module(f"{module}.__main__" if found.submodule_search_locations else module).main
        if not re.search(r"(argparse\.Argument|cli\.)Parser\(", inspect.getsource(sys.modules[main.__module__])):
            assert not arguments, f"{module} takes no arguments"
            return
        parse, stop = argparse.ArgumentParser.parse_args, mock.Mock(side_effect=Parsed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [module, *arguments])
            patch.setattr(machine, "keep_freed_memory", stop)
            patch.setattr(machine, "limit_cores", stop)
            if module != "benchmarks":  # which looks at its arguments' values once they are parsed
                patch.setattr(argparse.ArgumentParser, "parse_args", lambda *given: stop(parse(*given)))
            with pytest.raises(Parsed):
                main()


def check(program: str, *arguments: str) -> None:
    for word in arguments:
        if re.match(r"(benchmarks|configs|docs|fedbert_jax|launch|tests)/", word):
            assert (ROOT / word.partition("::")[0]).exists(), f"there is no {word}"
        if extra := re.fullmatch(r"\.\[(\w+)\]", word):
            assert f"\n{extra[1]} = [" in (ROOT / "pyproject.toml").read_text(), f"there is no extra {extra[1]}"
    script = next((n for n, word in enumerate((program, *arguments)) if word.startswith("launch/")), None)
    if script is not None:  # it is called, or sbatch or Python is with it
        words = (program, *arguments)[script:]
        run(sys.executable if words[0].endswith(".py") else "bash", *words, "--dry-run")
    elif program == "make":
        assert "Nothing to be done" not in run("make", "-n", *arguments)
    elif arguments[:1] == ("-m",):
        choose = lambda word: re.sub("=ROUNDS$", "=100", re.sub("^NAME$", "strategies", word))  # noqa: E731
        check_module(*map(choose, arguments[1:]))
    elif program.startswith(".venv/bin/"):
        assert (Path(sys.executable).parent / Path(program).name).exists(), f"there is no {program}"


@each_page
def test_commands_work_as_they_stand(page, tmp_path, monkeypatch):
    text, scripts = page.read_text(), list(typed(page))
    assert sum(script.count(".venv/bin/") for script in scripts) >= text.count(".venv/bin/"), "some are not found"
    # Outside the virtual environment these are other ones.
    assert not re.findall(r"(?:^ *|`)(?:python -m|python3 -m (?!venv)|pip3? ).*", text, re.M)
    for code, name in re.findall(r"^```python\n(.*?)```\n+As `(\w+\.py)`", text, re.M | re.S):
        (tmp_path / name).write_text(code)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    with mock.patch.dict(ARRANGEMENTS):  # a page's example may register its own
        for command in (command for script in scripts for command in commands(script)):
            check(*command)


def test_links_lead_somewhere():
    slug = lambda heading: re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")  # noqa: E731
    for page in {*PAGES, *ROOT.glob("*.md"), *ROOT.glob("benchmarks/*.md")}:
        for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
            path, _, anchor = link.partition("#")
            target = page.parent / path if path else page
            assert target.exists(), f"{page} leads to {link}"
            assert not anchor or anchor in map(slug, re.findall(r"^#+ (.+)", target.read_text(), re.M)), f"{page}: {link}"


@each_page
def test_files_keys_and_options_that_are_named_exist(page):
    text, places = page.read_text(), (ROOT, page.parent, ROOT / "fedbert_jax", ROOT / "launch", ROOT / "launch/nvflare")
    for name, part in re.findall(r"(?<!As )`([\w./]+\.(?:py|sh|sbatch|toml|yaml|cff))(?:::(\w+))?`(?!\])", text):
        found = [path.read_text() for place in places if (path := place / name).is_file()]
        assert found and re.search(rf"^(class |def |){part}\b", found[0], re.M), f"there is no {name}::{part}"
    sections = "|".join(sorted({key.partition(".")[0] for key in all_keys() if "." in key}))
    keys = re.findall(rf"--config\.([a-z_.0-9]+)=|`((?:{sections})\.[a-z_.0-9]+)(?==|`)", text)
    assert {a or b for a, b in keys} - {"model.safetensors", "export.py", "metrics.jsonl"} <= set(all_keys())
    ours = "".join(path.read_text() for path in ROOT.glob("[fbl]*/**/*.[ps]*") if path.suffix in (".py", ".sh", ".sbatch"))
    ours += "".join(f" --{name} --{name.replace('_', '-')}" for name in (*flags.FLAGS, *export.CARD))
    assert {*re.findall(r"`(--[a-z][\w-]*)", text)} <= {"--logdir", *re.findall(r"--[a-z][\w-]*", ours)}  # tensorboard's

"""The command `fedbert`: its subcommands are the modules', and a wheel holds all they need."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from corpus import run, write_corpus

import fedbert_jax
from fedbert_jax.__main__ import COMMANDS

ROOT = Path(__file__).parents[1]


def fedbert(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-m", "fedbert_jax", *map(str, arguments))


def test_the_overview_names_every_command():
    done = fedbert("--help")
    assert done.returncode == 0
    for name, (does, place, _) in COMMANDS.items():
        assert f"  {name:10}  {does}" in done.stdout
        module, _, function = place.partition(":")
        assert callable(getattr(importlib.import_module(f"fedbert_jax.{module}"), function))
    assert fedbert("--version").stdout == f"fedbert_jax {fedbert_jax.__version__}\n"
    assert fedbert().stdout == done.stdout


def test_a_command_that_there_is_not_is_one_sentence():
    done = fedbert("trian")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: there is no command 'trian'; accepted: train, serve, join, ")


@pytest.mark.parametrize(
    ("name", "usage"), [("export", "usage: fedbert export "), ("train", "fedbert train --config NAME ")]
)
def test_help_is_of_the_command_as_it_was_called(name, usage):
    assert fedbert(name, "--help").stdout.startswith(usage)


def test_serve_and_join_have_configs_of_their_own(tmp_path):
    for name in ("serve", "join"):
        given = ("--config.data.tokenizer=x", "--config.data.source=text:x", "--config.data.partition.kind=iid")
        done = fedbert(name, "--workdir", tmp_path / name, *given)
        assert done.returncode == 2 and f"data.partition.kind='iid': accepted: 'natural' with task='{name}'" in done.stderr


@pytest.mark.slow
def test_a_wheel_is_enough(tmp_path):
    """Configs travel in it: `--config demo` is found where there is no checkout, and text of one's own is trained on."""
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    place = tmp_path / "site"
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        file.extractall(place)
    packaged = {f"fedbert_jax/{path.relative_to(ROOT / 'fedbert_jax')}" for path in (ROOT / "fedbert_jax").rglob("*.py")}
    configs = {f"fedbert_jax/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    assert packaged | configs | {"fedbert_jax/py.typed", "fedbert_jax/__init__.pyi"} <= names
    assert not any(name.startswith(("tests/", "benchmarks/", "configs/")) for name in names)
    scripts = next(place.glob("*.dist-info")) / "entry_points.txt"
    assert "fedbert = fedbert_jax.__main__:main" in scripts.read_text()

    write_corpus(tmp_path / "corpus", clients=2, documents=12)
    small = "rounds=2 local_steps=1".split()
    command = [
        sys.executable, "-m", "fedbert_jax", "train", "--config", "demo", "--workdir", "run",
        f"--config.data.source=text:{tmp_path}/corpus/text", "--config.data.tokenizer=train:200", "--config.data.seq_len=16",
        "--config.model.hidden_size=16", "--config.fill_mask=()", *(f"--config.federated.{key}" for key in small),
    ]  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(place)}  # comes before the checkout
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/hf/model.safetensors").is_file()
    where = [sys.executable, "-c", "import fedbert_jax; print(fedbert_jax.__file__)"]
    assert subprocess.run(where, cwd=tmp_path, env=env, capture_output=True, text=True).stdout.startswith(str(place))


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_the_examples_in_python_run_as_printed(page, tmp_path):
    examples = re.findall(r"^```python\n(.*?)```$", (ROOT / page).read_text(), re.M | re.S)
    assert examples and all(example.count("\n") <= 15 or page != "README.md" for example in examples)
    for example in examples:
        done = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

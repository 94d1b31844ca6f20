"""Text prepared once: runs begin with its blocks, read nothing, and end as runs that prepare their own."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from corpus import run as run_command
from corpus import write_corpus
from safetensors.numpy import load_file
from test_main import load

import fedbert_jax as fb
from fedbert_jax import prepare
from fedbert_jax.errors import ConfigError, UserError


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with config.py, its text, and what was prepared of that."""
    place = tmp_path_factory.mktemp("prepared")
    config = write_corpus(place, clients=2, documents=12)
    assert prepare.main([f"--config={config}", f"--out={place / 'made/here'}"]) == 0
    return place


def run_of(place: Path, root: Path, **changes) -> fb.Run:
    small = dict(federated__rounds=1, federated__local_steps=1, model__num_layers=1)
    return fb.Run(root, load(place / "config.py", **small | changes))


def test_a_run_takes_the_blocks_and_ends_as_one_that_made_its_own(place, tmp_path, monkeypatch):
    own = run_of(place, tmp_path / "own")
    own.train(progress=False)
    monkeypatch.setattr("fedbert_jax.data.making.read_text", None)  # nothing is read
    taken = run_of(place, tmp_path / "taken", data__prepared=str(place / "made/here"))
    taken.train(progress=False)
    for name in ("train.npy", "heldout.npy"):
        np.testing.assert_array_equal(np.load(tmp_path / "taken/data" / name), np.load(tmp_path / "own/data" / name))
    assert os.stat(tmp_path / "taken/data/train.npy").st_ino == os.stat(place / "made/here/train.npy").st_ino  # linked
    ours, theirs = (load_file(tmp_path / name / "hf/model.safetensors") for name in ("taken", "own"))
    assert all((ours[key] == theirs[key]).all() for key in theirs)
    # What it has is its own: it goes on, and is exported, when the other directory is gone.
    shutil.copytree(place / "made/here", tmp_path / "kept")
    again = run_of(place, tmp_path / "again", data__prepared=str(tmp_path / "kept"))
    again.train(lambda record: fb.STOP, progress=False)
    shutil.rmtree(tmp_path / "kept")
    assert fb.Run(tmp_path / "again").train(progress=False) is True


def test_the_command_has_another_name(place):
    mistaken = (f"--config={place / 'config.py'}", f"--out={place / 'config.py'}")
    one, other = (
        run_command(sys.executable, "-m", f"fedbert_jax.{name}", *mistaken) for name in ("prepare", "data.prepare")
    )
    assert (other.returncode, other.stdout, other.stderr) == (one.returncode, one.stdout, one.stderr)
    assert one.returncode == 2 and one.stderr.startswith("error: ")


def test_where_links_cannot_be_made_it_is_copied(place, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("another file system")

    monkeypatch.setattr("os.link", refuse)
    run = run_of(place, tmp_path / "run", data__prepared=str(place / "made/here"))
    run.train(progress=False)
    assert (tmp_path / "run/data/train.npy").read_bytes() == (place / "made/here/train.npy").read_bytes()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(seed=1), r"data\.prepared='.*': .* was prepared with seed=0, not 1; prepare it for this config"),
        (dict(data__seq_len=8), r"was prepared with seq_len=16, not 8; prepare it for this config"),
        (dict(data__prepared="nowhere"), r"data\.prepared='nowhere': accepted: a directory made by"),
    ],
)
def test_what_was_prepared_of_something_else_is_refused(place, tmp_path, changes, words):
    run = run_of(place, tmp_path / "run", **{"data__prepared": str(place / "made/here")} | changes)
    with pytest.raises(UserError, match=words):
        run.train(progress=False)
    assert not (tmp_path / "run/data").exists()


def test_the_command_refuses_what_it_cannot_do(place, tmp_path):
    config = f"--config={place / 'config.py'}"
    with pytest.raises(ConfigError, match="task='serve': accepted here: 'pretrain'"):
        prepare.main(["--config=serve", f"--out={tmp_path / 'x'}"])
    with pytest.raises(ConfigError, match=r"data\.prepared='x': accepted here: ''"):
        prepare.main([config, f"--out={tmp_path / 'x'}", "--config.data.prepared=x"])
    with pytest.raises(UserError, match="was prepared with seq_len=16, not 8; give another --out"):
        prepare.main([config, f"--out={place / 'made/here'}", "--config.data.seq_len=8"])
    (tmp_path / "note").write_text("")
    with pytest.raises(UserError, match=r"note/x/data can't be made \((File exists|Not a directory)\); give another --out"):
        prepare.main([config, f"--out={tmp_path / 'note/x/data'}"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("")
    with pytest.raises(UserError, match="holds something else than prepared data; give another --out"):
        prepare.main([config, f"--out={tmp_path / 'full'}"])
    with pytest.raises(ConfigError, match=r"data\.prepared"):
        fb.load_config("join", {"data.prepared": "x", "data.source": "text:x", "data.tokenizer": "x"})


def test_prepared_data_is_no_workdir(place, tmp_path):
    there = sorted(path.name for path in (place / "made/here").iterdir())
    with pytest.raises(UserError, match=r"made/here is prepared data, which runs take by data\.prepared; give another"):
        run_of(place, place / "made/here").train(progress=False)
    assert sorted(path.name for path in (place / "made/here").iterdir()) == there


def test_it_says_what_it_made(place):
    done = run_command(
        sys.executable, "-m", "fedbert_jax.prepare", "--config", place / "config.py", "--out", place / "made/here"
    )
    assert done.returncode == 0, done.stderr
    blocks = len(np.load(place / "made/here/train.npy"))
    assert f"{blocks:,} blocks of 16 tokens are in {place / 'made/here'}" in done.stdout and "client_0" in done.stdout

"""An export is written whole or not at all, replaces nothing but an earlier export, and leaves nothing else behind."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from test_experiment import WORDS, forward
from tiny import tiny_config
from transformers import AutoTokenizer, BertTokenizer

from fedbert_jax.config import ExportConfig
from fedbert_jax.errors import UserError
from fedbert_jax.export import check_place
from fedbert_jax.models import huggingface
from fedbert_jax.models.huggingface import check_target, writing

MODEL = tiny_config(model=dict(num_layers=2)).model
FILES = {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return BertTokenizer(vocab={word: n for n, word in enumerate(WORDS)}, model_max_length=512)


@pytest.fixture
def export(tokenizer: Any) -> Callable[..., None]:
    """Exports a model whose every weight is 0."""
    params = forward(MODEL)[0]

    def save(directory: Path, card: str = "card", **keys: Any) -> None:
        huggingface.save(directory, *params, MODEL, keys.pop("tokenizer", tokenizer), card, **keys)

    return save


def contents(root: Path) -> dict[str, bytes | None]:
    """Every path below a directory, including hidden ones, with its contents."""
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else None for p in sorted(root.rglob("*"))}


# --- where an export may go ------------------------------------------------------------------------------------------


def a_file(at: Path) -> None:
    at.write_text("x")


def a_fifo(at: Path) -> None:
    os.mkfifo(at)


def a_link_to_nothing(at: Path) -> None:
    at.symlink_to(at.with_name("gone"))


def a_circle_of_links(at: Path) -> None:
    at.symlink_to(at)


def a_link_to_a_file(at: Path) -> None:
    at.with_name("file").write_text("x")
    at.symlink_to(at.with_name("file"))


def a_thesis(at: Path) -> None:
    at.mkdir()
    (at / "thesis.txt").write_text("x")


def a_card_alone(at: Path) -> None:
    at.mkdir()
    (at / "README.md").write_text("Trained by fedbert_jax")


def somebodys_checkpoint(at: Path) -> None:
    at.mkdir()
    (at / "config.json").write_text("{}")
    save_file({"x": np.zeros(2, np.float32)}, at / "model.safetensors", {"format": "pt"})


def damaged_weights(at: Path) -> None:
    at.mkdir()
    (at / "config.json").write_text("{}")
    (at / "model.safetensors").write_bytes(b"fedbert_jax")


@pytest.mark.parametrize(
    "make",
    [
        a_file,
        a_fifo,
        a_link_to_nothing,
        a_circle_of_links,
        a_link_to_a_file,
        a_thesis,
        a_card_alone,
        somebodys_checkpoint,
        damaged_weights,
    ],
)
def test_what_is_no_export_is_refused_and_left(make: Callable[[Path], None], export: Any, tmp_path: Path) -> None:
    make(tmp_path / "out")
    before, kind = contents(tmp_path), os.lstat(tmp_path / "out").st_mode
    for call in (check_target, export):
        with pytest.raises(UserError, match=rf"^{tmp_path}/out .*accepted: a new directory, an empty one, or an earlier"):
            call(tmp_path / "out")
    assert contents(tmp_path) == before and os.lstat(tmp_path / "out").st_mode == kind


def beside_it(at: Path) -> None:
    (at / "notes.txt").write_text("x")


def a_folder_in_it(at: Path) -> None:
    (at / ".git").mkdir()


def trained_on(at: Path) -> None:
    """Saves as `transformers` does: config.json keeps unknown keys, but the weights get its own metadata."""
    save_file(load_file(at / "model.safetensors"), at / "model.safetensors", {"format": "pt"})


def a_link_for_a_file(at: Path) -> None:
    shutil.move(at / "README.md", at.with_name("card.md"))
    (at / "README.md").symlink_to(at.with_name("card.md"))


@pytest.mark.parametrize("change", [beside_it, a_folder_in_it, trained_on, a_link_for_a_file])
def test_an_export_that_somebody_worked_in_is_theirs(change: Callable[[Path], None], export: Any, tmp_path: Path) -> None:
    export(tmp_path / "out")
    change(tmp_path / "out")
    before = contents(tmp_path)
    with pytest.raises(UserError, match="is not empty, and no earlier export"):
        export(tmp_path / "out", "another card")
    huggingface.remove(tmp_path / "out")
    assert contents(tmp_path) == before


def test_an_earlier_export_is_replaced_and_its_neighbours_stay(export: Any, tmp_path: Path) -> None:
    for name in ("out.old", "out.new", ".out.unfinished", ".fedbert-export-mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "backup.txt").write_text("x")
    before = contents(tmp_path)
    export(tmp_path / "out", "first")
    assert {p.name for p in (tmp_path / "out").iterdir()} == FILES
    os.chmod(tmp_path / "out", 0o750)
    export(tmp_path / "out", "second")
    assert (tmp_path / "out" / "README.md").read_text() == "second"
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750
    assert {k: v for k, v in contents(tmp_path).items() if k != "out" and not k.startswith("out/")} == before
    modes = {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "out").iterdir()}
    assert len(modes) == 1 and modes != {0o600}  # whoever may read one file may read all
    huggingface.remove(tmp_path / "out")
    huggingface.remove(tmp_path / "out")
    assert contents(tmp_path) == before


def test_a_place_is_found_however_it_is_written(export: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    for out in ("link", "link/", "real/../real", "./new/deep/er", f"{tmp_path}/real/"):
        export(Path(out), out)
        assert Path(out, "README.md").read_text() == out
    assert (tmp_path / "link").is_symlink() and sorted(p.name for p in tmp_path.iterdir()) == ["link", "new", "real"]
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    for out in (".", "../empty", f"{tmp_path}/empty"):  # a shell would be left standing in a deleted directory
        with pytest.raises(UserError, match="is the current directory"):
            export(Path(out))
    with pytest.raises(UserError, match=r"can't be made, since .*README\.md is no directory"):
        export(tmp_path / "real" / "README.md" / "out")
    with pytest.raises(UserError, match=r"can't be written .*too long"):
        export(tmp_path / ("x" * 300))
    with pytest.raises(UserError, match="mounted"):
        export(Path("/proc"))
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(UserError, match=rf"{tmp_path}/out can't be written, since {tmp_path} can't"):
        check_target(tmp_path / "out")


def test_a_runs_workdir_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No export goes into this run's workdir or another's, by whatever name, nor over a directory that contains one."""
    runs = tmp_path / "runs"
    for name in ("mine", "other"):
        (runs / name / "hf").mkdir(parents=True)
        (runs / name / "config.json").write_text("{}")
        (runs / name / ".lock").write_text("")
    (tmp_path / "link").symlink_to(runs / "mine")
    (tmp_path / "up").symlink_to(runs)
    mine = runs / "mine"
    monkeypatch.chdir(mine)
    inside = [mine, Path("."), Path("../mine/"), tmp_path / "link", mine / "hf", Path("hf"), mine / "new" / "er"]
    inside += [tmp_path / "link" / "hf", tmp_path / "up" / "mine", runs / "other", runs / "other" / "hf"]
    for workdir in (mine, Path("."), tmp_path / "link"):
        for out in inside:
            with pytest.raises(UserError, match="a run's workdir, in which its run alone writes"):
                check_place(out, workdir)
        for out in (runs, Path(".."), tmp_path, tmp_path / "up", Path("/")):
            with pytest.raises(UserError, match=r"holds .*, the run's workdir"):
                check_place(out, workdir)
        for out in (runs / "third", tmp_path / "out", Path("../mine-export")):
            check_place(out, workdir)
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(UserError):
        check_place(tmp_path / "circle" / "x", mine) or check_target(tmp_path / "circle" / "x")
    (mine / ".lock").unlink()  # a copy of a workdir, without hidden files
    with pytest.raises(UserError, match="a run's workdir"):
        check_place(mine / "hf", mine)


# --- what may go wrong -----------------------------------------------------------------------------------------------


def full_disk(*args: Any, **keys: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_disk_of_tokenizers(*args: Any, **keys: Any) -> None:
    raise Exception("No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ("shutil.copymode", full_disk),
        ("copy.deepcopy", full_disk_of_tokenizers),
        ("json.dumps", full_disk),
        ("os.replace", full_disk),
        ("tempfile.mkdtemp", full_disk),
    ],
)
def test_a_full_disk_is_one_sentence_and_changes_nothing(
    where: str, what: Any, export: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(tmp_path / "out", "first")
    before = contents(tmp_path)
    for out in (tmp_path / "out", tmp_path / "new" / "er"):
        with monkeypatch.context() as patched:
            patched.setattr(f"fedbert_jax.models.huggingface.writing.{where}", what)
            with pytest.raises(UserError, match=rf"^the model can't be written to {out} \(No space left on device.*\)\.$"):
                export(out, "second")
        assert contents(tmp_path) == before


def test_an_error_of_ours_is_none_of_the_disks(export: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: Any, **keys: Any) -> None:
        raise TypeError("a bug")

    monkeypatch.setattr(writing, "_save_tokenizer", wrong)
    with pytest.raises(TypeError, match="a bug"):
        export(tmp_path / "out")
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("call", [1, 2])
def test_stopped_between_two_renames_the_earlier_export_is_back(
    call: int, error: Any, export: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(tmp_path / "out", "first")
    before, calls, replace = contents(tmp_path), [], os.replace

    def interrupted(*paths: Any) -> None:
        calls.append(paths)
        if len(calls) == call:
            raise error
        replace(*paths)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(error):
        export(tmp_path / "out", "second")
    assert len(calls) >= call and contents(tmp_path) == before


def test_what_came_meanwhile_is_kept(export: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("empty", "export"):
        (tmp_path / name).mkdir()
    export(tmp_path / "export")
    write = writing._write

    def slow(*args: Any) -> None:
        write(*args)
        for name in ("empty", "export"):
            (tmp_path / name / "thesis.txt").write_text("x")

    monkeypatch.setattr(writing, "_write", slow)
    for name in ("empty", "export"):
        with pytest.raises(UserError):
            export(tmp_path / name, "second")
    assert (tmp_path / "empty" / "thesis.txt").exists() and (tmp_path / "export" / "thesis.txt").exists()
    assert (tmp_path / "export" / "README.md").read_text() == "card"
    assert not list(tmp_path.glob(".*"))


def test_what_killed_exports_left_goes_with_the_next_and_nothing_else(export: Any, tmp_path: Path) -> None:
    def left(name: str, *files: str, minutes: int = 5) -> Path:
        directory = tmp_path / f".fedbert-export-{name}"
        directory.mkdir()
        for file in files:
            (directory / file).parent.mkdir(exist_ok=True)
            (directory / file).write_text("x")
        os.utime(directory, (time.time() - 60 * minutes,) * 2)
        return directory

    gone = [left("a"), left("b", "new/config.json", "new/.tmpX7"), left("c", "new/README.md")]
    kept = [
        left("young", "new/config.json", minutes=0),
        left("foreign", "new/thesis.txt"),
        left("another", "letter.txt"),
        left("aside", "new/config.json", "old/config.json"),
        left("used", "new/config.json"),
    ]
    lock = os.open(kept[-1], os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    (tmp_path / ".fedbert-export-file").write_text("x")
    (tmp_path / ".fedbert-export-link").symlink_to(kept[1])
    before = {str(p.relative_to(tmp_path)): contents(p) for p in kept}
    export(tmp_path / "out")
    os.close(lock)
    assert not any(path.exists() for path in gone)
    assert {str(p.relative_to(tmp_path)): contents(p) for p in kept} == before
    assert (tmp_path / ".fedbert-export-file").exists() and (tmp_path / ".fedbert-export-link").exists()


def test_two_exports_at_once_make_two_directories(export: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second begins and ends while the first is at work: neither takes the other's directory for a killed export's."""
    write = writing._write

    def while_another(directory: Path, *args: Any) -> None:
        write(directory, *args)
        monkeypatch.setattr(writing, "_write", write)
        old = time.time() - 3600
        os.utime(directory.parent, (old, old))
        export(tmp_path / "second", "second")

    monkeypatch.setattr(writing, "_write", while_another)
    export(tmp_path / "first", "first")
    assert [(tmp_path / n / "README.md").read_text() for n in ("first", "second")] == ["first", "second"]
    assert not list(tmp_path.glob(".*"))


# --- what is in it ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "longest"), [(512, 16), (int(1e30), 16), (1e30, 16), (12, 12), (0, 16), (None, 16)])
def test_a_tokenizer_asks_for_no_more_than_the_model_has_positions(
    limit: Any, longest: int, export: Any, tmp_path: Path
) -> None:
    assert MODEL.max_position_embeddings == 16
    words = {word: n for n, word in enumerate(WORDS)}
    tokenizer = BertTokenizer(vocab=words, model_max_length=512)
    tokenizer("a b", truncation=True, max_length=3, padding="max_length")  # this leaves both in its backend
    tokenizer.model_max_length = limit
    tokenizer.init_kwargs |= {"max_length": 512, "name_or_path": "/home/anna/t", "tokenizer_file": "/home/anna/t/t.json"}
    export(tmp_path / "out", tokenizer=tokenizer)
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    backend = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert settings["model_max_length"] == longest and "max_length" not in settings
    assert backend["truncation"] is None and backend["padding"] is None
    assert not any(b"/home" in (p.read_bytes()) for p in (tmp_path / "out").iterdir())
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert len(again("a " * 50, truncation=True)["input_ids"]) == longest and len(again("a " * 50)["input_ids"]) == 52
    # The run's own tokenizer stays as it was.
    assert tokenizer.model_max_length == limit and tokenizer.backend_tokenizer.truncation["max_length"] == 3


@pytest.mark.parametrize(
    ("own", "said", "expected"),
    [
        ((0.0, 0.0), (None, None), (0.1, 0.1)),
        ((0.2, 0.0), (None, None), (0.2, 0.1)),
        ((0.2, 0.3), (None, None), (0.2, 0.3)),
        ((0.2, 0.3), (0.0, 0.5), (0.0, 0.5)),
        ((0.0, 0.0), (0.15, None), (0.15, 0.1)),
    ],
)
def test_who_trains_an_export_on_has_dropout(own: Any, said: Any, expected: Any, export: Any, tmp_path: Path) -> None:
    model = tiny_config(model=dict(num_layers=2, hidden_dropout=own[0], attention_dropout=own[1])).model
    asked = ExportConfig(hidden_dropout=said[0], attention_dropout=said[1])
    huggingface.save(tmp_path / "out", *forward(MODEL)[0], model, BertTokenizer(vocab={"[PAD]": 0}), "card", export=asked)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["hidden_dropout_prob"], config["attention_probs_dropout_prob"]) == expected
    assert not {"hidden_dropout", "attention_dropout"} & huggingface.sizes_of(config, "it").keys()  # a run has its own


def test_the_mark_is_in_the_weights(export: Any, tmp_path: Path) -> None:
    export(tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", framework="np") as opened:
        assert opened.metadata()["format"] == "pt" and "fedbert_jax" in opened.metadata()

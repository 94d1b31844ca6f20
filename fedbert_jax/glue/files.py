"""A task's sentences and labels, from its official files or the hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedbert_jax.data import hub
from fedbert_jax.errors import UserError
from fedbert_jax.glue.tasks import MAX_SCORE, MSR_TEST, MSR_TRAIN, TASKS, Examples, Task, find_task, key, test_splits

_QQP_FRAGMENTS = 100  # a file with more broken lines than this is damaged beyond the official one


def dev_splits(task: Task, directory: Path | None = None) -> tuple[str, ...]:
    """Returns the names of the splits to evaluate on: MNLI has two, and Microsoft's MRPC has its test file."""
    if directory is not None and _is_msr(task, _folder(task, directory)):
        return (MSR_TEST,)
    return tuple(f"dev{part}" for part in task.parts)


def find_tasks(directory: Path) -> list[Task]:
    """Returns the tasks that have a folder in the directory, in the order of `TASKS`; for a task's own folder, that task.

    Raises:
      UserError: if the directory can't be read, or is the folder of a task whose name it doesn't bear.
    """
    if _is_msr(TASKS["MRPC"], directory):
        return [TASKS["MRPC"]]
    if _is_own(directory):
        try:
            return [find_task(directory.resolve().name)]
        except UserError as error:
            which = "so it is one task's folder; say which, with --tasks"
            raise UserError(f"{directory} holds a task's files, {which}.") from error
    return [task for task in TASKS.values() if _folder(task, directory)]


def _is_own(directory: Path) -> bool:
    """Whether a directory is a task's own: it holds a task's files, not its folder."""
    names = {path.name for task in TASKS.values() for path in _tsv_files(task, directory).values()}
    return any(os.path.isfile(directory / name) for name in (*names, f"{MSR_TRAIN}.txt", f"{MSR_TEST}.txt"))


def _folder(task: Task, directory: Path) -> Path | None:
    if _is_own(directory):
        return directory
    names = {key(task.name)} | ({"msrparaphrasecorpus"} if task.name == "MRPC" else set())  # as Microsoft calls it
    try:
        inside = sorted(path for path in directory.iterdir() if path.is_dir() and key(path.name) in names)
    except OSError as error:
        raise UserError(f"{directory} is no directory that can be read ({error.strerror}).") from error
    return min(inside, key=lambda path: path.name != task.name, default=None)  # the official name before others


def _is_msr(task: Task, folder: Path | None) -> bool:
    return (
        task.name == "MRPC"
        and folder is not None
        and not os.path.isfile(folder / "train.tsv")
        and any(os.path.isfile(folder / f"{name}.txt") for name in (MSR_TRAIN, MSR_TEST))
    )


def _files(task: Task, folder: Path) -> dict[str, Path]:
    """Returns the file of each split, whether it is there or not."""
    if _is_msr(task, folder):
        train, test = folder / f"{MSR_TRAIN}.txt", folder / f"{MSR_TEST}.txt"
        return {"train": train, MSR_TEST: test, "test": test}
    return _tsv_files(task, folder)


def _tsv_files(task: Task, folder: Path) -> dict[str, Path]:
    return {split: folder / f"{split}.tsv" for split in ("train", *dev_splits(task), *test_splits(task))}


def lacking(task: Task, directory: Path, splits: Sequence[str]) -> str:
    """Returns a sentence that says which files of a task are missing and which are there; "" if none is missing.

    Raises:
      UserError: if the directory or the task's folder can't be read.
    """
    folder = _folder(task, directory)
    if folder is None:
        return f"{task.name}: {directory} has neither a folder {task.name} nor a train.tsv of its own."
    try:
        present = {name for name in os.listdir(folder) if os.path.isfile(folder / name)}
    except OSError as error:
        raise UserError(f"{folder} is no directory that can be read ({error.strerror}).") from error
    files = _files(task, folder)
    missing = list(dict.fromkeys(files[split].name for split in splits if files[split].name not in present))
    if not missing:
        return ""
    known = list(dict.fromkeys(path.name for path in files.values() if path.name in present))
    there = f"holds {' and '.join(known)}, but no" if known else "holds no"
    why = ""
    if files["train"].name in missing:
        why = ", so there is nothing to train on"
    elif not {files[split].name for split in dev_splits(task, directory)}.isdisjoint(missing):
        why = ", so there is nothing to judge by (finetune.holdout=0.1 keeps back a part of the training examples)"
    return f"{task.name}: {folder} {there} {' and no '.join(missing)}{why}."


def load(task: Task, directory: Path | None, splits: Sequence[str]) -> dict[str, Examples]:
    """Reads splits of a task.

    Args:
      task: the task.
      directory: the task's own folder, or the one that contains it; None reads the hub.
      splits: of "train", `dev_splits` and `test_splits`.

    Raises:
      UserError: naming the task and the folder or file that is missing, what `read_tsv` found wrong, or why the hub can't
        be read.
    """
    if directory is None:
        return {split: _from_hub(task, split) for split in splits}
    if missing := lacking(task, directory, splits):
        raise UserError(missing)
    folder = _folder(task, directory)
    assert folder is not None
    return {split: read_tsv(task, _files(task, folder)[split], not split.startswith("test")) for split in splits}


def check(task: Task, directory: Path, tests: bool = False) -> None:
    """Reads all of a task's files and discards them, so that errors are found before other work begins.

    Raises:
      UserError: as `load` does.
    """
    load(task, directory, ("train", *dev_splits(task, directory), *(test_splits(task) if tests else ())))


def read_tsv(task: Task, path: Path, labelled: bool) -> Examples:
    """Reads an official file: one row per line, columns found by their header, and quotes that are part of the text.

    Args:
      task: whose file it is.
      path: the file.
      labelled: whether it is a train or dev file; no labels are read from a test file.

    Raises:
      UserError: naming the file, and the line, column, label or byte that doesn't fit the task.
    """
    lines = _lines(path)
    has_header = not (labelled and task.headerless)
    header = lines[0].split("\t") if has_header and lines else list(task.headerless)
    if not lines:
        raise UserError(f"{path} has no examples.")
    wanted = [*task.columns, task.label_column] if labelled else list(task.columns)
    for column in wanted:
        if column not in header:
            there = ", ".join(header)
            raise UserError(f"{path} line 1 names no column {column!r}, which {task.name} needs; there are: {there}.")
    if len(lines) <= has_header:
        raise UserError(f"{path} has no examples.")
    at = [header.index(column) for column in wanted]
    index = header.index(task.index_column) if task.index_column in header else None

    # The first release of QQP has line breaks inside a handful of questions, so that such a row is two lines with too
    # few columns each (nyu-mll/GLUE-baselines issue 5, line 97931 of train). The usual readers skip both, and so does
    # this one. Test files must be complete: a submission has to answer every row.
    skippable = _QQP_FRAGMENTS if task.name == "QQP" and labelled else 0
    first: list[str] = []
    second: list[str] = []
    labels: list[float] = []
    ids: list[str] = []
    for number, line in enumerate(lines[has_header:], 1 + has_header):
        row = line.split("\t")
        if len(row) != len(header):
            if skippable:
                skippable -= 1
                continue
            raise UserError(f"{path} line {number} has {len(row)} columns, not {len(header)}: {', '.join(header)}.")
        first.append(row[at[0]])
        if task.pair:
            second.append(row[at[1]])
        if labelled:
            labels.append(_label(task, row[at[-1]], path, number))
        ids.append(str(len(ids)) if index is None else row[index])
    if not first:
        raise UserError(f"{path} has no examples: none of its lines has {len(header)} columns.")
    kind = np.float32 if task.regression else np.int32
    return Examples(first, second if task.pair else None, np.array(labels, kind) if labelled else None, ids)


def _lines(path: Path) -> list[str]:
    """Returns the file's lines without their ends; str.splitlines would also break at characters inside sentences."""
    try:
        raw = path.read_bytes()
        lines = raw.decode("utf-8").removeprefix("\ufeff").split("\n")
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path} line {line} is not UTF-8 text: byte {error.start} of the file can't be decoded.") from error
    lines = [line.removesuffix("\r") for line in lines]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _label(task: Task, text: str, path: Path, number: int) -> float:
    if not task.regression:
        if text not in task.label_values:
            accepted = ", ".join(task.label_values)
            raise UserError(f"{path} line {number}: {text!r} is no label of {task.name}; accepted: {accepted}.")
        return task.label_values.index(text)
    try:
        score = float(text)
    except ValueError:
        score = np.nan
    if not 0.0 <= score <= MAX_SCORE:
        raise UserError(f"{path} line {number}: {text!r} is no score of {task.name}; accepted: a number from 0 to 5.")
    return score


def _from_hub(task: Task, split: str) -> Examples:
    import datasets  # here, because it takes a second and reading files does not need it

    subset = key(task.name)
    try:
        table: Any = datasets.load_dataset(hub.GLUE, subset, split=split.replace("dev", "validation"))
    except Exception as error:  # no network, no cache, a proxy's answer: each raises another kind
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise UserError(f"{hub.GLUE} ({subset}, {split}) cannot be loaded from the hub: {reason}.") from error
    first, *second = [list(table[column]) for column in task.hub_columns or task.columns]
    labels = np.array(table["label"], np.float32 if task.regression else np.int32)
    secret = split.startswith("test") or bool((labels < 0).any())  # the hub writes -1 for a label it does not have
    return Examples(first, second[0] if second else None, None if secret else labels, [str(i) for i in table["idx"]])

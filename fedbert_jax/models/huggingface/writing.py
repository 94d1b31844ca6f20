"""Writing a model's directory: whole or not at all, and never over anything but an empty directory or an earlier export."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedbert_jax import __version__, disk
from fedbert_jax.config import ExportConfig, ModelConfig
from fedbert_jax.data.tokenizer import save_tokenizer
from fedbert_jax.errors import UserError
from fedbert_jax.models.bert import Params
from fedbert_jax.models.huggingface.names import CLASSIFIER_CLIENT, CLIENT, Tensors, to_tensors
from fedbert_jax.models.huggingface.settings import hf_config

WEIGHTS, SETTINGS, CARD = "model.safetensors", "config.json", "README.md"
# Every file name that an export may have; a directory with any other holds somebody's files.
FILES = frozenset(
    {
        WEIGHTS,
        SETTINGS,
        CARD,
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.txt",
    }
)
MARK = "fedbert_jax"  # in the weights' metadata. Weights written over them by another program lack it, so those are safe.
TEMPORARY = ".fedbert-export-"  # prefix of the directories in which exports are made, beside their place
ACCEPTED = "accepted: a new directory, an empty one, or an earlier export of this program"


def save(
    directory: Path,
    client_params: Params,
    server_params: Params,
    model: ModelConfig,
    tokenizer: Any,
    card: str,
    labels: Sequence[str] = (),
    regression: bool = False,
    export: ExportConfig | None = None,
) -> None:
    """Writes a directory that `AutoModelForMaskedLM.from_pretrained` and `pipeline("fill-mask")` load.

    It appears as a whole or not at all. It replaces an earlier export that is there, but nothing else. With `labels`, the
    client segment is a classifier, and `AutoModelForSequenceClassification` loads it.

    Raises:
      UserError: as in `check_target`, or if it can't be written; then everything stays as it was.
    """
    tensors = to_tensors(client_params, server_params, CLASSIFIER_CLIENT if labels else CLIENT)
    settings = hf_config(model, tokenizer, labels, regression, export)
    place = check_target(directory)
    try:
        with _workshop(place.parent) as workshop:
            new = workshop / "new"
            new.mkdir()
            _write(new, tensors, settings, tokenizer, card)
            _put(new, place, workshop / "old")
    except UserError:
        raise
    except Exception as error:
        if not _of_files(error):
            raise
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()).rstrip(".")
        raise UserError(f"the model can't be written to {directory} ({reason}).") from error


def check_target(directory: Path) -> Path:
    """Returns the resolved path of a directory, if an export may go there.

    An earlier export is recognised by its contents: only files of an export, and weights that this program wrote. A
    directory in which somebody trained the model further, or put other files beside it, is not taken for one.

    Raises:
      UserError: for a file, a broken link, the current directory, a mount point, a directory that holds anything else, or
        one that can't be made or written.
    """
    try:
        if directory.is_symlink() and not directory.exists():
            raise UserError(f"{directory} is a link that leads nowhere; {ACCEPTED}.")
        place = directory.resolve()
        if place.exists():
            _check_existing(directory, place)
        above = next(path for path in place.parents if path.exists())
        if not above.is_dir():
            raise UserError(f"{directory} can't be made, since {above} is no directory; {ACCEPTED}.")
        if not os.access(above, os.W_OK | os.X_OK):
            raise UserError(f"{directory} can't be written, since {above} can't; give a place that can be.")
        return place
    except (OSError, RuntimeError) as error:  # a name that is too long, or circular links
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{directory} can't be written ({reason}); {ACCEPTED}.") from error


def _check_existing(directory: Path, place: Path) -> None:
    if not place.is_dir():
        raise UserError(f"{directory} is no directory; {ACCEPTED}.")
    if place.samefile(Path.cwd()):  # a shell would be left standing in a deleted directory
        raise UserError(f"{directory} is the current directory; {ACCEPTED}, named from elsewhere.")
    if os.path.ismount(place):
        raise UserError(f"{directory} is where a file system is mounted, which can't be replaced; give a directory in it.")
    names = sorted(os.listdir(place))
    if names and not is_export(place):
        others = [name for name in names if name not in FILES]
        what = f"it holds {_shown(others)}" if others else "its weights are not as this program wrote them"
        raise UserError(f"{directory} is not empty, and no earlier export of this program: {what}; {ACCEPTED}.")


def is_export(directory: Path) -> bool:
    """Whether a directory is an export of this program, and holds nothing else."""
    from safetensors import SafetensorError, safe_open

    names = set(os.listdir(directory))
    if not {WEIGHTS, SETTINGS} <= names <= FILES:
        return False
    if any((directory / name).is_symlink() or not (directory / name).is_file() for name in names):
        return False
    try:
        with safe_open(directory / WEIGHTS, framework="np") as opened:
            return MARK in (opened.metadata() or {})
    except (SafetensorError, OSError):
        return False


def remove(directory: Path) -> None:
    """Removes a directory if it is an export and holds nothing else."""
    if directory.is_dir() and is_export(directory):
        shutil.rmtree(directory, ignore_errors=True)


def _shown(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


def _of_files(error: Exception) -> bool:
    """Whether an error is one of writing files: `tokenizers` raises a bare Exception for a full disk."""
    from safetensors import SafetensorError

    return isinstance(error, (OSError, SafetensorError)) or type(error) is Exception


def _write(directory: Path, tensors: Tensors, settings: dict[str, Any], tokenizer: Any, card: str) -> None:
    from safetensors.numpy import save_file

    text = json.dumps(settings, indent=2) + "\n"
    (directory / SETTINGS).write_text(text, encoding="utf-8")
    (directory / CARD).write_text(card, encoding="utf-8", errors="backslashreplace")
    _save_tokenizer(tokenizer, directory, settings["max_position_embeddings"])
    save_file(tensors, directory / WEIGHTS, {"format": "pt", MARK: __version__})
    _sort_metadata(directory / WEIGHTS)
    shutil.copymode(directory / SETTINGS, directory / WEIGHTS)  # safetensors leaves it readable by its owner only


def _sort_metadata(file: Path) -> None:
    """Sorts a safetensors file's metadata, whose order varies from save to save, so that one model gives the same bytes."""
    with file.open("r+b") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:  # left as it is if the library writes it more compactly
            opened.seek(8)
            opened.write(text.ljust(size))


def _save_tokenizer(tokenizer: Any, directory: Path, longest: int) -> None:
    """Writes a tokenizer that by default truncates no text, and when asked to, truncates to the model's positions."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    limit = tokenizer.model_max_length
    usable = isinstance(limit, (int, float)) and 1 <= limit <= longest
    tokenizer.model_max_length = int(limit) if usable else longest
    # Settings left behind by truncation and padding, and by where and how the tokenizer was loaded.
    for name in (
        "max_length",
        "stride",
        "truncation_strategy",
        "pad_to_multiple_of",
        "is_local",
        "local_files_only",
        "name_or_path",
        "tokenizer_file",
        "vocab_file",
        "special_tokens_map_file",
    ):
        tokenizer.init_kwargs.pop(name, None)
    save_tokenizer(tokenizer, directory)


def _put(new: Path, place: Path, old: Path) -> None:
    """Renames a finished directory into its place; an earlier export that is there is first moved aside to `old`."""
    if not place.exists() or not os.listdir(place):
        if place.exists():
            shutil.copymode(place, new)
        os.replace(new, place)  # over nothing, or over an empty directory
        return
    shutil.copymode(place, new)
    os.replace(place, old)
    try:
        if not is_export(old):  # something was put there in the meantime
            raise UserError(f"{place} is no earlier export of this program any more; {ACCEPTED}.")
        os.replace(new, place)
    except BaseException:
        os.replace(old, place)
        raise
    os.replace(old, new)  # to the name that clearing the workshop removes


@contextlib.contextmanager
def _workshop(beside: Path) -> Iterator[Path]:
    """Makes a directory with a unique name in which to make an export, and removes it again, with whatever failed in it.

    A killed process leaves it behind. The next export there removes it, since no living process has it locked.
    """
    above = [path for path in (beside, *beside.parents) if not path.exists()]  # these are made, and removed on failure
    beside.mkdir(parents=True, exist_ok=True)
    try:
        _clear(beside)
        workshop = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=beside))
        with contextlib.ExitStack() as held:
            with contextlib.suppress(OSError):  # on a file system without locks, or on Windows, nothing is cleared
                lock = os.open(workshop, os.O_RDONLY)
                held.callback(os.close, lock)
                disk.lock(lock)
            try:
                yield workshop
            finally:
                shutil.rmtree(workshop / "new", ignore_errors=True)
                with contextlib.suppress(OSError):  # it isn't empty if an earlier export could not be put back
                    workshop.rmdir()
    except BaseException:
        with contextlib.suppress(OSError):
            for path in above:
                path.rmdir()
        raise


def _clear(directory: Path) -> None:
    """Removes workshops of killed processes: with our prefix, unlocked, a minute old, with at most an unfinished export."""
    for path in directory.glob(f"{TEMPORARY}*"):
        with contextlib.suppress(OSError):
            inside = os.listdir(path)
            unfinished = os.listdir(path / "new") if inside == ["new"] else []
            ours = inside in ([], ["new"]) and all(name in FILES or name.startswith(".tmp") for name in unfinished)
            if path.is_symlink() or not ours or time.time() - path.stat().st_mtime < 60:
                continue
            lock = os.open(path, os.O_RDONLY)
            try:
                disk.lock(lock)
                shutil.rmtree(path)
            finally:
                os.close(lock)

"""Reading a checkpoint's directory: its config.json, and its tensors from safetensors. Nothing is ever unpickled."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedbert_jax.errors import UserError
from fedbert_jax.models.huggingface.names import Tensors

FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors calls them


def load_tensors(directory: Path) -> tuple[Tensors, dict[str, Any]]:
    """Reads a checkpoint directory's safetensors (one file, or shards by their index) and its config.json.

    Returns:
      (tensors, config.json). Tensors of any floating type become float32; others, which BERT doesn't need, are left out.

    Raises:
      UserError: if there are none, or they can't be read. Nothing is ever unpickled.
    """
    hf, tensors = read_config(directory), {}
    for file in _weight_files(directory, hf):
        tensors.update(_read_safetensors(file))
    return tensors, hf


def read_config(directory: Path) -> dict[str, Any]:
    """Reads a checkpoint directory's config.json; raises UserError if it is missing or invalid."""
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory} holds no config.json; accepted: a Hugging Face BERT directory.")
    return _read_json(directory / "config.json")


def conversion(source: str, target: str, hf: Mapping[str, Any], tokenizer: bool = False) -> str:
    """Returns the command that converts the pickled weights of a model, a directory or a hub name, to safetensors."""
    named = [a for a in hf.get("architectures") or () if re.fullmatch(r"Bert\w+", str(a))]
    kinds = [named[0] if named else "BertForPreTraining"] + ["AutoTokenizer"] * tokenizer
    code = "; ".join(f"t.{kind}.from_pretrained({source!r}).save_pretrained({target!r})" for kind in kinds)
    return f'python -c "import transformers as t; {code}"'  # transformers 5 always writes safetensors, 4.35 by default


def _weight_files(directory: Path, hf: Mapping[str, Any]) -> list[Path]:
    """Returns the files that hold the weights, searched for as in `transformers`: one file before an index."""
    one, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if one.is_file():
        return [one]
    if index.is_file():
        shards = _read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(f, str) for f in shards.values()):
            raise UserError(f"{index} has no weight_map from tensors to files; download it again.")
        files = [directory / file for file in sorted(set(shards.values()))]
        lost = [file.name for file in files if not file.is_file()]
        if lost:
            raise UserError(f"{directory} lacks {', '.join(lost)}, which {index.name} names; download it again.")
        return files
    others = sorted(directory.glob("*.safetensors"))
    if len(others) == 1:
        return others
    if others:
        names = ", ".join(file.name for file in others)
        raise UserError(f"{directory} holds {names}; accepted: model.safetensors, or shards and their {index.name}.")
    if any(directory.glob("pytorch_model*.bin")):
        command = conversion(str(directory), str(directory), hf)
        raise UserError(f"{directory} holds pickled weights only, which are never read; convert them, with torch: {command}")
    raise UserError(f"{directory} holds no {one.name} and no {index.name}.")


def _read_safetensors(file: Path) -> Tensors:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as opened:  # bfloat16 through ml_dtypes, which jax has imported
            kinds = {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
            floats = [name for name, kind in kinds.items() if kind in FLOATS]
            odd = [name for name in kinds.keys() - floats if name.endswith((".weight", ".bias", ".gamma", ".beta"))]
            if odd:
                raise UserError(f"{file} has weights of type {kinds[odd[0]]}; accepted: {', '.join(FLOATS)}.")
            with np.errstate(over="ignore"):  # numbers too large for float32 become infinite, and are refused as that
                return {name: np.asarray(opened.get_tensor(name), np.float32) for name in floats}
    except (SafetensorError, OSError) as e:
        reason = " ".join(str(e).split()).rstrip(".")
        raise UserError(f"{file} can't be read: it is damaged or not all there ({reason}).") from e


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as e:
        raise UserError(f"{file} can't be read as JSON ({e}).") from e
    if not isinstance(value, dict):
        raise UserError(f"{file} holds a {type(value).__name__}; accepted: a JSON object.")
    return value


def local(name: str) -> Path:
    """Returns the directory of a checkpoint: a local one, or the hub's, downloaded."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"config key model.init_from={name!r} is a file; accepted: its directory, with a config.json.")
    from huggingface_hub import snapshot_download

    try:
        found = Path(
            snapshot_download(name, allow_patterns=["*.json", "*.txt", "model*.safetensors"], ignore_patterns="*/*")
        )
    except Exception as e:
        first = str(e).strip().splitlines()[0][:200] if str(e).strip() else type(e).__name__
        raise UserError(f"config key model.init_from={name!r}: no such directory, and the hub says: {first}") from e
    if not any(found.glob("*.safetensors")):
        target = name.rpartition("/")[2]
        command = conversion(name, target, read_config(found), tokenizer=True)
        raise UserError(
            f"config key model.init_from={name!r} has no safetensors on the hub, and pickled weights are never read; "
            f"convert them, with torch, and start from {target!r}: {command}"
        )
    return found

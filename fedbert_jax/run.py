"""What a run is made of: its data, its model, its simulation. Built the same way to train, to resume and to export."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from fedbert_jax import config as config_lib
from fedbert_jax import disk, distributed, huggingface
from fedbert_jax.checkpoint import Checkpoints
from fedbert_jax.config import Config
from fedbert_jax.data.dataset import Dataset, prepare
from fedbert_jax.data.masking import MaskSpec, num_masked
from fedbert_jax.data.tokenizer import continuation_mask, special_ids
from fedbert_jax.errors import ConfigError, UserError
from fedbert_jax.federated.setting import State
from fedbert_jax.runtime.simulation import Simulation
from fedbert_jax.sharding import make_mesh
from fedbert_jax.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class Run:
    """A run, ready for its first or its next round."""

    config: Config  # resolved
    workdir: Workdir
    dataset: Dataset
    tokenizer: Any
    simulation: Simulation


def build(
    config: Config, workdir: Workdir, progress: Callable[[str], None] = lambda _: None,
    warn: Callable[[str], None] = lambda _: None,
) -> Run:  # fmt: skip
    """Prepares the data (or takes what the workdir has) and compiles nothing yet.

    Of several processes the first prepares it; the others map the same files into memory.
    """
    mesh = make_mesh(config.mesh)
    data: list[tuple[Dataset, Any]] = []

    def prepared() -> str:
        with disk.writing(workdir.data):
            data.append(prepare(config, workdir.data, progress=progress, warn=warn))
        return ""

    distributed.share(prepared)
    if not data:
        if not distributed.await_file(workdir.data / "meta.json", seconds=60):
            raise UserError(f"process {jax.process_index()} doesn't see the data that process 0 prepared in {workdir.data}.")
        data.append(prepare(config, workdir.data, progress=progress, warn=warn))
    ((dataset, tokenizer),) = data
    config = resolve(config, dataset.vocab_size)
    if dataset.train.num_clients == 1 and config.federated.arrangement != "pooled":
        keys = "data.client_field, data.client_pattern and data.partition"
        warn(f"there is one client only, so nothing is federated; {keys} say who holds which text.")
    mask = MaskSpec(
        num_masked=num_masked(config.mlm.mask_prob, config.data.seq_len),
        vocab_size=dataset.vocab_size,
        mask_id=tokenizer.mask_token_id,
        special_ids=tuple(special_ids(tokenizer)),
        continuation=continuation_mask(tokenizer) if config.mlm.whole_word else None,
    )
    simulation = Simulation(config, dataset.train, dataset.heldout, mask, mesh)
    return Run(config, workdir, dataset, tokenizer, simulation)


def resolve(config: Config, vocab_size: int) -> Config:
    """Fills in the model's sizes: those set, then those of the checkpoint it starts from, then the preset's.

    Raises:
      UserError: if the vocabulary doesn't fit the embedding, a size set differs from the checkpoint's, or the checkpoint
        is no BERT.
    """
    model = config.model
    if model.init_from:
        hf = huggingface.read_config(local(model.init_from))
        for name, size in huggingface.sizes_of(hf, model.init_from).items():
            given = getattr(model, name)
            default = getattr(config_lib.ModelConfig(), name)
            if given not in (None, default, size):
                raise ConfigError(f"config key model.{name}={given!r}: accepted with model.init_from: {size}.")
            model = dataclasses.replace(model, **{name: size})
    model = config_lib.resolve_model(model, vocab_size)
    assert model.vocab_size is not None
    if model.vocab_size < vocab_size:
        raise ConfigError(
            f"config key model.vocab_size={model.vocab_size}"
            + (f" (of model.init_from={model.init_from!r})" if model.init_from else "")
            + f": accepted: at least {vocab_size}, the tokenizer's vocabulary."
        )
    config = dataclasses.replace(config, model=model)
    config_lib.validate(config)
    return config


def initial_state(run: Run) -> tuple[State, list[str]]:
    """Returns the state before round 0, and the parts that the starting checkpoint lacked (initialised instead)."""
    init_from = run.config.model.init_from
    if not init_from:
        return run.simulation.init_state(), []
    client, server = jax.jit(run.simulation.setting.fresh)()
    tensors, _ = huggingface.load_tensors(local(init_from))
    client, server, missing = huggingface.from_tensors(tensors, client, server)
    return run.simulation.state_of(client, server), huggingface.describe_missing(missing)


def restore(run: Run, checkpoints: Checkpoints, round: int) -> tuple[State, dict[str, Any]]:
    """Restores the state after `round` finished rounds, and what was saved beside it."""
    return checkpoints.restore(round, run.simulation.state_shape, run.simulation.state_sharding)


def export(run: Run, state: State, directory: Path, facts: dict[str, Any], client: str = "") -> str:
    """Writes a Hugging Face directory of the model that a client would use.

    Every process has to call it, since the model may be spread over them; the first writes.

    Args:
      run: the run.
      state: its state.
      directory: replaced if it is there.
      facts: for the model card.
      client: a client's name; needed only where each has a model of its own (`local`, `private` body).

    Returns:
      The name of the client whose model it is; "" where all share one.

    Raises:
      UserError: if there is no such client.
    """
    f, names = run.config.federated, run.dataset.client_names
    if client and client not in names:
        shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        raise UserError(f"there is no client {client!r} in {run.workdir.root}; accepted: {shown}.")
    own = f.strategy == "local" or f.body == "private"
    name = (client or names[0]) if own else ""
    model = run.simulation.model_of(state, names.index(name) if name else 0)
    if distributed.first():
        card = huggingface.model_card(run.config, facts | ({"client": name} if name else {}))
        client_params, server_params = jax.device_get(model)
        with disk.writing(directory):
            huggingface.save(directory, client_params, server_params, run.config.model, run.tokenizer, card)
    return name


def local(name: str) -> Path:
    """Returns the directory of a checkpoint: a local one, or the hub's, downloaded."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"config key model.init_from={name!r} is a file; accepted: its directory, with a config.json.")
    from huggingface_hub import snapshot_download

    try:
        found = Path(snapshot_download(
            name, allow_patterns=["*.json", "*.txt", "model*.safetensors"], ignore_patterns="*/*"
        ))  # fmt: skip
    except Exception as e:
        first = str(e).strip().splitlines()[0][:200] if str(e).strip() else type(e).__name__
        raise UserError(f"config key model.init_from={name!r}: no such directory, and the hub says: {first}") from e
    if not any(found.glob("*.safetensors")):
        target = name.rpartition("/")[2]
        command = huggingface.conversion(name, target, huggingface.read_config(found), tokenizer=True)
        raise UserError(
            f"config key model.init_from={name!r} has no safetensors on the hub, and pickled weights are never read; "
            f"convert them, with torch, and start from {target!r}: {command}"
        )
    return found

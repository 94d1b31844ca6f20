"""Builds a run's data, model and simulation, in the same way to train, to resume and to export."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from fedbert_jax import config as config_lib
from fedbert_jax import disk
from fedbert_jax.config import HUB_NAME, Config
from fedbert_jax.config.dp import check_clients
from fedbert_jax.data import hub
from fedbert_jax.data.dataset import Dataset, prepare
from fedbert_jax.data.masking import MaskSpec, mask_blocks, num_masked
from fedbert_jax.data.neutral import Neutral, neutral_text
from fedbert_jax.data.progress import Progress
from fedbert_jax.data.tokenizer import continuation_mask, load_tokenizer, special_ids, vocab_size
from fedbert_jax.devices import processes
from fedbert_jax.devices.mesh import make_mesh
from fedbert_jax.devices.tuning import compute_dtype, resolve_attention
from fedbert_jax.errors import ConfigError, UserError, about
from fedbert_jax.federated import optim
from fedbert_jax.federated.setting import Setting, make_setting
from fedbert_jax.federated.state import State
from fedbert_jax.models import huggingface
from fedbert_jax.models.bert import make_segments
from fedbert_jax.privacy import accountant
from fedbert_jax.runtime.fill_mask import check_sentences
from fedbert_jax.runtime.simulation import Simulation
from fedbert_jax.workdir import resume
from fedbert_jax.workdir.checkpoint import Checkpoints
from fedbert_jax.workdir.log import read_metrics
from fedbert_jax.workdir.paths import Workdir, check_same


@dataclasses.dataclass(frozen=True)
class Run:
    """A run, ready for its first or its next round."""

    config: Config  # resolved
    workdir: Workdir
    dataset: Dataset
    tokenizer: Any
    simulation: Simulation
    extra: Neutral | None = None  # `eval.extra`


def open_run(config: Config, workdir: Workdir, progress: Progress, warn: Callable[[str], None]) -> Run:
    """Makes a run ready for its next round, and writes its config once everything about it is accepted.

    Args:
      config: as given on the command line.
      workdir: the run's, locked.
      progress: called with the progress of the data's preparation.
      warn: called with whatever looks wrong but can still be run.

    Raises:
      UserError: for what the user can fix.
    """
    made = resume.newest(workdir.checkpoints)
    if processes.share(lambda: resume.put_back(workdir, made)):
        warn(f"{workdir.config} was not there; it is put back as the checkpoint of round {made.round} has it.")
    old = workdir.read_config() if workdir.exists() else None
    if old is not None:
        resume.check_unedited(workdir.config, old, made)
        config = config_lib.as_begun(config, old)
        check_same(old, resolve(config, old.model.vocab_size or 0), harmless=resume.harmless(config, made))
    else:
        check_start(config)
    run = build(config, workdir, progress=progress, warn=warn)
    steps_per_round = run.simulation.strategy.steps_per_round
    resume.check(run.config, made, steps_per_round, old)
    clients = run.simulation.feed.num_clients
    for sentence in [*optim.warnings(run.config, steps_per_round), *accountant.warnings(run.config, clients)]:
        warn(sentence)
    if run.config.model.init_from and run.config.privacy.client_seed is not None:
        warn("privacy.client_seed doesn't hide the segment that training begins with: that is model.init_from's.")
    if processes.first():
        workdir.write_config(run.config)
    return run


def build(
    config: Config,
    workdir: Workdir,
    progress: Progress | None = None,
    warn: Callable[[str], None] = lambda _: None,
    begun: bool = False,
) -> Run:
    """Prepares the data (or takes what the workdir has) and compiles nothing yet.

    With several processes, the first one prepares the data and the others map the same files into memory. With `begun`, the
    config is the workdir's own, and the checkpoint that the run started from need not be there any more.
    """
    mesh = make_mesh(config.mesh)
    old = workdir.read_config() if workdir.exists() else None
    if not (workdir.data / "meta.json").exists():
        check_before_reading(config)
    data: list[tuple[Dataset, Any]] = []

    def prepared() -> str:
        with disk.writing(workdir.data):
            data.append(prepare(config, workdir.data, progress=progress, warn=warn))
            if config.eval.extra:
                neutral_text(config, workdir.data, data[0][1], warn)
        return ""

    processes.share(prepared)
    if not data:
        if not processes.await_file(workdir.data / "meta.json", seconds=60):
            raise UserError(f"process {jax.process_index()} doesn't see the data that process 0 prepared in {workdir.data}.")
        data.append(prepare(config, workdir.data, progress=progress, warn=warn))
    ((dataset, tokenizer),) = data
    if not begun:
        blocks = len(dataset.train.tokens)
        config = config_lib.work_out(resolve(config, dataset.vocab_size), blocks, dataset.train.num_clients, old)
        config_lib.validate(config)
        check_clients(config, dataset.train.num_clients)
        check_sentences(config.fill_mask, tokenizer, config.model.max_position_embeddings)
    if dataset.train.num_clients == 1 and not config.federated.arrangement.pools_text:
        keys = "data.client_field, data.client_pattern and data.partition"
        warn(f"there is one client only, so nothing is federated; {keys} say who holds which text.")
    simulation = Simulation(config, dataset.train, dataset.heldout, mask_spec(config, tokenizer), mesh)
    extra = neutral_text(config, workdir.data, tokenizer, warn) if config.eval.extra else None
    return Run(config, workdir, dataset, tokenizer, simulation, extra)


def mask_spec(config: Config, tokenizer: Any) -> MaskSpec:
    """Returns what masking needs to know of a tokenizer's vocabulary."""
    return MaskSpec(
        num_masked=num_masked(config.mlm.mask_prob, config.data.seq_len),
        vocab_size=vocab_size(tokenizer),
        mask_id=tokenizer.mask_token_id,
        special_ids=tuple(special_ids(tokenizer)),
        continuation=continuation_mask(tokenizer) if config.mlm.whole_word else None,
    )


def party_setting(config: Config, mask: MaskSpec, clients: int, cohort: int) -> Setting:
    """Returns the setting of one party of a federation: what the simulation's is, for the same clients."""
    span = optim.schedule_span(config.federated, config.federated.steps_per_round(cohort))
    segments = make_segments(resolve_attention(config).model, compute_dtype(config))
    return make_setting(config, segments, functools.partial(mask_blocks, spec=mask), clients, cohort, span)


def check_before_reading(config: Config) -> None:
    """Refuses what can be refused before any text is read, since reading may take long.

    Raises:
      UserError: for a tokenizer or a checkpoint that isn't there or doesn't fit, or a setting that the devices don't allow.
    """
    if config.data.store == "device" and jax.process_count() > 1:
        raise ConfigError("config key data.store='device': accepted with several processes: 'auto' or 'memmap'.")
    if config.model.init_from:
        huggingface.local(config.model.init_from)
    name = config.data.tokenizer or config.model.init_from
    tokenizer = None if name.startswith("train:") else load_tokenizer(name)
    resolved = resolve(config, vocab_size(tokenizer) if tokenizer else 1)
    if tokenizer:
        special_ids(tokenizer)
        check_sentences(config.fill_mask, tokenizer, resolved.model.max_position_embeddings)
        if config.mlm.whole_word:
            continuation_mask(tokenizer)
    if config.model.attention == "cudnn":
        resolve_attention(resolved)


def resolve(config: Config, vocab_size: int) -> Config:
    """Fills in the model's sizes: those set, else those of the checkpoint it starts from, else the preset's.

    What an export says about the checkpoint and the text is filled in, too, since a later export may find neither of them.

    Raises:
      UserError: if the vocabulary doesn't fit the embedding, a size that is set differs from the checkpoint's, or the
        checkpoint is not a BERT.
    """
    model = config.model
    hf: dict[str, Any] = {}
    if model.init_from:
        with about("config key model.init_from"):
            hf = huggingface.read_config(huggingface.local(model.init_from))
            sizes = huggingface.sizes_of(hf, model.init_from)
        for name, size in sizes.items():
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
    config = dataclasses.replace(config, model=model, export=_said_of(config, hf))
    config_lib.validate(config)
    return config


def _said_of(config: Config, hf: dict[str, Any]) -> config_lib.ExportConfig:
    """Returns `export` with what is known about a run's origins; `hf` is its starting checkpoint's config.json, or empty."""
    export, model = config.export, config.model
    kind, _, what = config.data.source.partition(":")
    # Over a network, a client's examples are its own, in GLUE's layout.
    glue = hub.GLUE if kind == "glue" and config.task == "finetune" else ""
    text = "/".join(what.split("/")[:2]) if kind == "hf" else glue
    found: dict[str, Any] = {
        "base_model": _hub_name(model.init_from),
        "datasets": _hub_name(text),
        "hidden_dropout": None if model.hidden_dropout else huggingface.dropout_of(hf, "hidden_dropout_prob"),
        "attention_dropout": None if model.attention_dropout else huggingface.dropout_of(hf, "attention_probs_dropout_prob"),
    }
    return dataclasses.replace(export, **{name: value for name, value in found.items() if getattr(export, name) is None})


def _hub_name(name: str) -> str:
    """Returns a name if it is a hub name, "" if it is a path: one that exists, or that can't be a hub name."""
    path = Path(name).expanduser()
    here = any(place.exists() for place in (path, *path.parents) if place != Path("."))
    return name if re.fullmatch(HUB_NAME, name) and not here else ""


def check_start(config: Config) -> None:
    """Raises UserError if a run can't start from its checkpoint, before any text is read."""
    if config.model.init_from:
        with about("config key model.init_from"):
            tensors, hf = huggingface.load_tensors(huggingface.local(config.model.init_from))
            huggingface.sizes_of(hf, config.model.init_from)
            huggingface.check_finite(tensors)


def initial_state(run: Run) -> tuple[State, list[str]]:
    """Returns the state before round 0, and the parts that the starting checkpoint lacked (initialised instead)."""
    init_from = run.config.model.init_from
    if not init_from:
        return run.simulation.init_state(), []
    client, server = jax.jit(run.simulation.setting.fresh)()
    with about("config key model.init_from"):
        tensors, _ = huggingface.load_tensors(huggingface.local(init_from))
        client, server, missing = huggingface.from_tensors(tensors, client, server)
    return run.simulation.state_of(client, server), huggingface.describe_missing(missing)


def restore(run: Run, checkpoints: Checkpoints, round: int) -> tuple[State, dict[str, Any]]:
    """Restores the state after `round` finished rounds, and the metadata saved beside it."""
    return checkpoints.restore(round, run.simulation.state_shape, run.simulation.state_sharding)


def export(run: Run, state: State, directory: Path, facts: dict[str, Any], client: str = "") -> str:
    """Writes a Hugging Face directory of the model that a client would use.

    Every process has to call it, since the model may be spread over them; only the first one writes.

    Args:
      run: the run.
      state: its state.
      directory: a new or empty one, or an earlier export, which is replaced.
      facts: for the model card.
      client: a client's name; needed only if each has a model of its own (`local`, `private` body).

    Returns:
      The name of the client whose model it is; "" if all share one.

    Raises:
      UserError: if there is no such client, or the directory is anything else or can't be written.
    """
    f, names = run.config.federated, run.dataset.client_names
    if client and client not in names:
        shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
        raise UserError(f"--client {client!r}: there is no client of that name in {run.workdir.root}; accepted: {shown}.")
    name = (client or names[0]) if f.arrangement.keeps_own else ""
    model = run.simulation.model_of(state, names.index(name) if name else 0)
    if processes.first():
        card = huggingface.model_card(run.config, facts | _evaluated(run.workdir, facts.get("round"), name))
        client_params, server_params = jax.device_get(model)
        with disk.writing(directory):
            huggingface.save(
                directory, client_params, server_params, run.config.model, run.tokenizer, card, export=run.config.export
            )
    return name


def _evaluated(workdir: Workdir, round: int | None, client: str) -> dict[str, Any]:
    """Returns what the metrics add to a model card's facts: the round of the scores, and the client's own scores."""
    records = read_metrics(workdir.metrics) if workdir.metrics.is_file() and round is not None else []
    scored = [r for r in records if r["round"] <= round and "eval_loss" in r]
    facts: dict[str, Any] = {"eval_round": scored[-1]["round"]} if scored else {}
    if client:
        each = scored[-1].get("eval_clients") if scored else None
        facts |= {"client": client, "client_scores": (each or {}).get(client)}
    return facts

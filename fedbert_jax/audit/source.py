"""What an audit takes from a run, of pre-training or of a fine-tuned task: its programs, its data, and its segments."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fedbert_jax.config import Config
from fedbert_jax.data.streams import Seeds, secrets
from fedbert_jax.data.tokenizer import load_tokenizer, special_ids, vocab_size
from fedbert_jax.errors import UserError
from fedbert_jax.experiment import initial_state, mask_spec, restore
from fedbert_jax.federated.rounds import make_strategy
from fedbert_jax.federated.setting import Setting
from fedbert_jax.federated.state import Cohort, Pair, State
from fedbert_jax.finished import changed, elsewhere, reopen
from fedbert_jax.glue.examples import read_task
from fedbert_jax.glue.simulation import Finetuning
from fedbert_jax.glue.start import Checkpoint, resolve
from fedbert_jax.models import huggingface
from fedbert_jax.models.bert import ClientParams
from fedbert_jax.workdir.paths import Workdir

Segment = Callable[[], "ClientParams | str"]  # a client segment, or in words why nobody has it


@dataclasses.dataclass(frozen=True)
class Source:
    """A run, ready to be replayed."""

    config: Config  # resolved
    setting: Setting
    mesh: Mesh
    tokenizer: Any
    vocab_size: int  # V, of the tokenizer
    special_ids: tuple[int, ...]
    text: tuple[np.ndarray, ...]  # its own, as tokens [n, T]
    state: State  # with which the round begins
    round: int  # the checkpoint's
    segments: dict[str, Segment]  # those that somebody may know, by kind of knowledge
    clients: tuple[str, ...]  # their names
    replayed: int  # the round that is attacked
    before: tuple[int, ...]  # the rounds before that, the last one first; if there is none, that one
    cohort: Callable[[int], Cohort] | None = None  # a round's data, from 0; None: rounds were recorded

    def rate(self) -> float:
        """Returns the clients' learning rate as the attacked round begins, as a share of its peak."""
        steps = self.setting.config.federated.steps_per_round(self.setting.cohort)
        return float(self.setting.client_tx.schedule(np.int32(self.replayed * steps))) / (
            self.config.client_optimizer.learning_rate or 1.0
        )

    def counts(self) -> np.ndarray:
        """Returns how often each word is in the run's text, float64 [V]; 0 for special tokens."""
        found = sum(np.bincount(tokens.ravel(), minlength=self.vocab_size) for tokens in self.text)
        counts = np.asarray(found, np.float64)
        counts[list(self.special_ids)] = 0
        return counts


def open_source(root: Path, round: int | None, supposed: dict[str, Any]) -> Source:
    """Opens a run's workdir.

    Args:
      root: the workdir.
      round: which checkpoint; None: the newest.
      supposed: keys of the wire, dotted, that are taken to be set.

    Raises:
      UserError: if there is no such run or checkpoint, or nothing crosses in it.
    """
    config = Workdir(root).read_config()
    if not config.federated.arrangement.cut:
        raise UserError(
            f"{root} is a run of federated.strategy={config.federated.strategy!r}, in which no activations cross; accepted: "
            "runs of strategies with a cut."
        )
    if config.task == "join":
        raise UserError(
            f"{root} is a client's workdir (task='join'), which has no messages of others; audit its server's, with "
            f"--clients {root}."
        )
    if config.task == "finetune":
        return _finetuned(root, round, supposed)
    return _pretrained(root, round, supposed)


def _pretrained(root: Path, round: int | None, supposed: dict[str, Any]) -> Source:
    run, checkpoints, at = reopen(root, round, supposed)
    setting = run.simulation.setting
    state, _ = restore(run, checkpoints, at)

    def old() -> ClientParams | str:
        earlier = [n for n in checkpoints.rounds() if n < at]
        return restore(run, checkpoints, earlier[-1])[0].model.client if earlier else "there is no earlier checkpoint"

    def checkpoint() -> ClientParams | str:
        if not run.config.model.init_from:
            return "training began with random numbers"
        return initial_state(run)[0].model.client

    own = setting.how.client == "own"
    none: dict[str, Segment] = dict.fromkeys(("segment", "old_segment"), lambda: "every client has its own")
    known: dict[str, Segment] = {"segment": lambda: state.model.client, "old_segment": old}
    return Source(
        config=run.config,
        setting=setting,
        mesh=run.simulation.mesh,
        tokenizer=run.tokenizer,
        vocab_size=run.dataset.vocab_size,
        special_ids=run.dataset.special_ids,
        text=(np.asarray(run.dataset.train.tokens), np.asarray(run.dataset.heldout.tokens)),
        state=state,
        round=at,
        cohort=run.simulation.feed.draw,
        replayed=at,
        before=tuple(range(at - 1, -1, -1)),
        segments=(none if own else known) | {"checkpoint": checkpoint, "seed": lambda: drawn(run.config, setting)},
        clients=run.dataset.client_names,
    )


def _finetuned(root: Path, round: int | None, supposed: dict[str, Any]) -> Source:
    workdir = Workdir(root)
    if round is not None:
        raise UserError(f"--round {round}: accepted with a fine-tuned task: none; it keeps the model that it ended with.")
    if not workdir.hf.is_dir():
        raise UserError(f"{root} has no model yet.")
    config = changed(elsewhere(workdir.read_config()), supposed)
    tokenizer = load_tokenizer(str(workdir.hf))
    config, start = resolve(config, tokenizer)
    tuning = Finetuning(config, read_task(config, tokenizer), start, (config.seed,))
    client, server = jax.jit(tuning.setting.fresh)()  # all of it is replaced
    client, server, _ = Checkpoint(huggingface.load_tensors(workdir.hf)[0])(client, server)

    def cohort(round: int) -> Cohort:
        order = tuning.order(round)
        rows = jax.tree.map(lambda x: x[0], tuning.batches(round))  # of the first seed
        return Cohort(rows, jnp.asarray(order, jnp.int32), jnp.asarray(tuning.weights)[order], jnp.int32(round))

    def checkpoint() -> ClientParams | str:
        return "training began with random numbers" if start is None else start(client, server)[0]

    whole = max(tuning.rounds - 2, 0)  # the last round may be short
    return Source(
        config=config,
        setting=tuning.setting,
        mesh=tuning.mesh,
        tokenizer=tokenizer,
        vocab_size=vocab_size(tokenizer),
        special_ids=tuple(special_ids(tokenizer)),
        text=(tuning.data.train.tokens,),
        state=make_strategy(tuning.setting).init(Pair(client, server)),
        round=tuning.rounds,
        cohort=cohort,
        replayed=whole,
        before=tuple(range(whole - 1, -1, -1)) or (whole,),
        segments={
            "segment": lambda: client,
            "old_segment": lambda: "a fine-tuned task keeps none",
            "checkpoint": checkpoint,
            "seed": lambda: drawn(config, tuning.setting),
        },
        clients=tuple(map(str, range(len(tuning.clients)))),
    )


def drawn(config: Config, setting: Setting) -> ClientParams | str:
    """Returns the segment that `seed` makes, if nothing is secret but the text."""
    if config.model.init_from:
        return "training began with a checkpoint"
    guessed = dataclasses.replace(setting, secrets=secrets(Seeds(config.seed, config.seed)))
    return jax.jit(guessed.fresh)().client


def num_masked(source: Source) -> int:
    """Returns at how many positions of a block [MASK] stands, more or less: 0 when fine-tuning."""
    return 0 if source.config.labelled else mask_spec(source.config, source.tokenizer).num_masked

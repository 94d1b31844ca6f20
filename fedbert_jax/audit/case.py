"""A run made ready to be audited: a round replayed, a log of what crossed before, and what each kind of knowledge grants."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedbert_jax.audit import public
from fedbert_jax.audit.attacks import KINDS
from fedbert_jax.audit.replay import Replay, log, replay
from fedbert_jax.audit.views import Aggregate, Known, Messages, Public, Truth, View
from fedbert_jax.data.partition import js_divergence
from fedbert_jax.data.streams import Seeds, secrets
from fedbert_jax.errors import UserError
from fedbert_jax.experiment import initial_state, restore
from fedbert_jax.federated.state import State
from fedbert_jax.finished import Reopened


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is attacked, and with how much."""

    blocks: int = 64  # that are attacked
    log: int = 1500  # of which message 1 was kept
    known: int = 10  # of the log's blocks whose text somebody knows
    old: int | None = None  # the round of the old segment; None: of the checkpoint before


class Case:
    """A run's round, its messages and the truth behind them.

    Args:
      opened: the run.
      sizes: see `Sizes`.
      source: of public text; "" for none.
      warn: called with what looks wrong.

    Raises:
      UserError: for a run in which nothing crosses, or public text that can't be read.
    """

    def __init__(self, opened: Reopened, sizes: Sizes, source: str, warn: Callable[[str], None]):
        run = opened.run
        if not run.config.federated.arrangement.cut:
            strategy = run.config.federated.strategy
            raise UserError(
                f"{run.workdir.root} is a run of federated.strategy={strategy!r}, in which no activations cross; accepted: "
                "runs of strategies with a cut."
            )
        self.opened, self.sizes, self.source, self._warn = opened, sizes, source, warn
        self.run, self.round = run, opened.round

    @functools.cached_property
    def state(self) -> State:
        """With which the round begins."""
        return restore(self.run, self.opened.checkpoints, self.round)[0]

    @functools.cached_property
    def replay(self) -> Replay:
        """The round, `blocks` blocks of it, spread over its steps and clients."""
        found = replay(self.run, self.state, self.round)
        count = len(found.truth.tokens)
        rows = np.unique(np.linspace(0, count - 1, min(self.sizes.blocks, count)).astype(int))
        return found._replace(messages=found.messages.pick(rows), truth=found.truth.pick(rows))

    @functools.cached_property
    def log(self) -> tuple[Messages, Truth]:
        return log(self.run, self.state, self.round, self.sizes.log)

    @functools.cached_property
    def text(self) -> np.ndarray | None:
        """Public text, int [P, T]."""
        return public.read(self.run, self.source, self._warn) if self.source else None

    @functools.cached_property
    def divergence(self) -> float | None:
        """Bits between the word frequencies of public text and of the run's."""
        if self.text is None:
            return None
        theirs = np.bincount(self.text.ravel(), minlength=self.run.dataset.vocab_size)
        ours = self.run.dataset.unigram.copy()
        theirs[list(self.run.dataset.special_ids)] = ours[list(self.run.dataset.special_ids)] = 0
        return float(js_divergence([theirs], ours)[0])

    @functools.cached_property
    def frequencies(self) -> np.ndarray:
        """Of words in the run's training text, float64 [V]; 0 for special tokens."""
        counts = self.run.dataset.unigram.astype(np.float64)
        counts[list(self.run.dataset.special_ids)] = 0
        return counts / counts.sum()

    @functools.cached_property
    def view(self) -> View:
        """What every attacker has."""
        config, run = self.run.config, self.run
        facts = Public(
            segments=run.simulation.setting.segments,
            vocab_size=run.dataset.vocab_size,
            special_ids=run.dataset.special_ids,
            mask_id=run.tokenizer.mask_token_id,
            masked=self.replay.truth.labels.shape[1],
            clip=config.wire.clip,
            noise=config.wire.noise,
        )
        body = run.simulation.strategy.model_of(self.state, jnp.int32(0)).server
        return View(facts, self.replay.messages, self.log[0], jax.device_get(body), text=self.text)

    def granted(self, kind: str) -> dict[str, Any] | str:
        """Returns the fields of a view that a kind of knowledge adds, or in words why nobody has it here."""
        assert kind in KINDS
        config, how = self.run.config, self.run.config.federated.arrangement
        if kind in ("aggregator", "neighbour"):
            in_turn = how.clients == "in turn"
            if self.replay.aggregate is None or (kind == "neighbour") != in_turn:
                return "nobody hands a segment on" if kind == "neighbour" else "nobody adds the clients' segments up"
            return {}
        if kind == "known_text":
            messages, truth = self.log
            rows = slice(0, self.sizes.known)
            return {"known": Known(messages.h[rows], truth.tokens[rows], truth.text[rows])}
        if kind == "public_text":
            return {} if self.text is not None else "there is none (--public)"
        if how.client == "own":
            return "every client has its own"
        if kind == "segment":
            return {"segment": jax.device_get(self.state.model.client)}
        if kind == "old_segment":
            before = [n for n in self.opened.checkpoints.rounds() if n < self.round]
            if not before:
                return "there is no earlier checkpoint"
            old, _ = restore(self.run, self.opened.checkpoints, before[-1])
            return {"segment": jax.device_get(old.model.client)}
        if kind == "checkpoint":
            if not config.model.init_from:
                return "training began with random numbers"
            return {"segment": jax.device_get(initial_state(self.run)[0].model.client)}
        if config.model.init_from:
            return "training began with a checkpoint"
        guessed = dataclasses.replace(self.run.simulation.setting, secrets=secrets(Seeds(config.seed, config.seed)))
        return {"segment": jax.device_get(jax.jit(guessed.fresh)().client)}

    @property
    def aggregate(self) -> Aggregate:
        """What whoever adds up sees."""
        assert self.replay.aggregate is not None
        return self.replay.aggregate

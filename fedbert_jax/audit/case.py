"""A run made ready to be audited: a round replayed, a log of what crossed before, and what each kind of knowledge grants."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedbert_jax.audit import public
from fedbert_jax.audit.attacks import KINDS
from fedbert_jax.audit.recorded import Recordings
from fedbert_jax.audit.replay import Replay, log, replay
from fedbert_jax.audit.source import Source, num_masked
from fedbert_jax.audit.views import Aggregate, Answers, Known, Log, Messages, Public, Truth, View
from fedbert_jax.config import Config
from fedbert_jax.data.partition import js_divergence
from fedbert_jax.federated.rounds import make_strategy

OTHERS = 192  # blocks of the round, beside those attacked, that attacks look at


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is attacked, and with how much."""

    blocks: int = 64  # that are attacked
    log: int = 1500  # of which message 1 was kept
    known: int = 10  # of the log's blocks whose text somebody knows


class Case:
    """A run's round, its messages and the truth behind them.

    Args:
      source: the run.
      sizes: see `Sizes`.
      text: public text, as `data.source` has it; "" for none.
      warn: called with what looks wrong.
      recordings: a server's, of which the run is; None: it is replayed.

    Raises:
      UserError: for public text that can't be read.
    """

    def __init__(
        self,
        source: Source,
        sizes: Sizes,
        text: str,
        warn: Callable[[str], None],
        recordings: Recordings | None = None,
    ):
        self.source, self.sizes, self._text, self._warn, self._recordings = source, sizes, text, warn, recordings

    @functools.cached_property
    def _round(self) -> tuple[Replay, np.ndarray]:
        """The round, and which of its blocks are attacked: some of every step and client."""
        found = replay(self.source) if self._recordings is None else self._recordings.replay()
        return found, _spread(len(found.truth.tokens), self.sizes.blocks)

    @functools.cached_property
    def replay(self) -> Replay:
        """The round, and of its blocks those that are attacked."""
        found, rows = self._round
        return found._replace(messages=found.messages.pick(rows), truth=found.truth.pick(rows))

    @functools.cached_property
    def others(self) -> tuple[Messages, Truth]:
        """Blocks of the round that are not attacked, spread as those are."""
        found, attacked = self._round
        left = np.setdiff1d(np.arange(len(found.truth.tokens)), attacked)
        rows = left[_spread(len(left), OTHERS)]
        return found.messages.pick(rows), found.truth.pick(rows)

    @functools.cached_property
    def log(self) -> tuple[Messages, Truth]:
        """The blocks before the round."""
        return log(self.source, self.sizes.log) if self._recordings is None else self._recordings.log(self.sizes.log)

    @functools.cached_property
    def text(self) -> np.ndarray | None:
        """Public text, int [P, T]."""
        return public.read(self.source, self._text, self._warn) if self._text else None

    @functools.cached_property
    def frequencies(self) -> np.ndarray:
        """Of words in the run's text, float64 [V]; 0 for special tokens."""
        counts = self.source.counts()
        return counts / counts.sum()

    @functools.cached_property
    def label_frequencies(self) -> np.ndarray:
        """Of labels: of words, or of a classifier's classes."""
        if not self.source.config.labelled:
            return self.frequencies
        counts = np.bincount(self.replay.truth.labels.ravel())
        return counts / counts.sum()

    @functools.cached_property
    def divergence(self) -> float | None:
        """Bits between the word frequencies of public text and of the run's."""
        if self.text is None:
            return None
        theirs = np.bincount(self.text.ravel(), minlength=self.source.vocab_size)
        theirs[list(self.source.special_ids)] = 0
        return float(js_divergence([theirs], self.source.counts().astype(np.int64))[0])

    @functools.cached_property
    def view(self) -> View:
        """What every attacker has."""
        source, setting = self.source, self.source.setting
        facts = Public(
            segments=setting.segments,
            vocab_size=source.vocab_size,
            special_ids=source.special_ids,
            mask_id=source.tokenizer.mask_token_id,
            masked=num_masked(source),
            kinds=min(setting.segments.config.type_vocab_size, 2) if source.config.labelled else 1,
            clip=source.config.wire.clip,
            noise=_noise(source.config),
            gradient_clip=source.config.wire.gradient_clip,
            gradient_noise=source.config.wire.gradient_noise,
        )
        model = make_strategy(setting).model_of(source.state, jnp.int32(0))
        layers = facts.segments.config.client_layers
        log = Log(self.log[0], facts.noise, layers, self.text, facts.vocab_size)
        others = self.others[0] if len(self.others[1].tokens) else None
        return View(facts, self.replay.messages, log, jax.device_get(model.server), text=self.text, others=others)

    def granted(self, kind: str) -> dict[str, Any] | str:
        """Returns the fields of a view that a kind of knowledge adds, or in words why nobody has it here."""
        assert kind in KINDS
        if kind in self.source.segments:
            found = self.source.segments[kind]()
            return found if isinstance(found, str) else {"segment": jax.device_get(found)}
        if kind == "known_text":
            rows, blocks = self._known(*self.log)
            if not len(rows):
                return "every earlier block is one of those attacked"
            now, answered = self._known(*self.others)
            answers = Answers(now, answered, self.others[1].labels[now]) if len(now) else None
            return {"known": blocks, "answers": answers}
        if kind == "public_text":
            return {} if self.text is not None else "there is none (--public)"
        if kind == "aggregator" and self.source.config.federated.batch_by == "size":
            return "the simulation makes one gradient of all clients' rows (federated.batch_by='size'), and none of each"
        if kind == "aggregator" and self.source.setting.blinded:
            return "who adds up gets numbers under pads (privacy.averaging='blinded')"
        in_turn = self.source.setting.how.clients == "in turn"
        if self.replay.aggregate is None or (kind == "neighbour") != in_turn:
            return "nobody hands a segment on" if kind == "neighbour" else "nobody adds the clients' segments up"
        return {}

    def _known(self, messages: Messages, truth: Truth) -> tuple[np.ndarray, Known]:
        """Returns which blocks somebody knows the text of, and them: of all clients, as far as they go."""
        read = {block.tobytes() for block in self.replay.truth.original}
        left = np.array([n for n, block in enumerate(truth.original) if block.tobytes() not in read], int)
        rows = left[_spread(len(left), self.sizes.known)]
        return rows, Known(messages.h[rows], truth.tokens[rows], truth.text[rows])

    @property
    def aggregate(self) -> Aggregate:
        """What whoever adds up sees."""
        assert self.replay.aggregate is not None
        return self.replay.aggregate


def _spread(of: int, count: int) -> np.ndarray:
    """Returns `count` numbers from 0 to below `of`, far apart; all of them if they are fewer."""
    return np.unique(np.linspace(0, of - 1, min(count, of)).astype(int)) if of else np.zeros(0, int)


def _noise(config: Config) -> float:
    """Returns by how much, as a standard deviation, rows of one word differ by what the clients draw.

    Dropout with rate p makes a number x, whose mean square is about 1 after LayerNorm, differ by x * sqrt(p / (1 - p)). A
    row of D numbers that is clipped afterwards has a mean square of clip**2 / D.
    """
    rate, clip, size = config.model.hidden_dropout, config.wire.clip, config.model.hidden_size
    assert size is not None
    square = 1.0 if clip is None else min(1.0, clip**2 / size)
    return math.sqrt(config.wire.noise**2 + square * rate / (1 - rate))

"""What each party sees and knows. Attacks get a `View`; the `Truth` is for scoring alone."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fedbert_jax.audit.cipher import solve
from fedbert_jax.audit.geometry import Geometry, describe
from fedbert_jax.audit.groups import Groups, gather
from fedbert_jax.models.bert import ClientParams, Segments, ServerParams


class Messages(NamedTuple):
    """The messages of R token blocks, as whoever receives them decodes them.

    Attributes:
      h: float32 [R, T, D], what the server's layers are given.
      client: int [R], whose block it is.
      positions: int [R, M], the positions asked for, which are those that are predicted; None: they don't cross.
      z: float32 [R, M, D], the hidden states that came back.
      dz: float32 [R, M, D], their gradient.
      lengths: int [R], where a block ends and padding begins; None: nothing is padded.
    """

    h: np.ndarray
    client: np.ndarray
    positions: np.ndarray | None = None
    z: np.ndarray | None = None
    dz: np.ndarray | None = None
    lengths: np.ndarray | None = None

    def pick(self, rows: np.ndarray) -> Messages:
        """Returns these rows."""
        some = {name: None if x is None else x[rows] for name, x in self._asdict().items()}
        return Messages(**some)  # type: ignore[arg-type]

    @property
    def present(self) -> np.ndarray:
        """Where there is no padding, bool [R, T]."""
        if self.lengths is None:
            return np.ones(self.h.shape[:2], bool)
        return np.arange(self.h.shape[1]) < self.lengths.astype(np.int64)[:, None]

    @property
    def unasked(self) -> np.ndarray:
        """Where there is no padding and no position is asked for, bool [R, T]; if positions don't cross, none is."""
        where = self.present
        if self.positions is not None:
            np.put_along_axis(where, self.positions.astype(np.int64), False, axis=1)
        return where


class Truth(NamedTuple):
    """What the messages were made from. No attack is given it."""

    tokens: np.ndarray  # int [R, T], as they were embedded: with [MASK] and random words where something is predicted
    text: np.ndarray  # bool [R, T], where that is a client's text: not at predicted positions, nor at special tokens
    labels: np.ndarray  # int [R, M], the tokens to be predicted
    real: np.ndarray  # bool [R, M], whether a position is one: padding is not
    original: np.ndarray  # int [R, T], the blocks before anything was hidden

    def pick(self, rows: np.ndarray) -> Truth:
        """Returns these rows."""
        return Truth(*(x[rows] for x in self))


class Aggregate(NamedTuple):
    """What whoever adds C clients' segments up sees of their word tables, by what it is of."""

    views: dict[str, np.ndarray]  # `move` [C, V, D] or `moments` [C, V] of a round, or `gradient` [C, V] of its steps
    held: np.ndarray  # bool [C, V], the truth: whether the word is in the client's text of the round


class Known(NamedTuple):
    """Blocks of which somebody knows the text.

    Attributes:
      h: float32 [N, T, D].
      tokens: int [N, T].
      where: bool [N, T], where the text is known: at predicted positions it is not what was embedded.
    """

    h: np.ndarray
    tokens: np.ndarray
    where: np.ndarray


class Answers(NamedTuple):
    """Blocks of the attacked round of which somebody knows the text, and so the labels.

    Attributes:
      rows: int [N], which of `View.others` they are.
      blocks: their message 1, and its tokens.
      labels: int [N, M].
    """

    rows: np.ndarray
    blocks: Known
    labels: np.ndarray


@dataclass(frozen=True)
class Public:
    """What everybody knows of a run: its architecture, its vocabulary and its settings, but `seed`.

    Attributes:
      segments: the functions that make the model.
      vocab_size: V.
      special_ids: of tokens that no text is made of.
      mask_id: of [MASK].
      masked: positions of a block at which [MASK] stands.
      kinds: of tokens: 2 where there are sentence pairs, otherwise 1.
      clip: `wire.clip`.
      noise: standard deviation of what the clients add to rows, dropout included.
      gradient_clip: `wire.gradient_clip`.
      gradient_noise: `wire.gradient_noise`.
    """

    segments: Segments
    vocab_size: int
    special_ids: tuple[int, ...]
    mask_id: int
    masked: int
    kinds: int
    clip: float | None
    noise: float
    gradient_clip: float | None = None
    gradient_noise: float = 0.0

    @functools.cached_property
    def words(self) -> np.ndarray:
        """The tokens that text is made of, int [W]."""
        return np.setdiff1d(np.arange(self.vocab_size), self.special_ids)


@dataclass(frozen=True)
class Log:
    """Message 1 of earlier blocks, and what anybody can work out about it.

    Attributes:
      messages: of them, `h` alone.
      noise: `Public.noise`.
      layers: the client's own, which message 1 comes out of.
      text: public text, int [P, T]; None: there is none.
      vocab_size: V.
    """

    messages: Messages
    noise: float
    layers: int = 0
    text: np.ndarray | None = None
    vocab_size: int = 0

    @functools.cached_property
    def geometry(self) -> Geometry:
        """Where its rows lie, without their positions (`audit.geometry`)."""
        return describe(self.messages.h, self.messages.present)

    @functools.cached_property
    def groups(self) -> Groups:
        """Its rows, gathered by word (`audit.groups`)."""
        return gather(self.messages.h, self.geometry, self.messages.unasked, self.noise, self.layers)

    @functools.cached_property
    def names(self) -> np.ndarray:
        """The likeliest words of each group, by public text (`audit.cipher`), int [K, 5]."""
        assert self.text is not None
        return solve(self.groups.of, self.text, self.vocab_size)


@dataclass(frozen=True)
class View:
    """What an attacker holds: what is public, what it received, and what its row grants.

    Attributes:
      public: a `Public`.
      messages: to be read.
      log: message 1 of earlier blocks.
      body: the server's layers [L, ...].
      segment: a client segment: the one in use, an old one, an initial one; None: it has none.
      known: blocks whose text it knows; None: it knows none.
      text: public text, int [P, T]; None: there is none.
      others: messages of the round's other blocks; None: there are none.
      answers: those of them whose text it knows; None: it knows none.
    """

    public: Public
    messages: Messages
    log: Log
    body: ServerParams
    segment: ClientParams | None = None
    known: Known | None = None
    text: np.ndarray | None = None
    others: Messages | None = None
    answers: Answers | None = None

"""The attacks, each with what it needs to know: functions of a `View` that guess tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedbert_jax.audit import cipher, decoder, inverter, known, labels, learned, regression
from fedbert_jax.audit.tables import Table, alike
from fedbert_jax.audit.views import View

Guess = Callable[[View], np.ndarray]
"""Guesses from what a `View` holds: int [R, T, 5] for tokens, int [R, M, 5] for labels, the best first."""


@dataclass(frozen=True)
class Attack:
    """A way to read messages.

    Args:
      name: in the table.
      knows: the kinds of knowledge that it can use (`KINDS`).
      guess: from a `View` to int [R, T, 5], the five likeliest tokens of each place of each block attacked, best first; for
        labels, int [R, M, 5].
      of: what it guesses: the `tokens` of message 1, or the `labels` of predicted positions.
      needs_text: whether it needs public text.
      works: whether it can do anything for a view.
      adds: whether it can find more than the others; if not, it runs where it is asked for.
    """

    name: str
    knows: tuple[str, ...]
    guess: Guess
    of: Literal["tokens", "labels"] = "tokens"
    needs_text: bool = False
    works: Callable[[View], bool] = lambda view: True
    adds: Callable[[View], bool] = lambda view: True


# What a party may know, beside the messages and what is public, and in which words.
KINDS = {
    "segment": "the clients' segment, as the round begins",
    "old_segment": "the clients' segment of an earlier round",
    "seed": "the config's seed",
    "checkpoint": "the public checkpoint that training began with",
    "known_text": "the text of some blocks",
    "public_text": "public text",
    "aggregator": "each client's part of the average",
    "neighbour": "the segment before and after a client's turn",
}


def _flat(view: View) -> bool:
    return view.public.segments.config.client_layers == 0


def _deep(view: View) -> bool:
    return not _flat(view)


def _classes(view: View) -> bool:
    """Whether labels are words, or classes rather than the one number of a regression."""
    return view.segment is None or "classifier" not in view.segment or view.segment["classifier"]["bias"].shape[0] > 1


def _noisy(view: View) -> bool:
    return view.public.noise > 0


def _hazy(view: View) -> bool:
    return _classes(view) and view.public.gradient_noise > 0


def _answered(view: View) -> bool:
    """Whether the labels of some blocks of the round are known, too."""
    return _placed(view) and view.answers is not None


def _placed(view: View) -> bool:
    """Whether labels are words, at positions that are known, and something came back for them."""
    m = view.messages
    return view.public.masked > 0 and m.positions is not None and bool(np.any(m.dz))


def _blurred(view: View) -> bool:
    return _noisy(view) or _deep(view)


def _table(view: View) -> Table:
    public = view.public
    assert view.segment is not None
    length = view.messages.h.shape[1]
    return Table(public.segments, view.segment, length, public.vocab_size, public.clip, public.kinds)


def _words(view: View) -> np.ndarray:
    """Returns each token's mean row by the segment, [V, D]."""
    return _table(view).words if _flat(view) else inverter.Discriminant(_pairs(view), view.public.vocab_size).means


def _pairs(view: View) -> inverter.Pairs:
    public = view.public
    assert view.segment is not None
    length = view.messages.h.shape[1]
    return inverter.embedded(
        public.segments, view.segment, view.text, public.words, public.mask_id, public.masked, length, clip=public.clip
    )


def _discriminant(view: View, pairs: inverter.Pairs) -> inverter.Discriminant:
    public = view.public
    prior = None if view.text is None else decoder.Bigrams(view.text, public.vocab_size).log_prior
    return inverter.Discriminant(pairs, public.vocab_size, public.noise, prior)


def nearest(view: View) -> np.ndarray:
    """The token whose row, by the segment, is nearest."""
    return _table(view).nearest(view.messages.h)[0]


def likeness(view: View) -> np.ndarray:
    """The token whose direction is most alike, when what all words have in common has been taken out."""
    h, geometry = view.messages.h, view.log.geometry
    rows = (geometry.centred(h) - geometry.middle).reshape(-1, h.shape[-1])
    return alike(_words(view), rows, geometry.white).reshape(*h.shape[:2], -1)


def by_groups(view: View) -> np.ndarray:
    """The token whose direction is most like that of the mean row of a group, in which noise has averaged out."""
    names = alike(_words(view), view.log.groups.means)
    return names[view.log.groups.nearest(view.log.geometry.centred(view.messages.h))]


def discriminant(view: View) -> np.ndarray:
    """The likeliest token under statistics of what the segment makes of public text."""
    return _discriminant(view, _pairs(view)).likeliest(view.messages.h)[0]


def transformer(view: View) -> np.ndarray:
    """A Transformer trained on what the segment makes of public text."""
    pairs, public = _pairs(view), view.public
    start = _discriminant(view, pairs)
    return learned.read_by_transformer(public.segments.config, pairs, start, view.messages.h, public.noise)


def decoded(view: View) -> np.ndarray:
    """Whole blocks at once: rows, the model's own predictions, and which words follow one another in public text."""
    public, h = view.public, view.messages.h
    if _flat(view):
        return decoder.read_with_model(_table(view), h, view)
    assert view.text is not None
    bigrams = decoder.Bigrams(view.text, public.vocab_size)
    ids, scores = _discriminant(view, _pairs(view)).likeliest(h, min(decoder.CANDIDATES, public.vocab_size))
    return decoder.decode(ids, scores - bigrams.log_prior[ids], bigrams)  # the prior chose them, and counts once


def predicted(view: View) -> np.ndarray:
    """The label whose gradient points where dL/dz does."""
    m = view.messages
    assert m.z is not None and m.dz is not None and view.segment is not None
    return labels.read_labels(view.public.segments, view.segment, m.z, m.dz)


def expected(view: View) -> np.ndarray:
    """The label that the model's prediction and a noisy dL/dz make likeliest together."""
    m, public = view.messages, view.public
    assert m.z is not None and m.dz is not None and view.segment is not None
    seen = None
    if m.positions is not None and public.masked:
        rows = nearest(view) if _flat(view) else discriminant(view)
        seen = np.take_along_axis(rows[..., 0], m.positions.astype(np.int64), axis=1)
        seen = np.where(seen == public.mask_id, -1, seen)
    return labels.weigh_labels(public.segments, view.segment, m.z, m.dz, public.gradient_noise, public.gradient_clip, seen)


def by_known_text(view: View) -> np.ndarray:
    """The word whose rows, in blocks of known text, are nearest."""
    assert view.known is not None
    return known.read_by_known_text(view.messages.h, view.log.geometry, view.known)


def by_both_texts(view: View) -> np.ndarray:
    """A substitution cipher, solved with public text and the words that known text names."""
    assert view.known is not None and view.text is not None
    groups, geometry = view.log.groups, view.log.geometry
    told = known.words_of(groups, geometry, view.known)
    return cipher.solve(groups.of, view.text, view.public.vocab_size, told)[
        groups.nearest(geometry.centred(view.messages.h))
    ]


def by_public_text(view: View) -> np.ndarray:
    """A substitution cipher, solved with public text."""
    return view.log.names[view.log.groups.nearest(view.log.geometry.centred(view.messages.h))]


def regressed(view: View) -> np.ndarray:
    """The label that dL/dz, by its row as the cipher names rows, and the words beside it make likeliest."""
    return regression.read_labels(view)


def between(view: View) -> np.ndarray:
    """The label that public text has between the words beside it, as the cipher names rows. No gradient is looked at."""
    return regression.read_beside(view)


TABLES = ("segment", "old_segment", "seed", "checkpoint")

ATTACKS: list[Attack] = [
    Attack("nearest", TABLES, nearest, works=_flat),
    Attack("likeness", TABLES[1:], likeness),
    Attack("groups", TABLES[1:], by_groups, adds=_noisy),
    Attack("discriminant", TABLES, discriminant, adds=_deep),
    Attack("decoded", TABLES, decoded, needs_text=True, adds=_blurred),
    Attack("transformer", ("segment",), transformer, needs_text=True, adds=_blurred),
    Attack("gradient", TABLES, predicted, of="labels", works=_classes),
    Attack("gradient and model", TABLES, expected, of="labels", works=_hazy),
    Attack("known words", ("known_text",), by_known_text),
    Attack("known words and cipher", ("known_text",), by_both_texts, needs_text=True),
    Attack("cipher", ("public_text",), by_public_text, needs_text=True),
    Attack("known words beside", ("known_text",), between, of="labels", needs_text=True, works=_answered),
    Attack("words beside", ("public_text",), between, of="labels", needs_text=True, works=_placed),
    Attack("known words and gradient", ("known_text",), regressed, of="labels", needs_text=True, works=_answered),
    Attack("cipher and gradient", ("public_text",), regressed, of="labels", needs_text=True, works=_placed),
]  # and those that are registered


def register(attack: Attack) -> None:
    """Adds an attack in this process.

    Args:
      attack: an `Attack`. In a table it is known by its name.

    Raises:
      ValueError: if it is none, names an unknown kind of knowledge, or another attack of its name uses the same knowledge.
    """
    if not isinstance(attack, Attack):
        raise ValueError(f"{attack!r} is registered as an attack: accepted: an Attack")
    if not (isinstance(attack.name, str) and attack.name.strip()) or "," in attack.name:
        raise ValueError(f"an attack's name is {attack.name!r}: accepted: text without a comma")
    if attack.of not in ("tokens", "labels") or not callable(attack.guess) or isinstance(attack.knows, str):
        raise ValueError(
            f"the attack {attack.name!r}: accepted: knows=(KIND, ...), a function for guess, and of='tokens' or 'labels'"
        )
    if unknown := [kind for kind in attack.knows if kind not in KINDS]:
        raise ValueError(f"the attack {attack.name!r} knows {unknown[0]!r}: accepted: {', '.join(KINDS)}")
    if attack in ATTACKS:
        return
    if any(attack.name == other.name and set(attack.knows) & set(other.knows) for other in ATTACKS):
        raise ValueError(f"there is an attack {attack.name!r} already that knows {' or '.join(attack.knows)}")
    ATTACKS.append(attack)

"""Labelled sentences and pairs as arrays, and the batches of fine-tuning, which group sequences of similar length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedbert_jax.data.masking import MaskedBatch
from fedbert_jax.data.streams import Seeds, Stream, generator

WINDOW = 16  # sequences are sorted by length within this many rounds' worth of examples
BUCKETS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512)  # the lengths that batches are padded to, one program each


class Sequences(NamedTuple):
    """Tokenised examples; a row is [CLS] first [SEP] or [CLS] first [SEP] second [SEP], then padding."""

    tokens: np.ndarray  # int32 [n, T]
    token_types: np.ndarray  # int32 [n, T], 1 on the second sentence
    lengths: np.ndarray  # int32 [n]
    labels: np.ndarray  # int32 or float32 [n]; zeros where there are none

    def __len__(self) -> int:
        return len(self.lengths)

    def take(self, index: np.ndarray) -> Sequences:
        """Returns the examples `index` [k], in that order."""
        return Sequences(*(getattr(self, name)[index] for name in self._fields))


def encode(
    tokenizer: Any, first: Sequence[str], second: Sequence[str] | None, labels: np.ndarray | None, max_length: int
) -> Sequences:
    """Tokenises sentences or pairs; if a pair is too long, the end of the longer sentence is cut first.

    Args:
      tokenizer: a fast Hugging Face tokenizer.
      first: the sentences.
      second: their partners, or None.
      labels: int32 or float32 [n], or None.
      max_length: T at most, special tokens included.
    """
    pairs = (list(first),) if second is None else (list(first), list(second))
    found = tokenizer(*pairs, truncation=True, max_length=max_length, return_token_type_ids=True)
    tokenizer.backend_tokenizer.no_truncation()  # the call above left it set, and an export would save it
    lengths = np.array([len(ids) for ids in found["input_ids"]], np.int32)
    tokens = np.full((len(lengths), lengths.max(initial=1)), tokenizer.pad_token_id or 0, np.int32)
    types = np.zeros_like(tokens)
    for n, (ids, kinds) in enumerate(zip(found["input_ids"], found["token_type_ids"], strict=True)):
        tokens[n, : len(ids)], types[n, : len(ids)] = ids, kinds
    return Sequences(tokens, types, lengths, np.zeros(len(lengths), np.int32) if labels is None else labels)


def padded_length(longest: int, limit: int) -> int:
    """Returns the length that a batch with sequences of up to `longest` tokens is padded to: one of `padded_lengths`."""
    return next((length for length in padded_lengths(limit) if length >= longest), limit)


def padded_lengths(limit: int) -> tuple[int, ...]:
    """Returns the lengths that batches are padded to if no sequence has more than `limit` tokens, ascending."""
    return (*(b for b in BUCKETS if b < limit), limit)


def take(data: Sequences, index: np.ndarray, length: int) -> MaskedBatch:
    """Gathers examples `index` [...] as a batch of numpy arrays, T = `length`."""
    width = min(length, data.tokens.shape[1])
    wide = [(0, 0)] * index.ndim + [(0, length - width)]
    return MaskedBatch(
        tokens=np.pad(data.tokens[index][..., :width], wide),  # type: ignore[arg-type]
        positions=np.zeros((*index.shape, 1), np.int32),  # type: ignore[arg-type]
        labels=data.labels[index][..., None],  # type: ignore[arg-type]
        weights=np.ones((*index.shape, 1), np.float32),  # type: ignore[arg-type]
        token_types=np.pad(data.token_types[index][..., :width], wide),  # type: ignore[arg-type]
        lengths=data.lengths[index],  # type: ignore[arg-type]
    )


class ExampleStream:
    """A client's endless stream of examples, one shuffled epoch after another: a function of (seeds, client).

    Within windows of `WINDOW` rounds, an epoch is sorted by length and cut into rounds again, whose order is shuffled, so
    that little of a round is padding. The round in which one epoch ends and the next begins is filled with examples of any
    length; after it, the next epoch is cut into whole rounds again.

    Args:
      seeds: they decide the order.
      client: the client's number.
      lengths: int [n], of the client's examples.
      steps: K.
      batch: B.
    """

    def __init__(self, seeds: Seeds, client: int, lengths: np.ndarray, steps: int, batch: int):
        self.seeds, self.client, self.lengths, self.steps, self.batch = seeds, client, lengths, steps, batch
        self._orders: dict[int, np.ndarray] = {}  # of the epochs in use

    def round(self, round: int) -> np.ndarray:
        """Returns the examples of round `round` (from 0), int64 [K, B], in 0..n-1."""
        count = self.steps * self.batch
        first, parts = round * count, []
        while count > 0:
            epoch, start = divmod(first, len(self.lengths))
            part = self._order(epoch)[start : start + count]
            parts.append(part)
            first, count = first + len(part), count - len(part)
        return np.concatenate(parts).reshape(self.steps, self.batch)

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            rng, unit = generator(self.seeds, Stream.EXAMPLES, self.client, epoch), self.steps * self.batch
            order, units = rng.permutation(len(self.lengths)), []
            filling = -epoch * len(order) % unit  # examples that the round in which the previous epoch ends lacks
            for start in range(filling, len(order), WINDOW * unit):
                window = order[start : start + WINDOW * unit]
                window = window[np.argsort(self.lengths[window], kind="stable")]
                units += [rng.permutation(window[n : n + unit]) for n in range(0, len(window), unit)]
            whole, rest = [u for u in units if len(u) == unit], [u for u in units if len(u) < unit]
            if len(self._orders) > 1:
                self._orders.clear()
            whole = [whole[n] for n in rng.permutation(len(whole))]
            self._orders[epoch] = np.concatenate([order[:filling], *whole, *rest])
        return self._orders[epoch]


def eval_batches(data: Sequences, batch: int, limit: int) -> Iterator[tuple[np.ndarray, MaskedBatch]]:
    """Yields (examples [B], batch) over all examples, shortest first; the last is padded to B rows by repeating some."""
    order = np.argsort(data.lengths, kind="stable")
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        yield part, take(data, np.resize(part, batch), padded_length(int(data.lengths[part].max()), limit))

"""The sizes that every side of the step benchmark shares, and the random text they all train on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CLS, SEP, PAD, UNK, MASK = 101, 102, 0, 100, 103  # BERT's ids; ordinary tokens begin at `FIRST`
FIRST = 104
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 1e-4  # optax's default decay


@dataclass(frozen=True)
class Size:
    """The model, the data and the federation."""

    hidden: int
    layers: int
    heads: int
    vocab: int
    length: int  # T
    clients: int = 8  # C
    batch: int = 2  # B, per client

    @property
    def rows(self) -> int:
        """Sequences of the global batch, C * B."""
        return self.clients * self.batch

    @property
    def tokens(self) -> int:
        """Tokens of the global batch."""
        return self.rows * self.length


MASK_PROB = 0.15
SIZES = {
    "small": Size(hidden=256, layers=4, heads=4, vocab=30522, length=128),
    "fast": Size(hidden=32, layers=2, heads=2, vocab=512, length=32),  # for debugging: its ratios mean nothing
}


def random_blocks(size: Size, steps: int) -> np.ndarray:
    """Draws the blocks of `steps` steps, uint16 [K, C, B, T]; each side trains on these again and again.

    They hold few of the vocabulary's tokens, so a model that works learns quickly which: its loss falls.
    """
    rng = np.random.default_rng(0)
    tokens = rng.integers(FIRST, size.vocab, (steps, size.clients, size.batch, size.length))
    tokens[..., 0], tokens[..., -1] = CLS, SEP
    return tokens.astype(np.uint16)

"""The sizes that every side of a comparison shares, and the random text they all train on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

CLS, SEP, PAD, UNK, MASK = 101, 102, 0, 100, 103  # BERT's ids; ordinary tokens begin at `FIRST`
FIRST = 104
MASK_PROB = 0.15
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 1e-4  # optax's default decay


@dataclass(frozen=True)
class Size:
    """The sizes of the model, the data and the federation, and the arithmetic."""

    hidden: int
    layers: int
    heads: int
    vocab: int
    length: int  # T
    clients: int = 8  # C
    batch: int = 2  # B, per client
    steps: int = 8  # local steps of a round; a call of a side is a round
    hf_steps: int = 2  # global batches per call of the sides that make logits everywhere, whose steps are long
    learning_rate: float = LEARNING_RATE
    dtype: str = "float32"  # of matmuls and activations; parameters and optimizers are float32
    device: str = "cpu"  # or gpu
    unroll: bool = True  # fedbert_jax's layers
    compiler: str = "inductor"  # torch.compile's backend

    @property
    def rows(self) -> int:
        """Sequences of the global batch, C * B."""
        return self.clients * self.batch

    @property
    def tokens(self) -> int:
        """Tokens of the global batch."""
        return self.rows * self.length

    @property
    def masked(self) -> int:
        """Masked positions of a sequence, M."""
        return math.ceil(MASK_PROB * self.length)


def _base(length: int, **changes: object) -> Size:
    return Size(**(dict(hidden=768, layers=12, heads=12, vocab=30522, length=length, learning_rate=1e-4) | changes))  # type: ignore[arg-type]


# A round of BERT-base takes many seconds on a CPU, hence its short calls. On the GPU, both sides of a pair are in memory
# together, so each may take less than half of 80 GB, which is decided by logits everywhere.
_GPU: dict[str, object] = dict(clients=16, hf_steps=8, dtype="bfloat16", device="gpu")
SIZES = {
    "small": Size(hidden=256, layers=4, heads=4, vocab=30522, length=128),
    "base": _base(128, clients=8, batch=1, steps=2, hf_steps=1),
    "base-128": _base(128, batch=16, **_GPU),
    "base-512": _base(512, batch=4, **_GPU),
    "large-512": _base(512, hidden=1024, layers=24, heads=16, batch=2, **_GPU),
    # For debugging: its ratios mean nothing. torch.compile captures the graph but generates no code.
    "fast": Size(hidden=32, layers=2, heads=2, vocab=512, length=32, clients=3, steps=4, compiler="eager"),
}


def random_blocks(size: Size, steps: int) -> np.ndarray:
    """Draws the blocks of `steps` steps, uint16 [K, C, B, T]; each side trains on these again and again.

    Tokens are as uneven as words (Zipf's law), so a model that works soon learns which are common, and its loss falls.
    """
    rng = np.random.default_rng(0)
    share = np.cumsum(1.0 / np.arange(10, size.vocab - FIRST + 10))
    draws = rng.random((steps, size.clients, size.batch, size.length))
    tokens = FIRST + np.searchsorted(share / share[-1], draws)
    tokens[..., 0], tokens[..., -1] = CLS, SEP
    return tokens.astype(np.uint16)

"""Floating-point operations of a training step, counted from the model's shape, not measured.

A multiply-add is two operations, and a backward pass costs twice its forward pass. Embedding lookups, LayerNorm, softmax,
GELU and the optimizer are left out, as is everything that a backward pass computes again.
"""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.sizes import Size


class Flops(NamedTuple):
    """Operations per token of the global batch."""

    needed: float  # by the model as it is defined: all its layers at all positions
    executed: float  # without what the side leaves out: the last layer at positions where it is not needed


def per_token(size: Size, logits_everywhere: bool = False, last_layer_pruned: bool = False) -> Flops:
    """Counts the forward and backward passes of the model.

    Args:
      size: of the model.
      logits_everywhere: the head and the logits are computed at all positions, not only at the masked ones.
      last_layer_pruned: the last layer computes its queries, output and feed-forward only at the masked positions.
    """
    d, t, m = size.hidden, size.length, size.masked
    body = 6 * size.layers * 12 * d * d  # 4 D x D for attention, two of D x 4D
    attention = 12 * size.layers * t * d
    head = (6 * d * d + 6 * size.vocab * d) * (t if logits_everywhere else m) / t
    needed = body + attention + head
    if not last_layer_pruned:
        return Flops(needed, needed)
    skipped = (6 * 10 * d * d + 12 * t * d) * (t - m) / t  # keys and values, 2 D x D, stay
    return Flops(needed, needed - skipped)

"""Pytrees as named tensors and back: what a frame holds of a payload, and what a receiver expects of it."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from fedbert_jax.runtime.frames import Schema, Tensors, TensorSpec


def name_of(prefix: str, path: tuple[Any, ...]) -> str:
    """Returns the name of a leaf: "activations", "activations/int8", "segment/embeddings/word/embedding"."""
    parts = (str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)
    return "/".join([prefix, *parts] if prefix else parts)


def to_tensors(prefix: str, tree: Any) -> Tensors:
    """Returns the leaves of a pytree of arrays as tensors of this host, by name; None is no tensor. `prefix` may be ""."""
    return {name_of(prefix, path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def from_tensors(prefix: str, like: Any, tensors: Tensors) -> Any:
    """Returns a pytree like another (of arrays or their shapes), filled with the tensors that `to_tensors` made of it."""
    return jax.tree_util.tree_map_with_path(lambda path, _: tensors[name_of(prefix, path)], like)


def schema_of(prefix: str, like: Any, lengths: tuple[int, ...] = ()) -> dict[str, TensorSpec]:
    """Returns what a receiver expects of a pytree of arrays, or of their shapes.

    Args:
      prefix: what the tensors' names begin with.
      like: the pytree.
      lengths: accepted for T of every array [B, T, ...]; (): its own only.
    """

    def spec(x: Any) -> TensorSpec:
        shape = (x.shape[0], lengths, *x.shape[2:]) if lengths and len(x.shape) > 2 else x.shape
        return TensorSpec(np.dtype(x.dtype).name, tuple(shape))

    return {name_of(prefix, path): spec(x) for path, x in jax.tree_util.tree_leaves_with_path(like)}


def fitted(tree: Any, length: int) -> Any:
    """Pads the arrays [B, T, ...] of a payload with zeros, or cuts them, to T = `length`."""

    def fit(x: Any) -> Any:
        if x.shape[1] >= length:
            return x if x.shape[1] == length else x[:, :length]
        return np.pad(x, [(0, length - x.shape[1]) if axis == 1 else (0, 0) for axis in range(x.ndim)])

    return jax.tree.map(fit, tree)


def stacked(trees: list[Any]) -> Any:
    """Stacks the clients' payloads, [C, ...], on the host."""
    return jax.tree.map(lambda *x: np.stack([np.asarray(v) for v in x]), *trees)


def zeros_like(tree: Any) -> Any:
    """Returns zeros like a payload: what stands in the place of a client that isn't there."""
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), tree)


def merged(*schemas: Schema) -> dict[str, TensorSpec]:
    """Returns what is expected of a message of several parts."""
    return {name: spec for schema in schemas for name, spec in schema.items()}

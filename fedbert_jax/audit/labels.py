"""Reading the predicted tokens off messages 2 and 3: a hidden state z and the gradient dL/dz that came back for it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedbert_jax.audit.tables import GUESSES
from fedbert_jax.models.bert import ClientParams, Segments


def read_labels(segments: Segments, params: ClientParams, z: np.ndarray, dz: np.ndarray) -> np.ndarray:
    """Returns the likeliest labels, int [R, M, 5], by a client segment.

    With logits W x(z) + b and probabilities p, dL/dz is in the direction of J'W'(p - e_y) for label y, where J = dx/dz. So
    each label's direction is compared with the one that came; its length, which also depends on how many positions are
    predicted, doesn't matter.
    """
    table = params["embeddings"]["word"]["embedding"]
    size = table.shape[1]
    # With the unit matrix for a word table and no bias, the logits are x(z) itself.
    plain: Any = {
        **params,
        "embeddings": {**params["embeddings"], "word": {"embedding": jnp.eye(size, dtype=table.dtype)}},
        "head": {**params["head"], "bias": jnp.zeros(size, table.dtype)},
    }

    def features(z: jax.Array) -> jax.Array:
        return segments.predict(plain, z[None, None].astype(segments.dtype))[0, 0]

    def one(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        z, dz = pair
        moves = table @ jax.jacrev(features)(z)  # [V, D]: J'W'e_y for each y
        p = jax.nn.softmax(segments.predict(params, z[None, None].astype(segments.dtype))[0, 0])
        directions = (p @ moves)[None] - moves
        likeness = (directions @ dz) / (jnp.linalg.norm(directions, axis=1) + 1e-30)
        return jax.lax.top_k(likeness, GUESSES)[1]

    flat = (jnp.asarray(z).reshape(-1, z.shape[-1]), jnp.asarray(dz).reshape(-1, z.shape[-1]))
    return np.asarray(jax.jit(lambda pairs: jax.lax.map(one, pairs))(flat)).reshape(*z.shape[:2], GUESSES)

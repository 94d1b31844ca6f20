"""Reading the predicted tokens off messages 2 and 3: a hidden state z and the gradient dL/dz that came back for it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedbert_jax.audit.tables import GUESSES
from fedbert_jax.models.bert import ClientParams, Segments

LIKELY = 256  # labels whose direction is compared exactly


def read_labels(segments: Segments, params: ClientParams, z: np.ndarray, dz: np.ndarray) -> np.ndarray:
    """Returns the likeliest labels, int [R, M, 5], by a client segment: tokens, or a classifier's classes.

    With logits W x(z) + b and probabilities p, dL/dz is in the direction of J'W'(p - e_y) for label y, where J = dx/dz. So
    each label's direction is compared with the one that came; its length, which also depends on how many positions are
    predicted, doesn't matter.
    """
    head = lambda params, z: segments.predict(params, z[None, None].astype(segments.dtype))[0, 0]  # noqa: E731
    table = params["embeddings"]["word"]["embedding"]
    classes = "classifier" in params
    if not classes:
        # With the unit matrix for a word table and no bias, the logits are x(z) itself.
        unit = jnp.eye(table.shape[1], dtype=table.dtype)
        plain: Any = {
            **params,
            "embeddings": {**params["embeddings"], "word": {"embedding": unit}},
            "head": {**params["head"], "bias": jnp.zeros(len(unit), table.dtype)},
        }

    def one(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        z, dz = pair
        p = jax.nn.softmax(head(params, z))
        if classes:
            jacobian = jax.jacrev(lambda z: head(params, z))(z)  # [V, D]
            rows, likely = (p @ jacobian)[None] - jacobian, jnp.arange(len(p))
        else:
            jacobian = jax.jacrev(lambda z: head(plain, z))(z)  # [D, D]
            apart = (p @ table)[None] - table  # W'(p - e_y), for each y
            # All products with dz, but lengths for the likeliest alone: these take a product with J each.
            near = (apart @ (jacobian @ dz)) / (jnp.linalg.norm(apart, axis=1) + 1e-30)
            likely = jax.lax.top_k(near, min(LIKELY, len(p)))[1]
            rows = apart[likely] @ jacobian
        likeness = (rows @ dz) / (jnp.linalg.norm(rows, axis=1) + 1e-30)
        found = likely[jax.lax.top_k(likeness, min(GUESSES, len(likeness)))[1]]
        return jnp.pad(found, (0, GUESSES - len(found)), mode="edge")

    flat = (jnp.asarray(z).reshape(-1, z.shape[-1]), jnp.asarray(dz).reshape(-1, z.shape[-1]))
    return np.asarray(jax.jit(lambda pairs: jax.lax.map(one, pairs))(flat)).reshape(*z.shape[:2], GUESSES)

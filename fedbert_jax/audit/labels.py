"""Reading the predicted tokens off messages 2 and 3: a hidden state z and the gradient dL/dz that came back for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedbert_jax.audit.tables import GUESSES
from fedbert_jax.models.bert import ClientParams, Segments

LIKELY = 256  # labels whose direction is compared exactly
KEPT = 0.5  # of predicted positions that don't have [MASK], those that keep their token (data/masking.py)
WAYS = 16  # of a Jacobian, those in which it is longest


def read_labels(segments: Segments, params: ClientParams, z: np.ndarray, dz: np.ndarray) -> np.ndarray:
    """Returns the likeliest labels, int [R, M, 5], by a client segment: tokens, or a classifier's classes.

    With logits W x(z) + b and probabilities p, dL/dz is in the direction of J'W'(p - e_y) for label y, where J = dx/dz. So
    each label's direction is compared with the one that came; its length, which also depends on how many positions are
    predicted, doesn't matter.
    """
    factors = _factors(segments, params)

    def one(z: jax.Array, dz: jax.Array) -> jax.Array:
        _, apart, jacobian = factors(z)
        likely = _near(apart, jacobian, dz)
        rows = apart[likely] @ jacobian
        return _best(likely, (rows @ dz) / (jnp.linalg.norm(rows, axis=1) + 1e-30))

    return np.asarray(_each(one, _rows(z), _rows(dz))).reshape(*z.shape[:2], GUESSES)


def weigh_labels(
    segments: Segments,
    params: ClientParams,
    z: np.ndarray,
    dz: np.ndarray,
    noise: float,
    clip: float | None,
    seen: np.ndarray | None = None,
) -> np.ndarray:
    """Returns the likeliest labels, int [R, M, 5], if dL/dz came with noise: by Bayes, with what the model predicts.

    By z, the model gives label y the probability p_y; dL/dz is then s J'W'(p - e_y), clipped, and noise. The factor s is the
    one with which rows have the mean square that came, if labels are as frequent as the model expects.

    Args:
      segments: the model's.
      params: a client segment.
      z: float [R, M, D], message 2.
      dz: float [R, M, D], message 3.
      noise: standard deviation of what was added to each number of dz; above 0.
      clip: the norm to which rows were clipped before that; None: they were not.
      seen: int [R, M], the tokens that message 1 has at these positions, -1 for [MASK]; None: nobody can tell. As often as
        not, such a token is the label.
    """
    factors, most = _factors(segments, params), math.inf if clip is None else clip

    def length(z: jax.Array, key: jax.Array) -> jax.Array:
        logits, apart, jacobian = factors(z)
        return jnp.linalg.norm(apart[jax.random.categorical(key, logits)] @ jacobian)

    keys = jax.random.split(jax.random.key(0), math.prod(z.shape[:2]))
    lengths = np.asarray(_each(length, _rows(z), keys), np.float64)
    square = np.mean(np.sum(np.square(dz, dtype=np.float64), axis=-1)) - dz.shape[-1] * noise**2
    scale = _scale(lengths, float(square), most)

    def one(z: jax.Array, dz: jax.Array, seen: jax.Array) -> jax.Array:
        logits, apart, jacobian = factors(z)
        kept = jnp.log(KEPT) - jnp.where(jnp.arange(len(logits)) == seen, 0.0, jnp.inf)
        told = jax.nn.log_softmax(logits) + jnp.log1p(-KEPT)
        logits = jnp.where(seen < 0, logits, jnp.logaddexp(told, kept))
        near, expected = _near(apart, jacobian, dz), jax.lax.top_k(logits, min(LIKELY, len(logits)))[1]
        again = jnp.concatenate([jnp.zeros(len(near), bool), jnp.isin(expected, near)])
        likely = jnp.concatenate([near, expected])
        rows = scale * (apart[likely] @ jacobian)
        rows *= jnp.minimum(1.0, most / (jnp.linalg.norm(rows, axis=1, keepdims=True) + 1e-30))
        squares = jnp.sum(rows * (rows - 2 * dz[None]), axis=1)  # |dz - row|^2 - |dz|^2
        return _best(likely, jnp.where(again, -jnp.inf, logits[likely] - squares / (2 * noise**2)))

    seen = np.full(z.shape[:2], -1) if seen is None else seen
    return np.asarray(_each(one, _rows(z), _rows(dz), jnp.asarray(seen).reshape(-1))).reshape(*z.shape[:2], GUESSES)


def _scale(lengths: np.ndarray, square: float, most: float) -> float:
    """Returns the factor with which lengths that are cut off at `most` have a mean square; 0 if that is negative."""
    low, high = 0.0, 1e6 * math.sqrt(max(square, 0.0)) / (float(lengths.mean()) + 1e-30)
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if np.mean(np.minimum(middle * lengths, most) ** 2) < square else (low, middle)
    return low


def _factors(segments: Segments, params: ClientParams) -> Callable[[jax.Array], tuple[jax.Array, jax.Array, jax.Array]]:
    """Returns a function from z to the logits [V], and two matrices whose product has dL/dz for each label, [V, D]."""
    head = lambda params, z: segments.predict(params, z[None, None].astype(segments.dtype))[0, 0]  # noqa: E731
    table = params["embeddings"]["word"]["embedding"]
    if "classifier" in params:

        def of_classes(z: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            logits = head(params, z)
            return logits, jax.nn.softmax(logits)[None] - jnp.eye(len(logits)), jax.jacrev(lambda z: head(params, z))(z)

        return of_classes
    # With the unit matrix for a word table and no bias, the logits are x(z) itself.
    unit = jnp.eye(table.shape[1], dtype=table.dtype)
    plain: Any = {
        **params,
        "embeddings": {**params["embeddings"], "word": {"embedding": unit}},
        "head": {**params["head"], "bias": jnp.zeros(len(unit), table.dtype)},
    }

    def of_words(z: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        logits = head(params, z)
        return logits, (jax.nn.softmax(logits) @ table)[None] - table, jax.jacrev(lambda z: head(plain, z))(z)

    return of_words


def _near(apart: jax.Array, jacobian: jax.Array, dz: jax.Array) -> jax.Array:
    """Returns the labels whose direction, `apart` [V, A] times the Jacobian [A, D], is likeliest, [LIKELY].

    All products with dz are exact. Exact lengths would take a product with the Jacobian for each label, so these are
    estimated: exact in the ways in which the Jacobian is longest (found by two steps of subspace iteration), average in the
    others. Where a model has learnt little, a few ways are nearly all there is.
    """
    ways = jax.random.normal(jax.random.key(0), (len(jacobian), min(WAYS, *jacobian.shape)), jacobian.dtype)
    for _ in range(2):
        ways = jnp.linalg.qr(jacobian @ (jacobian.T @ ways))[0]
    longest, along = ways.T @ jacobian, apart @ ways
    others = jnp.maximum(jnp.sum(jacobian**2) - jnp.sum(longest**2), 0) / max(len(jacobian) - ways.shape[1], 1)
    beside = jnp.maximum(jnp.sum(apart**2, axis=1) - jnp.sum(along**2, axis=1), 0)
    lengths = jnp.sqrt(jnp.sum((along @ longest) ** 2, axis=1) + others * beside)
    near = (apart @ (jacobian @ dz)) / (lengths + 1e-30)
    return jax.lax.top_k(near, min(LIKELY, len(near)))[1]


def _best(labels: jax.Array, scores: jax.Array) -> jax.Array:
    found = labels[jax.lax.top_k(scores, min(GUESSES, len(scores)))[1]]
    return jnp.pad(found, (0, GUESSES - len(found)), mode="edge")


def _rows(x: np.ndarray) -> jax.Array:
    return jnp.asarray(x).reshape(-1, x.shape[-1])


def _each(function: Callable[..., jax.Array], *of: jax.Array) -> jax.Array:
    """Returns what a function gives for each position, one after another: a Jacobian takes room."""
    return jax.jit(lambda of: jax.lax.map(lambda one: function(*one), of))(of)

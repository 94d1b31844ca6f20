"""Reading whole blocks with a Transformer that has learnt, on public text, what a known segment makes of words."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedbert_jax.audit.inverter import Discriminant, Pairs
from fedbert_jax.audit.tables import GUESSES
from fedbert_jax.config import ModelConfig
from fedbert_jax.models.bert import make_segments

LAYERS, STEPS, BLOCKS, RATE = 2, 150, 16, 1e-3


def read_by_transformer(config: ModelConfig, pairs: Pairs, start: Discriminant, h: np.ndarray, noise: float) -> np.ndarray:
    """Returns the likeliest tokens of rows h [R, T, D], int [R, T, 5].

    The network's output is added to the rows, of which the discriminant then makes its guess; it begins with 0, so that
    training can only add what the context tells.

    Args:
      config: of the run's model, for the network's sizes.
      pairs: rows, without noise, and their tokens.
      start: the discriminant of single rows.
      h: to be read.
      noise: the standard deviation of what is added to rows before they leave (`wire.noise`).
    """
    config = dataclasses.replace(
        config, num_layers=LAYERS, client_layers=0, hidden_dropout=0.0, attention_dropout=0.0, remat="none", attention="xla",
        unroll_layers=True,
    )  # fmt: skip
    net = make_segments(config)
    _, body = net.init(*jax.random.split(jax.random.key(0)))
    size = h.shape[-1]
    params: Any = {
        "body": body,
        "out": jnp.zeros((size, size)),
        "directions": jnp.asarray(start.directions),
        "bias": jnp.asarray(start.bias),
    }
    places = jnp.asarray(start.places)[None]

    def logits(params: Any, h: jax.Array) -> jax.Array:
        x = h - places
        return (x + net.transform(params["body"], h) @ params["out"]) @ params["directions"].T + params["bias"][None, None]

    def loss(params: Any, h: jax.Array, tokens: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits(params, h), tokens).mean()

    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.warmup_cosine_decay_schedule(0.0, RATE, 15, STEPS)))

    @jax.jit
    def step(params: Any, opt: Any, h: jax.Array, tokens: jax.Array, key: jax.Array) -> Any:
        h = h + noise * jax.random.normal(key, h.shape)
        value, grads = jax.value_and_grad(loss)(params, h, tokens)
        updates, opt = tx.update(grads, opt)
        return optax.apply_updates(params, updates), opt, value

    opt, rng = tx.init(params), np.random.default_rng(0)
    for n in range(STEPS):
        rows = rng.integers(0, len(pairs.h), BLOCKS)
        params, opt, _ = step(params, opt, pairs.h[rows], pairs.tokens[rows].astype(np.int32), jax.random.key(n))
    guess = jax.jit(lambda h: jax.lax.top_k(logits(params, h), GUESSES)[1])
    return np.concatenate([np.asarray(guess(h[n : n + BLOCKS])) for n in range(0, len(h), BLOCKS)])

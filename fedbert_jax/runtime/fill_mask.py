"""Filling in [MASK] with a trained model: the quickest look at what it learnt."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedbert_jax.data.masking import MaskedBatch
from fedbert_jax.errors import ConfigError
from fedbert_jax.federated.joined import joined_logits
from fedbert_jax.models.bert import Params, Segments

Prediction = tuple[str, float]


def check_sentences(texts: Sequence[str], tokenizer: Any, longest: int) -> None:
    """Refuses sentences whose [MASK] the model would never see.

    Args:
      texts: each with a `[MASK]`.
      tokenizer: with a mask token.
      longest: how many tokens the model takes; the rest is cut off.

    Raises:
      ConfigError: naming the first such sentence.
    """
    for text in texts:
        ids = tokenizer(text.replace("[MASK]", tokenizer.mask_token), truncation=True, max_length=longest)["input_ids"]
        if tokenizer.mask_token_id not in ids:
            raise ConfigError(
                f"config key fill_mask={text!r}: accepted: [MASK] among the first {longest} tokens, which are "
                "all that the model takes (model.max_position_embeddings)."
            )


def fill_mask(
    segments: Segments, client_params: Params, server_params: Params, tokenizer: Any, texts: list[str], top: int = 5
) -> list[list[Prediction]]:
    """Predicts the first [MASK] of each text.

    Args:
      segments: the model's functions.
      client_params: the client segment.
      server_params: the body.
      tokenizer: with a mask token.
      texts: each with a `[MASK]`.
      top: how many candidates.

    Returns:
      For each text, its `top` tokens with their probabilities, best first; empty if it has no mask token.
    """
    if not texts:
        return []
    longest = segments.config.max_position_embeddings
    texts = [t.replace("[MASK]", tokenizer.mask_token) for t in texts]
    ids = [tokenizer(t, truncation=True, max_length=longest)["input_ids"] for t in texts]
    length = max(map(len, ids))
    tokens = np.zeros((len(ids), length), np.int32)
    for row, tokens_of in enumerate(ids):
        tokens[row, : len(tokens_of)] = tokens_of
    where = np.argmax(tokens == tokenizer.mask_token_id, axis=1)[:, None]  # the one position asked for
    lengths = jnp.array([len(tokens_of) for tokens_of in ids], jnp.int32)
    unknown = (jnp.zeros_like(where), jnp.ones(where.shape))  # labels and weights
    batch = MaskedBatch(jnp.asarray(tokens), jnp.asarray(where), *unknown, lengths=lengths)

    @jax.jit
    def predict(client: Params, server: Params) -> jax.Array:
        return jax.nn.softmax(joined_logits(segments, client, server, batch)[:, 0])

    probs = np.asarray(predict(client_params, server_params))[:, : len(tokenizer)]
    found = (tokens == tokenizer.mask_token_id).any(axis=1)
    best = np.argsort(-probs, axis=1)[:, :top]
    names = {i: unicodedata.normalize("NFC", tokenizer.convert_ids_to_tokens(i)) for i in np.unique(best).tolist()}
    return [[(names[int(i)], float(probs[row, i])) for i in best[row]] if found[row] else [] for row in range(len(ids))]

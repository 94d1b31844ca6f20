"""The uncut model: arrangements without a cut train it, and every model is evaluated in this form."""

from __future__ import annotations

import jax

from fedbert_jax.data.masking import MaskedBatch
from fedbert_jax.federated.split import EMBED, HEAD
from fedbert_jax.federated.wire import NO_KEYS, StepKeys
from fedbert_jax.models.bert import ClientParams, Segments, ServerParams
from fedbert_jax.models.layers import fold_in


def joined_loss(
    segments: Segments,
    client_params: ClientParams,
    server_params: ServerParams,
    batch: MaskedBatch,
    keys: StepKeys = NO_KEYS,
) -> jax.Array:
    """Returns the loss of the uncut model on one client's batch [B, ...].

    With the same keys [G], its dropout draws are those of `split_step`.
    """
    z = _joined_hidden(segments, client_params, server_params, batch, keys)
    with jax.named_scope("predict"):
        return segments.loss(client_params, z, batch, fold_in(keys.client, HEAD))


def joined_logits(
    segments: Segments, client_params: ClientParams, server_params: ServerParams, batch: MaskedBatch
) -> jax.Array:
    """Returns the uncut model's logits [B, M, ...] at the positions of one client's batch [B, ...], without dropout."""
    z = _joined_hidden(segments, client_params, server_params, batch, NO_KEYS)
    with jax.named_scope("predict"):
        return segments.predict(client_params, z)


def _joined_hidden(
    segments: Segments, client_params: ClientParams, server_params: ServerParams, batch: MaskedBatch, keys: StepKeys
) -> jax.Array:
    with jax.named_scope("embed"):
        h = segments.embed(client_params, batch, fold_in(keys.client, EMBED))
    with jax.named_scope("transform"):
        return segments.transform(server_params, h, batch.positions, batch.lengths, keys.server)

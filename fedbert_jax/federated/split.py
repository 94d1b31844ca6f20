"""One step across the cut: the four messages between clients and server, and the gradients on both sides.

    client: tokens -> embed -- h -->  | wire |  --> server: transform -- z --> | wire | --> client: predict -> loss
    client: embed' <-- dh --- | wire | <------ server: transform' <-- dz --- | wire | <-- client: predict'

A prime is a segment's backward pass. Nothing else in the package joins the segments for training across the cut.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedbert_jax.config import WireConfig
from fedbert_jax.data.masking import MaskedBatch
from fedbert_jax.models.bert import Params, Segments
from fedbert_jax.models.layers import fold_in, take_positions
from fedbert_jax.wire import Messages, decode, encode

EMBED, HEAD = 0, 1  # tags that keep the dropout draws of a client's two segments apart


class DropoutKeys(NamedTuple):
    """Keys of one step's dropout: what a client draws by itself, and what the server draws for it."""

    client: jax.Array  # [C], or of one client []
    server: jax.Array  # [C], or of one client []


class StepResult(NamedTuple):
    """What one step yields before any optimizer sees it."""

    loss: jax.Array  # float32 [C]: each client's own mean over its masked positions
    client_grads: Params  # [C, ...]: of each client's own loss, not scaled by its weight
    server_grads: Params  # of the weighted mean of the clients' losses
    messages: Messages  # as encoded for the wire


def split_step(
    segments: Segments,
    wire: WireConfig,
    client_params: Params,
    server_params: Params,
    batch: MaskedBatch,
    weights: jax.Array,
    keys: DropoutKeys | None = None,
    *,
    shared_client: bool = False,
) -> StepResult:
    """Runs one forward and backward pass of C clients against one server body.

    Args:
      segments: the three functions.
      wire: codec, and what the server returns.
      client_params: [C, ...], each client's own; or without the client axis if `shared_client`, when all clients hold
        the same (their gradients are their own either way).
      server_params: the one body.
      batch: leaves [C, B, ...].
      weights: float32 [C], non-negative, summing to 1: each client's share in the body's gradient. A client of weight
        0 (padding, or absent) changes nothing, even if its numbers are not finite.
      keys: for dropout, [C], or None.
      shared_client: see `client_params`.
    """
    own = None if shared_client else 0
    embed_keys, head_keys = (None if keys is None else fold_in(keys.client, n)[:, None] for n in (EMBED, HEAD))  # type: ignore[index]
    body_keys = None if keys is None else keys.server

    # Client: embed. Each keeps the residuals for its own backward pass.
    def client_embed(params: Params, b: MaskedBatch, key: jax.Array | None):  # type: ignore[no-untyped-def]
        return jax.vjp(lambda p: segments.embed(p, b.tokens, key, b.token_types), params)

    with jax.named_scope("embed"):
        h, embed_vjp = jax.vmap(client_embed, (own, 0, 0))(client_params, batch, embed_keys)
    with jax.named_scope("uplink"):
        activations_up = encode(h, wire)  # ---- message 1, up
    positions_up = batch.positions.astype(jnp.uint16) if wire.downlink == "masked" else None
    lengths_up = None if batch.lengths is None else batch.lengths.astype(jnp.uint16)

    # Server: transform all clients' rows as one batch. The axes are folded, not mapped: one large matmul.
    def server_transform(params: Params, received: jax.Array) -> jax.Array:
        clients, size = received.shape[:2]
        rows = received.reshape(clients * size, *received.shape[2:])  # [C*B, T, D]
        mask = None if lengths_up is None else attention_mask(lengths_up.reshape(-1), rows.shape[1])
        positions = None if positions_up is None else positions_up.reshape(clients * size, -1)
        z = segments.transform(params, rows, body_keys, mask, positions)  # [C*B, M, D], or T for M
        return z.reshape(clients, size, *z.shape[1:])

    scale = weights.reshape(-1, 1, 1, 1)
    with jax.named_scope("transform"):
        # What weighs nothing is taken out, not multiplied by 0: 0 times what is not finite is not finite.
        received = jnp.where(scale > 0, decode(activations_up, like=h), 0.0)
        z, transform_vjp = jax.vjp(server_transform, server_params, received)
    with jax.named_scope("downlink"):
        hidden_states_down = encode(z, wire)  # ---- message 2, down

    # Client: predict at the masked positions, and the head's backward pass.
    def client_loss(params: Params, received: jax.Array, b: MaskedBatch, key: jax.Array | None) -> jax.Array:
        at_masked = received if positions_up is not None else take_positions(received, b.positions)
        return segments.loss(params, at_masked, b.labels, b.weights, key)

    head = jax.vmap(jax.value_and_grad(client_loss, (0, 1)), (own, 0, 0, 0))
    with jax.named_scope("predict"):
        loss, (head_grads, dz) = head(client_params, decode(hidden_states_down, like=z), batch, head_keys)
    with jax.named_scope("uplink"):
        head_gradient_up = encode(dz, wire)  # ---- message 3, up

    # Server: the body's gradient is the weighted mean over clients. Scaling dz does that in one backward pass, and
    # scales what flows on to each client, too, which is undone: a client's gradient is of its own loss.
    with jax.named_scope("transform"):
        dz = decode(head_gradient_up, like=z)
        server_grads, dh = transform_vjp(jnp.where(scale > 0, dz * scale, 0.0).astype(dz.dtype))
        dh = jnp.where(scale > 0, dh / jnp.where(scale > 0, scale, 1.0), 0.0)
    with jax.named_scope("downlink"):
        input_gradient_down = encode(dh, wire)  # ---- message 4, down

    # Client: the embedding's backward pass. The word table is tied, so its two gradients add up.
    with jax.named_scope("embed"):
        (embed_grads,) = jax.vmap(lambda vjp, g: vjp(g))(embed_vjp, decode(input_gradient_down, like=h))
        client_grads = jax.tree.map(jnp.add, head_grads, embed_grads)

    messages = Messages(
        activations_up, positions_up, hidden_states_down, head_gradient_up, input_gradient_down, lengths_up
    )
    return StepResult(loss, client_grads, server_grads, messages)


def joined_loss(
    segments: Segments, client_params: Params, server_params: Params, batch: MaskedBatch, key: DropoutKeys | None = None
) -> jax.Array:
    """Returns the loss of the uncut model on one client's batch [B, ...]: what `centralized` trains.

    With the same key, dropout draws are those of `split_step`.
    """
    z = _joined_hidden(segments, client_params, server_params, batch, key)
    with jax.named_scope("predict"):
        return segments.loss(client_params, z, batch.labels, batch.weights, _of_client(key, HEAD))


def joined_logits(
    segments: Segments, client_params: Params, server_params: Params, batch: MaskedBatch, key: DropoutKeys | None = None
) -> jax.Array:
    """Returns the uncut model's logits [B, M, ...] at the positions of one client's batch [B, ...]."""
    z = _joined_hidden(segments, client_params, server_params, batch, key)
    with jax.named_scope("predict"):
        return segments.predict(client_params, z, _of_client(key, HEAD))


def _joined_hidden(
    segments: Segments, client_params: Params, server_params: Params, batch: MaskedBatch, key: DropoutKeys | None
) -> jax.Array:
    """Returns the body's output [B, M, D] at the positions of one client's batch."""
    with jax.named_scope("embed"):
        h = segments.embed(client_params, batch.tokens, _of_client(key, EMBED), batch.token_types)
    with jax.named_scope("transform"):
        mask = None if batch.lengths is None else attention_mask(batch.lengths, batch.tokens.shape[-1])
        return segments.transform(server_params, h, None if key is None else key.server[None], mask, batch.positions)


def _of_client(key: DropoutKeys | None, tag: int) -> jax.Array | None:
    return None if key is None else fold_in(key.client[None], tag)


def attention_mask(lengths: jax.Array, size: int) -> jax.Array:
    """Returns the mask [..., T] of sequences with `lengths` [...] tokens before the padding: 1 for a token."""
    place = jax.lax.broadcasted_iota(jnp.int32, (*lengths.shape, size), lengths.ndim)
    return (place < lengths[..., None].astype(jnp.int32)).astype(jnp.int32)

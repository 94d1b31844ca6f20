"""One step across the cut: what a client and the server each do, and the four messages that pass between them.

    client_begin     tokens --> h          message 1, up     (with the positions it wants back)
    server_forward   h      --> z          message 2, down
    client_head      z      --> loss, dz   message 3, up
    server_backward  dz     --> dh         message 4, down   and the body's gradient
    client_finish    dh     --> the client's gradient

Each half is a pure function of its own side's values and of the message received. What it has to remember until the next
message (`Kept`, a pytree) never leaves that side. A simulation composes the five in one program (`split_step`); over a
network, the two sides' processes call their own (`runtime/parties.py`). Nothing else trains across a cut.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedbert_jax.data.masking import MaskedBatch
from fedbert_jax.federated.wire import NO_KEYS, Cut, Payload, StepKeys
from fedbert_jax.models.bert import ClientParams, ServerParams
from fedbert_jax.models.layers import fold_in, take_positions

Kept = Any  # the residuals of a forward pass: a pytree that this side's next half takes
EMBED, HEAD = 0, 1  # tags that keep the dropout draws of a client's two segments apart


class Up(NamedTuple):
    """Message 1 of a client. Tokens and labels have no field here."""

    activations: Payload  # h [B, T, D]
    positions: jax.Array | None  # uint16 [B, M]; None: all hidden states are wanted back
    lengths: jax.Array | None  # uint16 [B]; None: nothing is padded


class StepResult(NamedTuple):
    """The result of one step, before any optimizer has used it."""

    loss: jax.Array  # float32 [C]: each client's own mean over its masked positions
    client_grads: ClientParams  # [C, ...]: of each client's own loss, not scaled by its weight
    server_grads: ServerParams  # of the weighted mean of the clients' losses
    messages: dict[str, Payload]  # what crossed, [C, ...], by name in `wire.MESSAGES`


def client_begin(cut: Cut, params: ClientParams, batch: MaskedBatch, keys: StepKeys) -> tuple[Up, Kept]:
    """Embeds one client's batch [B, ...]."""
    with jax.named_scope("embed"):
        h, kept = jax.vjp(lambda p: cut.segments.embed(p, batch, fold_in(keys.client, EMBED)), params)
    with jax.named_scope("uplink"):
        positions = batch.positions.astype(jnp.uint16) if cut.masked_only else None
        lengths = None if batch.lengths is None else batch.lengths.astype(jnp.uint16)
        return Up(cut.channels.activations.send(h, keys.noise), positions, lengths), kept


def server_forward(cut: Cut, params: ServerParams, up: Up, weights: jax.Array, keys: StepKeys) -> tuple[Payload, Kept]:
    """Runs the rows of C clients through the body as one batch: one large matmul, where a map would make C.

    Args:
      cut: the same on both sides.
      params: the body's.
      up: leaves [C, B, ...].
      weights: float32 [C]; a client of weight 0 is left out, even if its numbers are not finite.
      keys: only the server's are used.

    Returns:
      Message 2, [C, B, M, D] (T for M if all hidden states are wanted back), and the residuals for `server_backward`.
    """

    def transform(params: ServerParams, h: jax.Array) -> jax.Array:
        clients, size = h.shape[:2]
        fold = lambda x: None if x is None else x.reshape(clients * size, *x.shape[2:])  # noqa: E731
        positions, lengths = fold(up.positions), fold(up.lengths)
        z = cut.segments.transform(params, h.reshape(clients * size, *h.shape[2:]), positions, lengths, keys.server)
        return z.reshape(clients, size, *z.shape[1:])

    with jax.named_scope("transform"):
        # Clients of weight 0 are left out rather than multiplied by 0: 0 times a number that is not finite is not finite.
        received = jnp.where(_share(weights) > 0, cut.channels.activations.receive(up.activations), 0.0)
        z, kept = jax.vjp(transform, params, received)
    with jax.named_scope("downlink"):
        return cut.channels.hidden_states.send(z, None), kept


def client_head(
    cut: Cut, params: ClientParams, batch: MaskedBatch, z: Payload, keys: StepKeys
) -> tuple[jax.Array, ClientParams, Payload]:
    """Returns one client's loss, the gradient of its head, and message 3: dL/dz, in the shape of z."""

    def loss(params: ClientParams, z: jax.Array) -> jax.Array:
        asked = z if cut.masked_only else take_positions(z, batch.positions)
        return cut.segments.loss(params, asked, batch, fold_in(keys.client, HEAD))

    with jax.named_scope("predict"):
        value, (grads, dz) = jax.value_and_grad(loss, (0, 1))(params, cut.channels.hidden_states.receive(z))
    with jax.named_scope("uplink"):
        return value, grads, cut.channels.head_gradient.send(dz, keys.noise)


def server_backward(cut: Cut, kept: Kept, dz: Payload, weights: jax.Array) -> tuple[ServerParams, Payload]:
    """Returns the body's gradient, of the weighted mean of C clients' losses, and message 4: dL/dh [C, B, T, D].

    Scaling dz gives the weighted mean in one backward pass. It also scales the gradients that flow on to each client, which
    is undone: a client's gradient is that of its own loss.
    """
    share = _share(weights)
    with jax.named_scope("transform"):
        received = cut.channels.head_gradient.receive(dz)
        grads, dh = kept(jnp.where(share > 0, received * share, 0.0).astype(received.dtype))
        dh = jnp.where(share > 0, dh / jnp.where(share > 0, share, 1.0), 0.0).astype(received.dtype)
    with jax.named_scope("downlink"):
        return grads, cut.channels.input_gradient.send(dh, None)


def client_finish(cut: Cut, kept: Kept, dh: Payload, head_grads: ClientParams) -> ClientParams:
    """Returns one client's gradient. The word table is tied, so its two gradients are added."""
    with jax.named_scope("embed"):
        (embed_grads,) = kept(cut.channels.input_gradient.receive(dh))
        return jax.tree.map(jnp.add, head_grads, embed_grads)


def split_step(
    cut: Cut,
    client_params: ClientParams,
    server_params: ServerParams,
    batch: MaskedBatch,
    weights: jax.Array,
    keys: StepKeys = NO_KEYS,
    *,
    shared_client: bool = False,
) -> StepResult:
    """Runs the five halves in one program, for C clients side by side.

    Args:
      cut: from `make_cut`.
      client_params: [C, ...], each client's own; with `shared_client`, without the client axis, the same for all clients
        (each client has its own gradient either way).
      server_params: the body's.
      batch: leaves [C, B, ...].
      weights: float32 [C], non-negative, summing to 1: each client's share in the body's gradient. A client of weight
        0 (padding, or absent) changes nothing, even if its numbers are not finite.
      keys: [C], or [C * G] for G groups of each client's rows.
      shared_client: see `client_params`.
    """
    own, clients = None if shared_client else 0, len(weights)
    mine = jax.tree.map(lambda k: k.reshape(clients, -1), keys._replace(server=None))

    up, kept = jax.vmap(functools.partial(client_begin, cut), (own, 0, 0))(client_params, batch, mine)
    z, body_kept = server_forward(cut, server_params, up, weights, keys)
    loss, head_grads, dz = jax.vmap(functools.partial(client_head, cut), (own, 0, 0, 0))(client_params, batch, z, mine)
    server_grads, dh = server_backward(cut, body_kept, dz, weights)
    client_grads = jax.vmap(functools.partial(client_finish, cut))(kept, dh, head_grads)
    named = {**up._asdict(), "hidden_states": z, "head_gradient": dz, "input_gradient": dh}
    messages = {name: payload for name, payload in named.items() if payload is not None}
    return StepResult(loss, client_grads, server_grads, messages)


def _share(weights: jax.Array) -> jax.Array:
    return weights.reshape(-1, 1, 1, 1)

"""SplitFed (Thapa et al. 2022) over a U in torch, as its users write it: a loop over clients, each with its own step.

V1: the server has one body per client, and averages them at the end of the round. V2: it has one body, which the clients
train one after another. In both, the clients' segments are averaged at the end, unless V2's clients hand theirs on
(`relay`), which is FedBERT's sequential training. Moments are treated like parameters, as in fedbert_jax by default.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn
from transformers import BertForMaskedLM

from benchmarks import flops
from benchmarks.pairs import Side
from benchmarks.sizes import Size
from benchmarks.torch_sides import (
    Masked,
    autocast,
    average_parties,
    client_segment,
    draw_masks,
    first_loss,
    make_adamw,
    make_blocks,
    make_model,
    make_side,
    mlm_loss,
)

NAMES = {"v1": "torch SplitFed V1", "v2": "torch SplitFed V2", "relay": "torch SplitFed V2, segment handed on"}


class SplitFed:
    """The clients, the server, and their round.

    Args:
      version: `v1`, `v2` or `relay`.
      model: cut in place; the clients and V1's bodies are copies.
      size: of the federation.
      everywhere: make logits at all positions.
    """

    def __init__(self, version: str, model: BertForMaskedLM, size: Size, everywhere: bool):
        self.size, self.everywhere = size, everywhere
        segment, body = client_segment(model), model.bert.encoder
        clients = 1 if version == "relay" else size.clients
        bodies = size.clients if version == "v1" else 1
        self.clients = [copy.deepcopy(segment) for _ in range(clients)]
        self.bodies = [copy.deepcopy(body) for _ in range(bodies)]
        self.client_opts = [make_adamw(c, size) for c in self.clients]
        self.body_opts = [make_adamw(b, size) for b in self.bodies]

    def round(self, batches: Sequence[Sequence[Masked]]) -> torch.Tensor:
        """Trains on batches [K][C] of masked rows [B, T]; returns the mean loss."""
        losses = []
        for n in range(self.size.clients):
            c, b = n % len(self.clients), n % len(self.bodies)
            for step in batches:
                losses.append(self._step(self.clients[c], self.bodies[b], step[n]))
                for optimizer in (self.client_opts[c], self.body_opts[b]):
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
        for modules, optimizers in ((self.clients, self.client_opts), (self.bodies, self.body_opts)):
            if len(modules) > 1:
                average_parties(modules, optimizers)
        return torch.stack(losses).mean()

    def _step(self, client: nn.Module, body: nn.Module, batch: Masked) -> torch.Tensor:
        masked, positions, labels = batch
        with autocast(self.size):
            h = client["embeddings"](masked)  # type: ignore[index]
            received = h.detach().requires_grad_()  # activations up
            z = body(received)[0]
            down = z.detach().requires_grad_()  # hidden states down
            loss = mlm_loss(client["head"], down, positions, labels, self.everywhere)  # type: ignore[index]
        loss.backward()
        z.backward(down.grad)  # the head's gradient up
        h.backward(received.grad)  # the input's gradient down
        return loss.detach()


def splitfed_side(size: Size, steps: int, version: str, everywhere: bool) -> Side:
    """Makes a side whose rounds have `steps` local steps."""
    model, blocks = make_model(size), make_blocks(size, steps)
    initial = first_loss(model, size, blocks)
    federation = SplitFed(version, model, size, everywhere)
    del model

    def run() -> torch.Tensor:
        return federation.round([[draw_masks(rows, size) for rows in clients] for clients in blocks])

    name = NAMES[version] + (", logits everywhere" if everywhere else ", gather")
    return make_side(name, size, steps, run, initial, flops.per_token(size, logits_everywhere=everywhere))

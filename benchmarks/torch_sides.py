"""torch's sides of the step benchmark, built from the public parts of `transformers`, each at its best settings.

All use the fused AdamW, gradients set to None, no dropout, no clipping, SDPA attention, and as many threads as there are
cores. Masks are drawn in the step, as fedbert_jax draws them.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForMaskedLM

from benchmarks.pairs import Side, guess_loss
from benchmarks.sizes import FIRST, LEARNING_RATE, MASK, MASK_PROB, WEIGHT_DECAY, Size, random_blocks

Masked = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def hf_side(size: Size, steps: int, batch: int, compiled: bool = False) -> Side:
    """Hugging Face's `BertForMaskedLM` as people run it, with logits everywhere, in steps of `batch` sequences.

    Fewer than the global batch means as many more steps, all on one model: a simulator that loops over clients does
    this and moves each client's weights in and out, too.

    Args:
      size: of the model and the global batch.
      steps: global batches a call.
      batch: sequences a step.
      compiled: use `torch.compile`.
    """
    model, blocks = _model(size), _blocks(size, steps).reshape(-1, batch, size.length)
    forward = torch.compile(model) if compiled else model
    optimizer = _adamw(model)

    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        masked, positions, chosen = _mask(tokens, size)
        labels = torch.full_like(tokens, -100).scatter_(1, positions, chosen)
        return forward(input_ids=masked, labels=labels).loss

    name = f"torch HF, {size.rows // batch} x {batch} sequences" + ", compiled" * compiled
    return _one_model(name, size, loss_of, optimizer, blocks)


def gather_side(size: Size, steps: int, compiled: bool = False) -> Side:
    """The same model with logits only at the masked positions: as good as torch can be made without a cut."""
    model, blocks = _model(size), _blocks(size, steps).reshape(steps, size.rows, size.length)
    body, head = (torch.compile(model.bert), torch.compile(model.cls)) if compiled else (model.bert, model.cls)
    optimizer = _adamw(model)

    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        masked, positions, labels = _mask(tokens, size)
        z = body(input_ids=masked).last_hidden_state
        return _mlm_loss(head, z, positions, labels)

    return _one_model("torch gather" + ", compiled" * compiled, size, loss_of, optimizer, blocks)


def split_side(size: Size, steps: int, compiled: bool = False) -> Side:
    """SplitFed over a U, done well in torch: what `parallel` does, with a loop where the clients differ.

    Each client has its own embedding and tied head with an AdamW of its own; one body runs all clients' rows as one
    batch. After `steps` steps the clients' segments and their moments are averaged, as `parallel` does by default.
    """
    model, blocks = _model(size), _blocks(size, steps)
    body = torch.compile(model.bert.encoder) if compiled else model.bert.encoder
    segment = nn.ModuleDict({"embeddings": model.bert.embeddings, "head": model.cls})  # deepcopy keeps them tied
    clients = [copy.deepcopy(segment) for _ in range(size.clients)]
    client_opts = [_adamw(c) for c in clients]
    body_opt = _adamw(model.bert.encoder)

    def step(tokens: torch.Tensor) -> float:  # [C, B, T]
        batches = [_mask(t, size) for t in tokens]
        embedded = [c["embeddings"](b[0]) for c, b in zip(clients, batches, strict=True)]
        received = torch.cat([h.detach() for h in embedded]).requires_grad_()  # the cut: activations up
        z = body(received)[0]
        down = z.detach().requires_grad_()  # the cut: hidden states down
        losses = [
            _mlm_loss(c["head"], rows, positions, labels)
            for c, rows, (_, positions, labels) in zip(clients, down.split(size.batch), batches, strict=True)
        ]
        torch.stack(losses).sum().backward()
        # The body's gradient is the mean over clients; each client's own is of its own loss.
        torch.autograd.backward(z, down.grad / size.clients)
        torch.autograd.backward(embedded, list((received.grad * size.clients).split(size.batch)))
        for optimizer in (*client_opts, body_opt):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return sum(loss.item() for loss in losses) / size.clients

    def run() -> float:
        loss = sum(step(tokens) for tokens in blocks) / steps
        _average([list(c.parameters()) for c in clients])
        for moment in ("exp_avg", "exp_avg_sq"):
            states = zip(clients, client_opts, strict=True)
            _average([[optimizer.state[p][moment] for p in c.parameters()] for c, optimizer in states])
        return loss

    with torch.no_grad():
        masked, positions, labels = _mask(blocks[0].reshape(size.rows, size.length), size)
        initial = _mlm_loss(model.cls, model.bert(input_ids=masked).last_hidden_state, positions, labels).item()
    return _side("torch split" + ", compiled" * compiled, size, steps, run, initial)


def _one_model(
    name: str, size: Size, loss_of: Callable[[torch.Tensor], torch.Tensor], optimizer: torch.optim.Optimizer,
    blocks: torch.Tensor,
) -> Side:  # fmt: skip
    def run() -> float:
        losses = []
        for tokens in blocks:
            loss = loss_of(tokens)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
        return sum(losses) / len(losses)

    with torch.no_grad():
        initial = loss_of(blocks[0]).item()
    return _side(name, size, blocks.shape[0] * blocks.shape[1] // size.rows, run, initial)


def _side(name: str, size: Size, steps: int, run: Callable[[], float], initial: float) -> Side:
    start = time.perf_counter()
    first = run()  # with torch.compile, most of it is the compiler's time
    return Side(name, size.tokens * steps, run, guess_loss(size.vocab), initial, time.perf_counter() - start, [first])


def _model(size: Size) -> BertForMaskedLM:
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(
        vocab_size=size.vocab, hidden_size=size.hidden, num_hidden_layers=size.layers, num_attention_heads=size.heads,
        intermediate_size=4 * size.hidden, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",
    )).train()  # fmt: skip


def _adamw(module: nn.Module) -> torch.optim.Optimizer:
    plain = [p for p in module.parameters() if p.ndim < 2]  # biases and LayerNorm: no decay
    decayed = [p for p in module.parameters() if p.ndim >= 2]
    groups: list[dict[str, Any]] = [dict(params=decayed), dict(params=plain, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)


def _blocks(size: Size, steps: int) -> torch.Tensor:
    return torch.from_numpy(random_blocks(size, steps).astype(np.int64))


def _mask(tokens: torch.Tensor, size: Size) -> Masked:
    """Masks M positions of each row [B, T] 80/10/10; returns masked tokens [B, T], positions and labels [B, M]."""
    count = math.ceil(MASK_PROB * size.length)
    scores = torch.rand(tokens.shape).masked_fill_(tokens < FIRST, 2.0)
    positions = scores.topk(count, largest=False).indices.sort(dim=1).values
    labels = tokens.gather(1, positions)
    draw, random = torch.rand(labels.shape), torch.randint(0, size.vocab, labels.shape)
    replaced = torch.where(draw < 0.8, MASK, torch.where(draw < 0.9, random, labels))
    return tokens.scatter(1, positions, replaced), positions, labels


def _mlm_loss(
    head: Callable[[torch.Tensor], torch.Tensor], z: torch.Tensor, positions: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    chosen = z.gather(1, positions[..., None].expand(-1, -1, z.shape[-1]))  # [B, M, D]
    return cross_entropy(head(chosen).flatten(0, 1), labels.flatten())


@torch.no_grad()
def _average(copies: Iterable[list[torch.Tensor]]) -> None:
    """Replaces each client's tensors by the clients' mean, in place."""
    first, *others = copies
    torch._foreach_mul_(first, 1 / (1 + len(others)))
    for other in others:
        torch._foreach_add_(first, other, alpha=1 / (1 + len(others)))
    for other in others:
        torch._foreach_copy_(other, first)

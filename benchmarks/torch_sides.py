"""torch's centralised sides, and split learning done well in torch, built from the public parts of `transformers`.

All use the fused AdamW, gradients set to None, no dropout, no clipping, SDPA attention, bfloat16 through autocast, and on a
CPU as many threads as there are cores. Masks are drawn in the step, as fedbert_jax draws them.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForMaskedLM

from benchmarks import flops
from benchmarks.pairs import Side, guess_loss
from benchmarks.sizes import FIRST, MASK, WEIGHT_DECAY, Size, random_blocks

Masked = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # tokens [B, T], positions [B, M], labels [B, M]


def hf_side(size: Size, steps: int, batch: int, compiled: bool = False) -> Side:
    """Hugging Face's `BertForMaskedLM` as people run it, with logits everywhere, in steps of `batch` sequences.

    If `batch` is smaller than the global batch, there are more steps in proportion, all on one model: a simulator that
    loops over clients does this, and moves each client's weights in and out as well.

    Args:
      size: of the model and the global batch.
      steps: global batches per call.
      batch: sequences per step.
      compiled: use `torch.compile`.
    """
    model, blocks = make_model(size), make_blocks(size, steps).reshape(-1, batch, size.length)
    forward = torch.compile(model, backend=size.compiler) if compiled else model

    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        masked, positions, chosen = draw_masks(tokens, size)
        labels = torch.full_like(tokens, -100).scatter_(1, positions, chosen)
        return forward(input_ids=masked, labels=labels).loss

    name = f"torch HF, {size.rows // batch} x {batch} sequences" + ", compiled" * compiled
    return _one_model(name, size, model, loss_of, blocks, everywhere=True)


def gather_side(size: Size, steps: int, compiled: bool = False) -> Side:
    """The same model with logits only at the masked positions: as good as torch can be made without a cut."""
    model, blocks = make_model(size), make_blocks(size, steps).reshape(steps, size.rows, size.length)

    def forward(masked: torch.Tensor, positions: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return mlm_loss(model.cls, model.bert(input_ids=masked).last_hidden_state, positions, labels)

    chosen = torch.compile(forward, backend=size.compiler) if compiled else forward
    name = "torch gather" + ", compiled" * compiled
    return _one_model(name, size, model, lambda tokens: chosen(*draw_masks(tokens, size)), blocks)


def split_side(size: Size, steps: int) -> Side:
    """SplitFed over a U, done well in torch: the same as `parallel`, with a loop where the clients differ.

    Each client has its own embedding and tied head with an AdamW of its own; one body runs all clients' rows as one
    batch. After `steps` steps the clients' segments and their moments are averaged, as `parallel` does by default.
    """
    model, blocks = make_model(size), make_blocks(size, steps)
    body = model.bert.encoder
    clients = [copy.deepcopy(client_segment(model)) for _ in range(size.clients)]
    client_opts = [make_adamw(c, size) for c in clients]
    body_opt = make_adamw(body, size)
    initial = first_loss(model, size, blocks)

    def step(tokens: torch.Tensor) -> torch.Tensor:  # [C, B, T]
        batches = [draw_masks(t, size) for t in tokens]
        with autocast(size):
            embedded = [c["embeddings"](b[0]) for c, b in zip(clients, batches, strict=True)]
            received = torch.cat([h.detach() for h in embedded]).requires_grad_()  # the cut: activations up
            z = body(received)[0]
            down = z.detach().requires_grad_()  # the cut: hidden states down
            losses = torch.stack(
                [
                    mlm_loss(c["head"], rows, positions, labels)
                    for c, rows, (_, positions, labels) in zip(clients, down.split(size.batch), batches, strict=True)
                ]
            )
        losses.sum().backward()
        # The body's gradient is the mean over clients; each client's gradient is that of its own loss.
        torch.autograd.backward(z, down.grad / size.clients)
        torch.autograd.backward(embedded, list((received.grad * size.clients).split(size.batch)))
        for optimizer in (*client_opts, body_opt):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return losses.detach().mean()

    def run() -> torch.Tensor:
        loss = torch.stack([step(tokens) for tokens in blocks]).mean()
        average_parties(clients, client_opts)
        return loss

    return make_side("torch split", size, steps, run, initial, flops.per_token(size))


def _one_model(
    name: str,
    size: Size,
    model: nn.Module,
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    blocks: torch.Tensor,
    everywhere: bool = False,
) -> Side:
    optimizer = make_adamw(model, size)
    initial = first_loss(model, size, blocks)

    def run() -> torch.Tensor:
        losses = []
        for tokens in blocks:
            with autocast(size):
                loss = loss_of(tokens)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
        return torch.stack(losses).mean()

    steps = blocks.shape[0] * blocks.shape[1] // size.rows
    return make_side(name, size, steps, run, initial, flops.per_token(size, logits_everywhere=everywhere))


# --- shared by all of torch's sides ------------------------------------------------------------------------------------


def make_side(
    name: str, size: Size, steps: int, run: Callable[[], torch.Tensor], initial: float, count: flops.Flops
) -> Side:
    """Makes a side from a function that trains `steps` global batches and returns their mean loss."""

    def run_to_the_end() -> float:
        loss = run()
        if device(size) == "cuda":
            torch.cuda.synchronize()  # the last optimizer step, too
        return loss.item()

    start = time.perf_counter()
    first = run_to_the_end()  # with torch.compile, most of it is the compiler's time
    seconds = time.perf_counter() - start
    guess = guess_loss(size.vocab, size.hidden)
    return Side(name, size.tokens * steps, run_to_the_end, guess, initial, seconds, [first], count)


def device(size: Size) -> str:
    """Returns torch's name of the device."""
    return "cuda" if size.device == "gpu" and torch.cuda.is_available() else "cpu"


def autocast(size: Size) -> Any:
    """Returns the context in which forward passes compute in the size's dtype."""
    return torch.autocast(device(size), torch.bfloat16, enabled=size.dtype == "bfloat16")


def make_model(size: Size) -> BertForMaskedLM:
    """Returns a fresh model on the device, ready to train."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest" if size.dtype == "float32" else "high")
    return (
        BertForMaskedLM(
            BertConfig(
                vocab_size=size.vocab,
                hidden_size=size.hidden,
                num_hidden_layers=size.layers,
                num_attention_heads=size.heads,
                intermediate_size=4 * size.hidden,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                attn_implementation="sdpa",
            )
        )
        .train()
        .to(device(size))
    )


def client_segment(model: BertForMaskedLM) -> nn.ModuleDict:
    """Returns the parts of a model that a client holds; a deepcopy keeps embedding and decoder tied."""
    return nn.ModuleDict({"embeddings": model.bert.embeddings, "head": model.cls})


def make_adamw(module: nn.Module, size: Size) -> torch.optim.Optimizer:
    """Returns the fused AdamW, without decay of biases and LayerNorm."""
    plain = [p for p in module.parameters() if p.ndim < 2]
    decayed = [p for p in module.parameters() if p.ndim >= 2]
    groups: list[dict[str, Any]] = [dict(params=decayed), dict(params=plain, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=size.learning_rate, weight_decay=WEIGHT_DECAY, fused=True)


def make_blocks(size: Size, steps: int) -> torch.Tensor:
    """Returns the training text [K, C, B, T]."""
    return torch.from_numpy(random_blocks(size, steps).astype(np.int64)).to(device(size))


def draw_masks(tokens: torch.Tensor, size: Size) -> Masked:
    """Masks M positions of each row [B, T] 80/10/10; returns masked tokens [B, T], positions and labels [B, M]."""
    where = tokens.device
    scores = torch.rand(tokens.shape, device=where).masked_fill_(tokens < FIRST, 2.0)
    positions = scores.topk(size.masked, largest=False).indices.sort(dim=1).values
    labels = tokens.gather(1, positions)
    draw, random = torch.rand(labels.shape, device=where), torch.randint(0, size.vocab, labels.shape, device=where)
    replaced = torch.where(draw < 0.8, MASK, torch.where(draw < 0.9, random, labels))
    return tokens.scatter(1, positions, replaced), positions, labels


def mlm_loss(
    head: Callable[[torch.Tensor], torch.Tensor],
    z: torch.Tensor,
    positions: torch.Tensor,
    labels: torch.Tensor,
    everywhere: bool = False,
) -> torch.Tensor:
    """Returns the mean loss at the positions [B, M] of z [B, T, D]; `everywhere` computes logits at all T."""
    if everywhere:
        spread = torch.full(z.shape[:2], -100, device=z.device).scatter_(1, positions, labels)
        return cross_entropy(head(z).flatten(0, 1), spread.flatten())
    chosen = z.gather(1, positions[..., None].expand(-1, -1, z.shape[-1]))  # [B, M, D]
    return cross_entropy(head(chosen).flatten(0, 1), labels.flatten())


def first_loss(model: BertForMaskedLM, size: Size, blocks: torch.Tensor) -> float:
    """Returns the untrained model's loss on the first step's text."""
    with torch.no_grad(), autocast(size):
        masked, positions, labels = draw_masks(blocks[0].reshape(-1, size.length), size)
        return mlm_loss(model.cls, model.bert(input_ids=masked).last_hidden_state, positions, labels).item()


@torch.no_grad()
def average_parties(modules: Iterable[nn.Module], optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Replaces the parameters and moments of equal modules by their mean, in place."""
    parties = list(zip(modules, optimizers, strict=True))
    _average([list(m.parameters()) for m, _ in parties])
    for moment in ("exp_avg", "exp_avg_sq"):
        _average([[optimizer.state[p][moment] for p in m.parameters()] for m, optimizer in parties])


def _average(copies: list[list[torch.Tensor]]) -> None:
    first, *others = copies
    torch._foreach_mul_(first, 1 / len(copies))
    for other in others:
        torch._foreach_add_(first, other, alpha=1 / len(copies))
    for other in others:
        torch._foreach_copy_(other, first)

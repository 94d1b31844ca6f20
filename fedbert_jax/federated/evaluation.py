"""Evaluation: the MLM loss and accuracy on each client's held-out text, by the model that client would use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedbert_jax.data.masking import MaskedBatch, MaskSpec, mask_blocks
from fedbert_jax.federated.setting import Pair
from fedbert_jax.federated.split import joined_logits
from fedbert_jax.models.bert import Segments

EVAL = 0x6576616C  # keeps evaluation's masks apart from training's


class EvalSet(NamedTuple):
    """Held-out blocks in batches of one client each; the masks are the same at every evaluation."""

    tokens: Any  # integers [S, B, T]; as `make_eval_set` returns it, the blocks' numbers [S, B]
    real: Any  # float32 [S, B], 0 for a row that fills a batch up
    batch_ids: Any  # int32 [S], seeds a batch's masks
    clients: Any  # int32 [S], whose text it is


class Scores(NamedTuple):
    """Means over masked held-out tokens: all of them, and each evaluated client's."""

    loss: float
    accuracy: float
    clients: dict[int, tuple[float, float]]  # client id -> (loss, accuracy)


def make_eval_set(offsets: np.ndarray, clients: np.ndarray, max_blocks: int, batch: int, multiple: int = 1) -> EvalSet:
    """Chooses the first `max_blocks` held-out blocks of each given client.

    Args:
      offsets: int [N+1]; client c's held-out blocks are offsets[c]:offsets[c+1].
      clients: int [E], the clients to evaluate; those without held-out blocks are passed over.
      max_blocks: a client's share in the cost.
      batch: rows a batch; its masks depend on that.
      multiple: B is filled up to a multiple of this, so that devices divide it. Masks are drawn row by row, so that
        changes no score.

    Returns:
      NumPy arrays, with the blocks' numbers int64 [S, B] for `tokens`.
    """
    rows, real, owners = [], [], []
    size = batch + -batch % multiple
    for c in clients:
        blocks = np.arange(offsets[c], min(offsets[c + 1], offsets[c] + max_blocks))
        for start in range(0, len(blocks), batch):
            part = blocks[start : start + batch]
            rows.append(np.resize(part, size))  # repeats rows to fill the batch up; they count 0
            real.append((np.arange(size) < len(part)).astype(np.float32))
            owners.append(c)
    ids = np.arange(len(rows), dtype=np.int32)
    shape = (len(rows), size)
    return EvalSet(
        np.array(rows, np.int64).reshape(shape), np.array(real, np.float32).reshape(shape), ids, np.array(owners, np.int32)
    )


def eval_batch(seed: int, blocks: jax.Array, batch_id: jax.Array, spec: MaskSpec) -> MaskedBatch:
    """Masks an evaluation batch [B, T]: the same way whenever, and whatever strategy, evaluates it."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), EVAL), batch_id)
    return mask_blocks(key, blocks, spec)


def make_evaluate(
    segments: Segments, spec: MaskSpec, seed: int, model_of: Callable[[Any, jax.Array], Pair]
) -> Callable[[Any, EvalSet], jax.Array]:
    """Returns the function (state, eval set) -> float32 [S, 3]: summed loss, right answers and count a batch."""

    def evaluate(state: Any, data: EvalSet) -> jax.Array:
        def one(batch: EvalSet) -> jax.Array:
            model = model_of(state, batch.clients)
            masked = eval_batch(seed, batch.tokens, batch.batch_ids, spec)
            logits = joined_logits(segments, model.client, model.server, masked)
            nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), masked.labels[..., None], axis=-1)[..., 0]
            weights = masked.weights * batch.real[:, None]
            right = (jnp.argmax(logits, axis=-1) == masked.labels).astype(jnp.float32)
            return jnp.stack([jnp.sum(nll * weights), jnp.sum(right * weights), jnp.sum(weights)])

        return jax.lax.map(one, data)

    return evaluate


def scores(sums: np.ndarray, owners: np.ndarray) -> Scores | None:
    """Turns the sums [S, 3] of batches owned by `owners` [S] into means; None when there is no held-out text."""
    total = sums.astype(np.float64).sum(axis=0) if len(sums) else np.zeros(3)
    if total[2] == 0:
        return None
    clients = {}
    for c in np.unique(owners):
        loss, right, count = sums[owners == c].astype(np.float64).sum(axis=0)
        clients[int(c)] = (float(loss / count), float(right / count))
    return Scores(float(total[0] / total[2]), float(total[1] / total[2]), clients)

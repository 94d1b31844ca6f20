"""Evaluation: how well each client's held-out text is predicted from context by the model that client would use.

Every chosen position of held-out text becomes [MASK], so there is nothing to copy. The score of guessing by frequency is
computed at exactly the same positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedbert_jax.data import streams
from fedbert_jax.data.masking import MaskedBatch, MaskSpec, mask_blocks
from fedbert_jax.data.streams import Secrets, Seeds, Stream
from fedbert_jax.federated.joined import joined_logits
from fedbert_jax.federated.state import Pair
from fedbert_jax.models.bert import Segments


class EvalPlan(NamedTuple):
    """Which held-out blocks are scored, in batches of one client each. NumPy arrays."""

    rows: np.ndarray  # int64 [S, B], indices among all clients' blocks
    real: np.ndarray  # float32 [S, B], 0 for a row that pads a batch
    blocks: np.ndarray  # int32 [S, B], indices among the client's own blocks
    clients: np.ndarray  # int32 [S], the client of each batch


class EvalSet(NamedTuple):
    """The blocks of an `EvalPlan`; the masks are the same at every evaluation."""

    tokens: jax.Array  # integers [S, B, T]
    real: jax.Array  # float32 [S, B]
    blocks: jax.Array  # int32 [S, B]; with the client, they decide a block's mask
    clients: jax.Array  # int32 [S]


class Exam(NamedTuple):
    """What one client's model is asked over a network, batch by batch, and what the client says of the answers."""

    questions: Callable[[], Iterator[tuple[MaskedBatch, Any]]]  # batches [B, ...], each with what `marks` needs beside it
    marks: Callable[[jax.Array, MaskedBatch, Any], jax.Array]  # (logits [B, M, ...], batch, what it needs), traced
    total: Callable[[Sequence[np.ndarray]], np.ndarray]  # the marks of all batches -> float32 [...], which the client sends


class Score(NamedTuple):
    """Means over masked held-out positions."""

    loss: float  # nats
    accuracy: float


class Evaluation(NamedTuple):
    """The scores of the clients that were evaluated, and their two means."""

    clients: dict[int, Score]  # by client id
    over_clients: Score  # every client has the same weight
    by_text: Score  # clients are weighted by their amount of training text

    def headline(self, weighting: str) -> Score:
        """Returns the mean that weights clients as training does (`federated.weighting`)."""
        return self.over_clients if weighting == "uniform" else self.by_text

    def fields(self, loss: str, accuracy: str, weighting: str) -> dict[str, float]:
        """Returns both means by name, `{loss}_over_clients` and so on; names without such a suffix hold the headline."""
        named = {"": self.headline(weighting), "_over_clients": self.over_clients, "_by_text": self.by_text}
        pairs = [(f"{loss}{end}", score.loss) for end, score in named.items()]
        return dict(pairs + [(f"{accuracy}{end}", score.accuracy) for end, score in named.items()])

    def scope(self, weighting: str, num_clients: int) -> str:
        """Returns which mean the headline is, and how many of all clients it covers."""
        mean = "mean over" if weighting == "uniform" else "mean by text,"
        return f"{mean} {len(self.clients):,} of {num_clients:,} clients"


def plan_evaluation(
    offsets: np.ndarray, clients: np.ndarray, max_blocks: int, batch: int, seeds: Seeds, multiple: int = 1
) -> EvalPlan:
    """Draws `max_blocks` of each given client's held-out blocks.

    Args:
      offsets: int [N+1]; client c's held-out blocks are offsets[c]:offsets[c+1].
      clients: int [E], the clients to evaluate; those without held-out blocks are passed over.
      max_blocks: per client; bounds its share of the cost.
      batch: rows per batch, at most `max_blocks`.
      seeds: the run's.
      multiple: B is padded to a multiple of this, so that it can be divided over devices.

    Returns:
      The plan. No score depends on how rows are grouped into batches.
    """
    rows, real, numbers, owners = [], [], [], []
    batch = min(batch, max_blocks)
    size = batch + -batch % multiple
    for c in clients:
        held = int(offsets[c + 1] - offsets[c])
        rng = streams.generator(seeds, Stream.SCORED_BLOCKS, c)
        chosen = np.sort(rng.choice(held, min(held, max_blocks), replace=False))
        for start in range(0, len(chosen), batch):
            part = chosen[start : start + batch]
            filled = np.resize(part, size)  # pads the batch with repeated rows, which have weight 0
            rows.append(offsets[c] + filled)
            real.append((np.arange(size) < len(part)).astype(np.float32))
            numbers.append(filled)
            owners.append(c)
    shape = (len(rows), size)
    return EvalPlan(
        np.array(rows, np.int64).reshape(shape),
        np.array(real, np.float32).reshape(shape),
        np.array(numbers, np.int32).reshape(shape),
        np.array(owners, np.int32),
    )


def masked(of: Secrets, batch: EvalSet, spec: MaskSpec) -> MaskedBatch:
    """Masks one batch [B, T] of an eval set, in the same way at every evaluation and for every strategy."""

    def one(block: jax.Array, number: jax.Array) -> MaskedBatch:
        drawn = mask_blocks(streams.key(of, Stream.EVAL_MASK, batch.clients, number), block[None], spec, hide_all=True)
        return jax.tree.map(lambda x: x[0], drawn)

    return jax.vmap(one)(batch.tokens, batch.blocks)


def make_evaluate(
    segments: Segments, spec: MaskSpec, seeds: Seeds, model_of: Callable[[Any, jax.Array], Pair]
) -> Callable[[Any, EvalSet], jax.Array]:
    """Returns the function (state, eval set) -> float32 [S, 3]: summed loss, right answers and count per batch."""

    def evaluate(state: Any, data: EvalSet) -> jax.Array:
        def one(batch: EvalSet) -> jax.Array:
            model = model_of(state, batch.clients)
            questions = masked(streams.secrets(seeds), batch, spec)
            logits = joined_logits(segments, model.client, model.server, questions)
            return sums_of(logits, questions, batch.real)

        return jax.lax.map(one, data)

    return evaluate


def masked_exam(held: EvalSet | None, spec: MaskSpec, seeds: Seeds) -> Exam:
    """Returns the exam of a client's held-out blocks (None: it has none), whose total is that of `sums_of`, float32 [3]."""
    ask = jax.jit(lambda one: masked(streams.secrets(seeds), one, spec))

    def questions() -> Iterator[tuple[MaskedBatch, Any]]:
        for n in range(0 if held is None else len(held.clients)):
            one = jax.tree.map(lambda x: x[n], held)  # noqa: B023
            yield ask(one), one.real

    return Exam(questions, sums_of, lambda marks: sum(marks, np.zeros(3, np.float32)))


def make_evaluate_frequencies(spec: MaskSpec, seeds: Seeds) -> Callable[[jax.Array, EvalSet], jax.Array]:
    """Returns the same function for guessing by frequency: (log-probabilities float32 [V], eval set) -> float32 [S, 3]."""

    def evaluate(log_probs: jax.Array, data: EvalSet) -> jax.Array:
        def one(batch: EvalSet) -> jax.Array:
            questions = masked(streams.secrets(seeds), batch, spec)
            guesses = jnp.full(questions.labels.shape, jnp.argmax(log_probs), jnp.int32)
            return _sums(-log_probs[questions.labels], guesses, questions, batch.real)

        return jax.lax.map(one, data)

    return evaluate


def sums_of(logits: jax.Array, questions: MaskedBatch, real: jax.Array) -> jax.Array:
    """Returns the summed loss, right answers and count of a batch's logits [B, M, V], float32 [3]; `real` is float32 [B]."""
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), questions.labels[..., None], axis=-1)[..., 0]
    return _sums(nll, jnp.argmax(logits, axis=-1), questions, real)


def _sums(nll: jax.Array, guesses: jax.Array, questions: MaskedBatch, real: jax.Array) -> jax.Array:
    weights = questions.weights * real[:, None]
    right = (guesses == questions.labels).astype(jnp.float32)
    # Positions of weight 0 are left out rather than multiplied by 0, since their loss need not be finite.
    return jnp.stack([jnp.sum(jnp.where(weights > 0, nll, 0.0)), jnp.sum(right * weights), jnp.sum(weights)])


def log_frequencies(counts: np.ndarray, special_ids: tuple[int, ...]) -> np.ndarray:
    """Returns the log-probabilities for guessing by frequency, float32 [V].

    Args:
      counts: int [V], how often each token is in the training blocks; 1 is added to each, so that none is impossible.
      special_ids: tokens that are never guessed nor asked for; their log-probability is -inf.
    """
    smoothed = np.where(np.isin(np.arange(len(counts)), special_ids), 0, counts + 1).astype(np.float64)
    with np.errstate(divide="ignore"):
        return np.log(smoothed / smoothed.sum()).astype(np.float32)


def evaluation(sums: np.ndarray, owners: np.ndarray, sizes: np.ndarray) -> Evaluation | None:
    """Turns the sums of batches into scores; returns None if no position was scored.

    Args:
      sums: float32 [S, 3], summed loss, right answers and count per batch.
      owners: int [S], the client of each batch. A client without a scored position is left out.
      sizes: int [N], every client's amount of training text.
    """
    clients, weights = {}, []
    for c in np.unique(owners):
        loss, right, count = sums[owners == c].astype(np.float64).sum(axis=0)
        if count > 0:
            clients[int(c)] = Score(float(loss / count), float(right / count))
            weights.append(float(sizes[c]))
    if not clients:
        return None
    each = np.array(list(clients.values()))  # [E, 2]
    by_text = np.array(weights) / sum(weights)
    return Evaluation(clients, Score(*map(float, each.mean(axis=0))), Score(*map(float, by_text @ each)))

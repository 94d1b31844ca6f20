"""A round of a finished run once more, by the run's own functions, with what crossed kept."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedbert_jax.audit.source import Source
from fedbert_jax.audit.views import Aggregate, Messages, Truth
from fedbert_jax.data.masking import MaskedBatch
from fedbert_jax.federated.metrics import Recorder
from fedbert_jax.federated.rounds import make_strategy
from fedbert_jax.federated.setting import Setting
from fedbert_jax.federated.split import StepResult, client_begin
from fedbert_jax.federated.state import Cohort, State, num_steps
from fedbert_jax.federated.wire import Channel
from fedbert_jax.models.layers import take_positions


class Replay(NamedTuple):
    """A round's messages."""

    messages: Messages
    truth: Truth
    aggregate: Aggregate | None  # None: nobody averages
    state: State | None = None  # with which the round ends, where it was run once more


def replay(source: Source) -> Replay:
    """Runs the round once more, and keeps what crosses. The source's state is left as it is."""
    assert source.cohort is not None
    s, state, cohort = source.setting, source.state, source.cohort(source.replayed)

    def program(state: State, cohort: Cohort) -> Any:
        return make_strategy(s, _recorder(s)).round(state, cohort)

    with jax.set_mesh(source.mesh):
        end, metrics = jax.jit(program)(state, cohort)
    seen, ended = jax.device_get((metrics.seen, metrics.ended))
    there, clients = np.asarray(cohort.weights) > 0, np.asarray(cohort.clients)
    if s.how.clients in ("together", "pooled"):  # [K, C, B, ...]
        seen = jax.tree.map(lambda x: np.swapaxes(x, 0, 1), seen)
    seen, ended = jax.tree.map(lambda x: x[there], (seen, ended))  # [C, K, B, ...]
    # By step, then client, so that the first rows are of every client.
    parts = {name: np.swapaxes(x, 0, 1) for name, x in seen["rows"].items() if x is not None}
    length = source.config.data.seq_len
    rows = {name: padded(name, x, length) for name, x in _flat(parts, clients[there]).items()}
    steps, gradient, held = seen["rows"]["tokens"].shape[1], seen["gradient"], held_words(source, seen["rows"])
    return Replay(messages_of(rows), truth_of(source, rows), aggregate_of(source, steps, gradient, ended, held), end)


def log(source: Source, blocks: int) -> tuple[Messages, Truth]:
    """Returns message 1 of the last `blocks` blocks that crossed before the round.

    All are embedded by the round's segment, as if it had not changed meanwhile: that is a little easier to read than what
    the server has logged. They are fewer if the run has had fewer.
    """
    assert source.cohort is not None
    s, cut = source.setting, source.setting.cut()

    def begin(params: Any, cohort: Cohort) -> Any:
        def step(k: jax.Array, rows: Any) -> Any:
            batch, keys = s.draw(rows, cohort.round, k, cohort.clients)
            mine = jax.tree.map(lambda x: x.reshape(len(cohort.clients), -1), keys._replace(server=None))
            up = jax.vmap(lambda b, k: client_begin(cut, params, b, k)[0], (0, 0))(batch, mine)
            return rows_of(batch) | {"h": received(cut, up.activations), "positions": asked(s, batch)}

        return jax.lax.map(lambda x: step(*x), (jnp.arange(num_steps(cohort.rows)), cohort.rows))

    program, parts, found = jax.jit(begin), [], 0
    with jax.set_mesh(source.mesh):
        for round in source.before:
            if found >= blocks:
                break
            cohort = source.cohort(round)
            there = np.asarray(cohort.weights) > 0
            seen = jax.device_get(program(source.state.model.client, cohort))  # [K, C, B, ...]
            seen = {name: x[:, there] for name, x in seen.items() if x is not None}
            parts.append(_flat(seen, np.asarray(cohort.clients)[there]))
            found += len(parts[-1]["h"])
    length = source.config.data.seq_len
    rows = {name: np.concatenate([padded(name, part[name], length) for part in parts])[:blocks] for name in parts[0]}
    return messages_of(rows), truth_of(source, rows)


def _flat(rows: dict[str, np.ndarray], clients: np.ndarray) -> dict[str, np.ndarray]:
    """Lays rows [K, C, B, ...] one after another, [R, ...], and adds whose they are."""
    steps, count, size = rows["h"].shape[:3]
    owner = np.broadcast_to(clients[None, :, None], (steps, count, size)).reshape(-1)
    return {name: x.reshape(-1, *x.shape[3:]) for name, x in rows.items()} | {"client": owner}


def padded(name: str, x: np.ndarray, length: int) -> np.ndarray:
    """Returns rows of tokens or of h with T = `length`: batches of examples are padded to several lengths."""
    if name not in ("h", "tokens") or x.shape[1] == length:
        return x
    return np.pad(x, [(0, 0), (0, length - x.shape[1]), *[(0, 0)] * (x.ndim - 2)])


def rows_of(batch: MaskedBatch) -> dict[str, jax.Array]:
    """Returns what is known of a batch at the client."""
    rows = {"tokens": batch.tokens, "labels": batch.labels, "weights": batch.weights, "places": batch.positions}
    return rows if batch.lengths is None else rows | {"lengths": batch.lengths}


def asked(s: Setting, batch: MaskedBatch) -> jax.Array | None:
    """Returns the predicted positions, if a server knows them: they cross, or dz is 0 everywhere else."""
    wire = s.config.wire
    return batch.positions if wire.downlink == "masked" or not wire.gradient_noise else None


def received(cut: Any, payload: Any) -> jax.Array:
    """Returns h of message 1 as the server's layers are given it, float32."""
    return cut.channels.activations.receive(payload).astype(jnp.float32)


def _recorder(s: Setting) -> Recorder:
    cut = s.cut()

    def step(batch: MaskedBatch, out: StepResult) -> Any:
        sent, channels = out.messages, cut.channels
        z, dz = channels.hidden_states.receive(sent["hidden_states"]), channels.head_gradient.receive(sent["head_gradient"])
        if not cut.masked_only:  # elsewhere dz is 0, or noise
            z, dz = take_positions(z, batch.positions), take_positions(dz, batch.positions)
        rows = rows_of(batch) | {
            "h": received(cut, sent["activations"]),
            "positions": asked(s, batch),
            "z": z.astype(jnp.float32),
            "dz": dz.astype(jnp.float32),
        }
        return {"rows": rows, "gradient": norms_of(out, channels.gradient) if s.how.averages_gradients else None}

    def end(client: Any, opt: Any) -> Any:
        return {"word": word_table(client), "moments": moments_of(opt)}

    return Recorder(step, end)


def norms_of(out: StepResult, coded: Channel | None) -> jax.Array:
    """Returns how large each client's gradient of each word's row is as it crosses, [C, V].

    What a codec has lost in earlier steps, and sends later, is left out.
    """
    rows = word_table(out.client_grads)
    if coded is not None:
        rows = coded.receive(coded.send(rows, None))
    return jnp.linalg.norm(rows.astype(jnp.float32), axis=-1)


def word_table(params: Any) -> jax.Array:
    """Returns a client segment's word table, [V, D]."""
    return params["embeddings"]["word"]["embedding"]


def moments_of(opt: Any) -> jax.Array | None:
    """Returns an Adam state's mean squares of the word table's gradient, summed over its columns; None if it has none."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(opt):
        name = jax.tree_util.keystr(path)
        if ".nu" in name and "['word']" in name:
            return jnp.sum(leaf, axis=-1)
    return None


def aggregate_of(source: Source, steps: int, gradient: np.ndarray | None, ended: Any, held: np.ndarray) -> Aggregate | None:
    """Returns what whoever adds up, or stands on both sides of a turn, sees; None if nothing is averaged or handed on.

    Args:
      source: the run.
      steps: K.
      gradient: float32 [C, K, V], the norms of the word table's gradient; None unless gradients are averaged.
      ended: what the C clients hold at the round's end: `word` tables [C, V, D], and `moments` [C, V] or None.
      held: bool [C, V], see `Aggregate`.
    """
    how, config, start, views = source.setting.how, source.config, source.state, {}
    if gradient is not None:
        views["gradient"] = gradient.sum(axis=1)
    elif how.client != "own":
        words, moments = ended["word"], ended["moments"]
        before: Any = np.asarray(word_table(start.model.client))
        was: Any = moments_of(start.opt.client)
        if how.clients == "in turn":
            before = np.concatenate([before[None], words[:-1]])
        views["move"] = words - before
        if moments is not None and was is not None and config.federated.client_optimizer_state == "average":
            was = np.asarray(was)
            if how.clients == "in turn":
                was = np.concatenate([was[None], moments[:-1]])
            b2 = config.client_optimizer.b2
            views["moments"] = moments - (0.999 if b2 is None else b2) ** steps * was
    return Aggregate(views, held) if views else None


def held_words(source: Source, rows: dict[str, np.ndarray]) -> np.ndarray:
    """Returns which words are in each client's rows [C, ..., T], bool [C, V]."""
    held = np.zeros((len(rows["tokens"]), source.vocab_size), bool)
    for c, tokens in enumerate(original_of(source, rows)):
        held[c, tokens.ravel()] = True
    held[:, list(source.special_ids)] = False
    return held


def _is_text(source: Source, tokens: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Returns where tokens [..., T] are a client's text: not at predicted places [..., M], nor special tokens."""
    text = ~np.isin(tokens, source.special_ids)
    np.put_along_axis(text, places.astype(np.int64), False, axis=-1)
    return text


def messages_of(rows: dict[str, np.ndarray]) -> Messages:
    """Returns what crossed, of rows by name."""
    return Messages(*(rows.get(name) for name in Messages._fields))  # type: ignore[arg-type]


def truth_of(source: Source, rows: dict[str, np.ndarray]) -> Truth:
    """Returns what rows were made from."""
    tokens, labels, real = rows["tokens"].astype(np.int64), rows["labels"].astype(np.int64), rows["weights"] > 0
    return Truth(tokens, _is_text(source, tokens, rows["places"]), labels, real, original_of(source, rows))


def original_of(source: Source, rows: dict[str, np.ndarray]) -> np.ndarray:
    """Returns tokens [..., T] before anything was hidden."""
    original = rows["tokens"].astype(np.int64)
    if not source.config.labelled:  # where labels are tokens
        np.put_along_axis(original, rows["places"].astype(np.int64), rows["labels"].astype(np.int64), axis=-1)
    return original

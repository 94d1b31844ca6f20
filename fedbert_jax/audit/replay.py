"""A round of a finished run once more, by the run's own functions, with what crossed kept."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedbert_jax.audit.views import Aggregate, Messages, Truth
from fedbert_jax.data.masking import MaskedBatch
from fedbert_jax.experiment import Run
from fedbert_jax.federated.metrics import Recorder
from fedbert_jax.federated.rounds import make_strategy
from fedbert_jax.federated.split import StepResult, client_begin
from fedbert_jax.federated.state import Cohort, State


class Replay(NamedTuple):
    """A round's messages."""

    messages: Messages
    truth: Truth
    aggregate: Aggregate | None  # None: nobody averages
    state: State  # with which the round ends


def replay(run: Run, state: State, round: int) -> Replay:
    """Runs a round from a state, and keeps what crosses.

    Args:
      run: with a cut.
      state: with which the round begins; it is left as it is.
      round: from 0; it decides who takes part, which blocks, and the masks.
    """
    s, cohort = run.simulation.setting, run.simulation.feed.draw(round)

    def program(state: State, cohort: Cohort) -> Any:
        return make_strategy(s, _recorder(run)).round(state, cohort)

    with jax.set_mesh(run.simulation.mesh):
        end, metrics = jax.jit(program)(state, cohort)
    seen, ended = jax.device_get((metrics.seen, metrics.ended))
    there, clients = np.asarray(cohort.weights) > 0, np.asarray(cohort.clients)
    side_by_side = s.how.clients in ("together", "pooled")  # [K, C, B, ...]; otherwise [C, K, B, ...]
    if side_by_side:
        seen = jax.tree.map(lambda x: np.swapaxes(x, 0, 1), seen)
    seen = jax.tree.map(lambda x: x[there], seen)  # [C, K, B, ...]
    clients = clients[there]
    aggregate = _aggregate(run, state, seen, jax.tree.map(lambda x: x[there], ended))
    # By step, then client, so that the first rows are of every client.
    rows = {name: np.swapaxes(x, 0, 1).reshape(-1, *x.shape[3:]) for name, x in seen["rows"].items() if x is not None}
    count, steps, size = seen["rows"]["h"].shape[:3]
    owner = np.broadcast_to(clients[None, :, None], (steps, count, size)).reshape(-1)
    return Replay(_messages(rows, owner), _truth(run, rows), aggregate, end)


def log(run: Run, state: State, round: int, blocks: int) -> tuple[Messages, Truth]:
    """Returns message 1 of the last `blocks` blocks that crossed before a round.

    All are embedded by the round's segment, as if it had not changed meanwhile: that is a little easier than what the server
    has logged.
    """
    s, feed = run.simulation.setting, run.simulation.feed
    cut = s.cut()

    def begin(params: Any, cohort: Cohort) -> Any:
        def step(k: jax.Array, rows: Any) -> Any:
            batch, keys = s.draw(rows, cohort.round, k, cohort.clients)
            mine = jax.tree.map(lambda x: x.reshape(len(cohort.clients), -1), keys._replace(server=None))
            up = jax.vmap(lambda b, k: client_begin(cut, params, b, k)[0], (0, 0))(batch, mine)
            return _rows(batch) | {"h": _received(cut, up.h), "positions": up.positions}

        return jax.lax.map(lambda x: step(*x), (jnp.arange(jax.tree.leaves(cohort.rows)[0].shape[0]), cohort.rows))

    program, parts, owners, found = jax.jit(begin), [], [], 0
    with jax.set_mesh(run.simulation.mesh):
        while found < blocks:
            round -= 1
            cohort = feed.draw(round % max(run.config.federated.rounds, 1))
            there = np.asarray(cohort.weights) > 0
            seen = jax.device_get(program(state.model.client, cohort))  # [K, C, B, ...]
            seen = {name: x[:, there] for name, x in seen.items() if x is not None}
            steps, count, size = seen["h"].shape[:3]
            owners.append(
                np.broadcast_to(np.asarray(cohort.clients)[there][None, :, None], (steps, count, size)).reshape(-1)
            )
            parts.append({name: x.reshape(-1, *x.shape[3:]) for name, x in seen.items()})
            found += len(owners[-1])
    rows = {name: np.concatenate([part[name] for part in parts])[:blocks] for name in parts[0]}
    owner = np.concatenate(owners)[:blocks]
    return _messages(rows, owner), _truth(run, rows)


def _rows(batch: MaskedBatch) -> dict[str, jax.Array]:
    return {"tokens": batch.tokens, "labels": batch.labels, "weights": batch.weights, "places": batch.positions}


def _received(cut: Any, payload: Any) -> jax.Array:
    return cut.channels.activations.receive(payload).astype(jnp.float32)


def _recorder(run: Run) -> Recorder:
    s = run.simulation.setting
    cut = s.cut()

    def step(batch: MaskedBatch, out: StepResult) -> Any:
        sent, channels = out.messages, cut.channels
        rows = _rows(batch) | {
            "h": _received(cut, sent["activations"]),
            "positions": sent.get("positions"),
            "z": channels.hidden_states.receive(sent["hidden_states"]).astype(jnp.float32),
            "dz": channels.head_gradient.receive(sent["head_gradient"]).astype(jnp.float32),
        }
        norms = jnp.linalg.norm(_word(out.client_grads), axis=-1) if s.how.averages_gradients else None
        return {"rows": rows, "gradient": norms}

    def end(client: Any, opt: Any) -> Any:
        return {"word": _word(client), "moments": _moments(opt)}

    return Recorder(step, end)


def _word(params: Any) -> jax.Array:
    return params["embeddings"]["word"]["embedding"]


def _moments(opt: Any) -> jax.Array | None:
    """Returns an Adam state's mean squares of the word table's gradient, summed over its columns; None if it has none."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(opt):
        name = jax.tree_util.keystr(path)
        if ".nu" in name and "['word']" in name:
            return jnp.sum(leaf, axis=-1)
    return None


def _aggregate(run: Run, start: State, seen: Any, ended: Any) -> Aggregate | None:
    """Returns what whoever adds up, or stands on both sides of a turn, sees; None if nothing is averaged or handed on."""
    how, f = run.config.federated.arrangement, run.config.federated
    rows, views = seen["rows"], {}
    if how.averages_gradients:
        views["gradient"] = seen["gradient"].sum(axis=1)  # over steps
    elif how.client != "own":
        words, moments = ended["word"], ended["moments"]
        before: Any = np.asarray(_word(start.model.client))
        was: Any = _moments(start.opt.client)
        if how.clients == "in turn":
            before = np.concatenate([before[None], words[:-1]])
        views["move"] = np.linalg.norm(words - before, axis=-1)
        if moments is not None and was is not None and f.client_optimizer_state == "average":
            was = np.asarray(was)
            if how.clients == "in turn":
                was = np.concatenate([was[None], moments[:-1]])
            b2 = run.config.client_optimizer.b2
            views["moments"] = moments - (0.999 if b2 is None else b2) ** rows["tokens"].shape[1] * was
    if not views:
        return None
    held = np.zeros((len(rows["tokens"]), run.dataset.vocab_size), bool)
    for c, (tokens, labels, real) in enumerate(zip(rows["tokens"], rows["labels"], rows["weights"] > 0, strict=True)):
        held[c, tokens[_is_text(run, tokens, rows["places"][c])]] = True
        held[c, labels[real]] = True
    return Aggregate(views, held)


def _is_text(run: Run, tokens: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Returns where tokens [..., T] are a client's text: not at predicted places [..., M], nor special tokens."""
    text = ~np.isin(tokens, run.dataset.special_ids)
    np.put_along_axis(text, places.astype(np.int64), False, axis=-1)
    return text


def _messages(rows: dict[str, np.ndarray], owner: np.ndarray) -> Messages:
    return Messages(rows["h"], owner, rows.get("positions"), rows.get("z"), rows.get("dz"))


def _truth(run: Run, rows: dict[str, np.ndarray]) -> Truth:
    tokens = rows["tokens"].astype(np.int64)
    return Truth(tokens, _is_text(run, tokens, rows["places"]), rows["labels"].astype(np.int64), rows["weights"] > 0)

"""Who holds what: which parts of a model and its optimizer states are one for all, copies for a round, or clients' own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fedbert_jax.config import Arrangement
from fedbert_jax.devices.mesh import constrain_clients
from fedbert_jax.federated.average import replicate
from fedbert_jax.federated.fixed_point import first_ranges
from fedbert_jax.federated.setting import Setting
from fedbert_jax.federated.state import Averaging, Pair, State, pick


class Holding(NamedTuple):
    """How the two sides' parts are held: `one`, `copies` or `own`; optimizer states also `none`, made anew each time."""

    model: Pair
    opt: Pair


def holding(how: Arrangement, mode: str) -> Holding:
    """Returns how an arrangement's parts are held.

    Optimizer states are held like the parameters they train. Those of copies, and of a segment that is handed on from turn
    to turn, follow `federated.client_optimizer_state` instead.
    """
    by_mode = {"average": None, "reset": "none", "keep": "own"}[mode]
    handed_on = how.clients == "in turn" and how.client == "one"
    client = (by_mode or how.client) if how.client == "copies" or handed_on else how.client
    body = (by_mode or how.body) if how.body == "copies" else how.body
    return Holding(Pair(how.client, how.body), Pair(client, body))


def sides(fn: Callable[..., Any], *pairs: Any) -> Pair:
    """Applies a function to the client parts of pairs, and to their server parts."""
    return Pair(*(fn(*parts) for parts in zip(*pairs, strict=True)))


def only(kinds: tuple[str, ...], held: Pair, pair: Pair) -> Pair:
    """Returns the parts that are held in one of these ways; () for the others."""
    return sides(lambda h, x: x if h in kinds else (), held, pair)


def sent_copies(held: Holding, cut: bool) -> Pair:
    """Says which sides' copies clients send to be averaged. With a cut, copies of the body are at the server."""
    return Pair(held.model.client == "copies", held.model.server == "copies" and not cut)


def first_state(s: Setting, held: Holding, model: Pair) -> State:
    """Returns the state before the first round, from a fresh model; parts that are each client's own become [N, ...]."""
    at_rest = lambda h, x: replicate(x, s.num_clients) if h == "own" else () if h == "none" else x  # noqa: E731
    averaging = Averaging(outer=s.outer.init(only(("copies",), held.model, model)) if s.outer else ())
    if s.blinded:
        sent = Pair(True, False) if s.how.averages_gradients else sent_copies(held, s.how.cut)
        averaging = averaging._replace(ranges=sides(lambda sent, x: first_ranges(x) if sent else (), sent, model))
    if s.config.wire.gradient_codec == "int8":
        nothing = jax.tree.map(lambda x: jnp.zeros((s.num_clients, *x.shape), x.dtype), model.client)
        averaging = averaging._replace(unsent=nothing)
    return State(sides(at_rest, held.model, model), sides(at_rest, held.opt, s.init_opt(model)), averaging)


def begun(s: Setting, held: Holding, state: State) -> Pair:
    """Returns the optimizer states that a round or a turn begins with, made anew where none are held."""
    new = lambda h, opt, tx, params: tx.init(params) if h == "none" else opt  # noqa: E731
    return sides(new, held.opt, state.opt, Pair(s.client_tx, s.server_tx), state.model)


def spread(held: Pair, pair: Pair, clients: int) -> Pair:
    """Returns the pair as [C, ...], one for each client of a cohort."""
    return sides(lambda h, x: constrain_clients(x if h == "own" else replicate(x, clients)), held, pair)


def take(held: Pair, pair: Pair, client: jax.Array) -> Pair:
    """Returns the pair that a client would use."""
    return sides(lambda h, x: pick(x, client) if h == "own" else x, held, pair)


def put(held: Pair, pair: Pair, client: jax.Array, ended: Pair) -> Pair:
    """Returns the pair between turns, updated with the pair that a client's turn ended with."""
    set_ = lambda all_, x: all_.at[client].set(x)  # noqa: E731
    own = lambda h, x, new: jax.tree.map(set_, x, new) if h == "own" else () if h == "none" else new  # noqa: E731
    return sides(own, held, pair, ended)


def merge(held: Pair, averaged: Pair, kept: Pair) -> Pair:
    """Returns the averages where copies are held, and the kept parts elsewhere."""
    return sides(lambda h, new, x: new if h == "copies" else x, held, averaged, kept)

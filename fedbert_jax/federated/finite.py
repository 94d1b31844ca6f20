"""Checks that every number of a run is finite, in its state, rounds and scores, and says whose number is not."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fedbert_jax.config import Arrangement
from fedbert_jax.devices.mesh import has_client_axis, path_name

SHOWN = 5  # names listed in a sentence


class NotFiniteError(Exception):
    """Training met a number that is not finite; the message says which, and whose."""


def require(problem: str) -> None:
    """Raises NotFiniteError with a sentence from this module, unless it is ""."""
    if problem:
        raise NotFiniteError(problem)


class NotFinite(NamedTuple):
    """Where numbers are not finite."""

    arrays: tuple[str, ...]  # paths, "model/client/head/bias"
    owners: tuple[int, ...]  # the clients (or seeds) concerned, in arrays with a leading axis [N] (or [S]) of them

    def sentence(self, names: Sequence[str] | None = None, kind: str = "client") -> str:
        """Returns "model/head/bias and 3 more arrays, of client north" or the like; `names` are those of the owners."""
        more = len(self.arrays) - 1
        where = self.arrays[0] + (f" and {more} more array{'s' * (more > 1)}" if more else "")
        return where + (f", of {listed([names[n] for n in self.owners], kind)}" if self.owners and names else "")


def not_finite(state: Any) -> NotFinite | None:
    """Checks every floating-point array of a state on its own devices; returns None if all numbers are finite.

    Makes one reduction per array and fetches all the results together. With several processes, all have to call it.
    """
    named = [(path_name(path), x) for path, x in jax.tree_util.tree_leaves_with_path(state)]
    floats = {name: x for name, x in named if jnp.issubdtype(x.dtype, jnp.floating)}
    if not floats:
        return None
    mesh = next((x.sharding.mesh for x in floats.values() if isinstance(getattr(x, "sharding", None), NamedSharding)), None)
    fine = np.asarray(_whole_arrays(mesh)(list(floats.values())))
    bad = [name for name, ok in zip(floats, fine, strict=True) if not ok]
    if not bad:
        return None
    owners: set[int] = set()
    for name in bad:
        if has_client_axis(name, floats[name].ndim):
            owners.update(np.flatnonzero(~np.asarray(_by_owner(mesh)(floats[name]))).tolist())
    return NotFinite(tuple(bad), tuple(sorted(owners)))


def in_state(state: Any, names: Sequence[str], kind: str = "client") -> str:
    """Says which arrays of a state are not finite, and of which clients (or seeds) if each has its own; "" if none."""
    bad = not_finite(state)
    return f"not all numbers are finite of {bad.sentence(names, kind)}" if bad else ""


def in_round(loss: float, client_norm: float, server_norm: float, first: Sequence[str]) -> str:
    """Says that a round's loss or a gradient norm is not finite, and with whom that began; "" if all are finite."""
    if all(map(math.isfinite, (loss, client_norm, server_norm))):
        return ""
    numbers = f"loss {loss}, gradient norms {client_norm} at the clients, {server_norm} at the server"
    return f"the loss or a gradient is not finite ({numbers})" + (f", first with {listed(first)}" if first else "")


def in_scores(scores: Mapping[str, Any]) -> str:
    """Says which clients' held-out numbers in a line of metrics.jsonl are not finite; "" if all are finite."""
    clients = scores.get("eval_clients") or {}
    bad = [name for name, score in clients.items() if not all(map(math.isfinite, score.values()))]
    means = [value for key, value in scores.items() if isinstance(value, float) and "eval_" in key]
    if not bad and all(map(math.isfinite, means)):
        return ""
    return "the held-out loss is not finite" + (f", of {listed(bad)}" if bad else "")


def first_to_fail(failed: np.ndarray, how: Arrangement) -> list[int]:
    """Returns the places in a cohort of the clients whose numbers first stopped being finite; none if that is not known.

    A number that is not finite stays so and spreads: to the client with the next turn, or, among clients side by side, to
    all of them in the next step, through what they share. So it began with the first of those that failed, in the order of
    turns, or with the clients that failed in the most steps. Where all clients' gradients make one step and all failed in
    as many, it may have begun with what they share.

    Args:
      failed: `RoundMetrics.failed`, int [C].
      how: how the clients train.
    """
    if not failed.any() or (how.clients == "pooled" and failed.min() == failed.max()):
        return []
    if how.clients == "in turn":
        return [int(np.flatnonzero(failed)[0])]
    share = how.clients in ("together", "pooled") or how.averages
    return np.flatnonzero(failed == failed.max() if share else failed > 0).tolist()


def listed(names: Sequence[str], kind: str = "client") -> str:
    """Returns "client a" or "clients a, b, c, d, e and 3 more"."""
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return f"{kind}{'s' * (len(names) > 1)} {', '.join(names[:SHOWN])}{more}"


@functools.cache
def _whole_arrays(mesh: Mesh | None) -> Callable[[list[jax.Array]], jax.Array]:
    return _jitted(lambda arrays: jnp.stack([jnp.all(jnp.isfinite(x)) for x in arrays]), mesh)


@functools.cache
def _by_owner(mesh: Mesh | None) -> Callable[[jax.Array], jax.Array]:
    return _jitted(lambda x: jnp.all(jnp.isfinite(x), axis=tuple(range(1, x.ndim))), mesh)


def _jitted(fn: Callable[..., jax.Array], mesh: Mesh | None) -> Callable[..., jax.Array]:
    """Compiles `fn` so that every process holds the whole result."""
    return jax.jit(fn) if mesh is None else jax.jit(fn, out_shardings=NamedSharding(mesh, P()))

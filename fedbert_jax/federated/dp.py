"""Client-level differential privacy of averages: each client's move is clipped, and the average of the moves gets noise.

That is DP-FedAvg (McMahan, Ramage, Talwar, Zhang 2018, algorithm 1) with a fixed number of clients a round, all of the same
weight. `privacy/accountant.py` says what it amounts to.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from fedbert_jax.models.bert import Params


@jax.named_scope("clip")
def clipped_shares(moves: Params, weights: jax.Array, norm: float, cohort: int) -> jax.Array:
    """Returns what each client's move is multiplied by, so that the products add up to the average of the clipped moves.

    Clipping is a factor of the share, so that no clipped copy of a move is made.

    Args:
      moves: the clients', float32 [C, ...]; the norm of a move is over all these arrays together.
      weights: float32 [C]; of a client with weight 0, nothing is taken, nor of one whose move is not finite.
      norm: to which a move is clipped.
      cohort: how many clients a round has. The average is over them all, whoever is there: a divisor that depended on who
        is there would let one client change the others' parts.

    Returns:
      float32 [C], from 0 to 1 / cohort.
    """
    squares = lambda x: jnp.sum(jnp.square(x), axis=tuple(range(1, x.ndim)))  # noqa: E731
    size = jnp.sqrt(sum(squares(x) for x in jax.tree.leaves(moves)))
    factor = jnp.minimum(1.0, norm / jnp.maximum(size, jnp.finfo(jnp.float32).tiny))
    return jnp.where((weights > 0) & jnp.isfinite(size), factor / cohort, 0.0)


@jax.named_scope("noise")
def add_noise(average: Any, key: jax.Array, deviation: float) -> Any:
    """Adds Gaussian noise of this standard deviation to every number of a pytree, with draws of its own for each array."""
    leaves, tree = jax.tree.flatten(average)
    draw = lambda n, x: jax.random.normal(jax.random.fold_in(key, n), x.shape, x.dtype)  # noqa: E731
    return jax.tree.unflatten(tree, [x + deviation * draw(n, x) for n, x in enumerate(leaves)])

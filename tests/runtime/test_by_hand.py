"""Two rounds of a whole run against a loop written by hand: draws, gradients, clipping, schedules, averages, metrics."""

from __future__ import annotations

import functools

import draws
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tiny import assert_trees_close, make_simulation, mask_spec, tiny_config

from fedbert_jax.data.masking import mask_blocks
from fedbert_jax.federated.joined import joined_loss

SEED, CLIENTS, C, K, B, ROUNDS = 5, 4, 2, 2, 2, 2
SIZES = [7, 8, 9, 10]  # training blocks


def rate(step):
    """Two steps of warm-up to 0.01, then a linear decay to 0 at the end, step 4."""
    return jnp.array([0.005, 0.01, 0.01, 0.005, 0.0])[step]


def adamw(clip: float) -> optax.GradientTransformation:
    decays = lambda tree: jax.tree_util.tree_map_with_path(lambda p, _: p[-1].key not in ("bias", "scale"), tree)  # noqa: E731
    return optax.chain(optax.clip_by_global_norm(clip), optax.adamw(rate, eps=1e-3, weight_decay=0.1, mask=decays))


def move(tx: optax.GradientTransformation, grads, state, params):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


@jax.jit
def mean(weights, trees):
    """The weighted mean of trees; a count of steps is the same in all of them."""
    leaf = lambda *x: x[0] if x[0].dtype == jnp.int32 else sum(w * a for w, a in zip(weights, x, strict=True))  # noqa: E731
    return jax.tree.map(leaf, *trees)


def test_two_rounds_of_parallel_training():
    """Two of four clients take part in a round, with limits on both gradients that they exceed."""
    section = dict(learning_rate=0.01, warmup_steps=2, eps=1e-3, weight_decay=0.1)
    config = tiny_config(
        seed=SEED,
        federated=dict(num_clients=CLIENTS, clients_per_round=C, local_steps=K, batch_size=B, rounds=ROUNDS),
        client_optimizer=section | dict(clip_norm=0.2),
        server_optimizer=section | dict(clip_norm=0.01),
    )
    simulation = make_simulation(config, clients=CLIENTS, blocks=7)
    segments, stored = simulation.setting.segments, np.asarray(simulation.train.tokens)
    gradients = jax.jit(jax.value_and_grad(lambda *args: joined_loss(segments, *args), (0, 1)))
    mask = jax.jit(lambda key, tokens: mask_blocks(key, tokens, mask_spec(config)))
    client_tx, server_tx = adamw(0.2), adamw(0.01)
    step_client, step_server = (jax.jit(functools.partial(move, tx)) for tx in (client_tx, server_tx))

    norm = jax.jit(optax.tree.norm)
    client, server = jax.jit(segments.init)(draws.key("client", SEED, 16), draws.key("server", SEED, 1))
    client_opt, server_opt = client_tx.init(client), server_tx.init(server)
    state = simulation.init_state()
    assert_trees_close(tuple(state.model), (client, server), rtol=0, atol=0)
    for round in range(ROUNDS):
        cohort, losses, norms = draws.cohort(SEED, round, CLIENTS, C), [], []
        weights = np.array([SIZES[c] / sum(SIZES[d] for d in cohort) for c in cohort], np.float32)
        copies, opts = [client] * C, [client_opt] * C
        for k in range(K):
            bodies = []
            for n, c in enumerate(cohort):
                places = draws.blocks(SEED, c, SIZES[c], (round * K + k) * B, B)
                tokens = stored[[sum(SIZES[:c]) + place for place in places]]
                batch = mask(draws.key("client", SEED, draws.MASK, round, k, c), tokens)
                loss, (own, body) = gradients(copies[n], server, batch)
                copies[n], opts[n] = step_client(own, opts[n], copies[n])
                bodies.append(body)
                losses.append(loss)
                norms.append(norm(own))
            body = mean(weights, bodies)
            assert norm(body) > 0.01 and min(norms) > 0.2  # so that the limits take effect
            server, server_opt = step_server(body, server_opt, server)
        client = mean(weights, copies)
        client_opt = mean(weights, opts)
        state, metrics = simulation.run_round(state, round)
        for found, by_hand in ((metrics.loss, losses), (metrics.client_norm, norms)):
            np.testing.assert_allclose(found, np.mean(np.reshape(by_hand, (K, C)) @ weights), rtol=1e-5)
    assert_trees_close(tuple(state.model), (client, server), rtol=1e-5, atol=3e-6)
    simulation.close()

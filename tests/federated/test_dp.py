"""A noised round against NumPy: each client's move, all of its arrays together, is clipped, and the average gets noise."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import assert_trees_close, cohort, make_setting, make_simulation, program, tiny_config

from fedbert_jax.config import Config
from fedbert_jax.federated.average import add_up
from fedbert_jax.federated.dp import add_noise, clipped_shares
from fedbert_jax.federated.metrics import Recorder
from fedbert_jax.federated.rounds import make_strategy
from fedbert_jax.federated.state import Pair, State

TAG = 7  # of the noise's stream
NOISE = 0.3
UNIFORM = dict(weighting="uniform", client_optimizer_state="reset")
PERSONAL = dict(body="private")
FEDAVG = dict(strategy="fedavg")
KINDS = [dict(), PERSONAL, FEDAVG]
by_kind = pytest.mark.parametrize("kind", KINDS, ids=["one body", "own bodies", "bodies averaged"])


def plain(**federated: Any):
    federated = dict(local_steps=1) | UNIFORM | federated
    optimizer = dict(warmup_steps=0, eps=1e-3, learning_rate=0.01)
    return tiny_config(
        federated=federated,
        client_optimizer=optimizer,
        server_optimizer=optimizer,
        aggregator=dict(learning_rate=1.0 if federated.get("strategy") == "fedavg" else 0.5),  # 1.0: the average as it is
        seed=5,
    )


def data_of(config):
    return cohort(config, weights=[1 / 3] * 3)


def averaged(config, model: Pair) -> Pair:
    """What is averaged of a model: the segment and, in FedAvg, the body."""
    return Pair(model.client, model.server if config.federated.strategy == "fedavg" else ())


def arrays(tree: Any) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


def norm(move: list[np.ndarray]) -> float:
    return float(np.sqrt(sum(np.square(x.astype(np.float64)).sum() for x in move)))


class Round(NamedTuple):
    """A first round of three clients that knows nothing of clipping and noise, and the same with both."""

    moves: list[list[np.ndarray]]  # each client's, array by array
    end: State  # of the round without
    config: Config  # of the round with both
    clip: float


@functools.cache
def first_round(strategy: str, body: str) -> Round:
    config = plain(strategy=strategy, body=body)
    setting, state, data = make_setting(config), program(config)[2], data_of(config)
    begun = arrays(averaged(config, state.model))
    if config.federated.arrangement.clients == "together":  # they share a body, so one round has to tell where each ends
        recorder = Recorder(lambda batch, result: (), lambda client, opt: client)
        end, metrics = jax.jit(make_strategy(setting, recorder).round)(state, data)
        each = [[x[c] for x in arrays(metrics.ended)] for c in range(3)]
    else:  # the average over one client is what it ends with, at the outer rate
        round, each = program(config)[3], []
        end = round(state, data)[0]
        for c in range(3):
            after = arrays(averaged(config, round(state, data._replace(weights=jnp.eye(3)[c]))[0].model))
            each.append([x + (y - x) / config.aggregator.learning_rate for x, y in zip(begun, after, strict=True)])
    moves = [[y - x for x, y in zip(begun, one, strict=True)] for one in each]
    clip = (1 - 1e-3) * sorted(map(norm, moves))[1]  # of the three, two are clipped
    privacy = dataclasses.replace(config.privacy, dp="client", dp_clip=clip, dp_noise=NOISE)
    return Round(moves, end, dataclasses.replace(config, privacy=privacy), clip)


def made(kind: dict) -> Round:
    return first_round(kind.get("strategy", "parallel"), kind.get("body", "pooled"))


def expected(found: Round, there=(0, 1, 2), noised: bool = True) -> list[np.ndarray]:
    """What is averaged, after the round, by NumPy: clipped, divided by three, noised, and taken at the outer rate."""
    shrunk = [[x * min(1.0, found.clip / norm(move)) for x in move] for move in (found.moves[c] for c in there)]
    key, ends = draws.key("server", 5, TAG, 0), []
    for n, start in enumerate(arrays(averaged(found.config, program(found.config)[2].model))):
        noise = NOISE * found.clip / 3 * np.asarray(jax.random.normal(jax.random.fold_in(key, n), start.shape))
        ends.append(start + found.config.aggregator.learning_rate * (sum(move[n] for move in shrunk) / 3 + noised * noise))
    return ends


@by_kind
def test_a_round_is_clipped_averaged_and_noised(kind):
    """A body that is averaged shares the segment's norm; one that is pooled, or a client's own, is trained as ever."""
    found = made(kind)
    config = found.config
    _, _, state, round = program(config)
    after, metrics = round(state, data_of(config))
    assert_trees_close(arrays(averaged(config, after.model)), expected(found), rtol=1e-4, atol=2e-6)
    assert sum(norm(move) > found.clip for move in found.moves) == 2 and not metrics.failed.any()
    if config.federated.strategy != "fedavg":
        assert_trees_close(after.model.server, found.end.model.server, rtol=1e-4, atol=1e-6)
        assert_trees_close(after.opt, found.end.opt, rtol=1e-4, atol=1e-6)


def test_noise_has_its_deviation_and_is_new_in_every_round_and_array():
    found = made(FEDAVG)
    _, _, state, round = program(found.config)
    # What text is masked in a round changes the moves, too; weights of 0 leave nothing but noise.
    nobody = data_of(found.config)._replace(weights=jnp.zeros(3))
    ends = [round(state, nobody._replace(round=jnp.int32(n)))[0].model for n in (0, 1)]
    noises = [[(b - a).ravel() for a, b in zip(arrays(state.model), arrays(end), strict=True)] for end in ends]
    both = [np.concatenate(noise) for noise in noises]
    deviation = NOISE * found.clip / 3
    for noise in both:
        assert len(noise) > 3000 and abs(noise.std() / deviation - 1) < 5 / np.sqrt(2 * len(noise))
        assert abs(noise.mean()) < 5 * deviation / np.sqrt(len(noise))
    assert abs(np.corrcoef(*both)[0, 1]) < 5 / np.sqrt(len(both[0]))
    firsts = [tuple(np.round(noise[:3] / deviation, 2)) for noise in noises[0]]
    assert len(set(firsts)) == len(firsts)


def test_add_noise_is_normal_with_the_deviation():
    noise = np.asarray(add_noise({"a": jnp.zeros((400, 500))}, jax.random.key(1), 0.25)["a"]).ravel()
    assert abs(noise.std() / 0.25 - 1) < 0.01 and abs(noise.mean()) < 0.003
    assert abs(np.mean(np.abs(noise) < 0.25) - 0.6827) < 0.005 and abs(np.mean(np.abs(noise) < 0.5) - 0.9545) < 0.003


def test_whoever_is_absent_or_not_finite_adds_nothing_and_the_divisor_stays():
    rng = np.random.default_rng(0)
    moves = {"a": rng.normal(size=(6, 3, 2)).astype(np.float32), "b": rng.normal(size=(6, 5)).astype(np.float32)}
    moves["a"][0] /= 1e3
    moves["b"][0] /= 1e3
    moves["a"][5], moves["b"][5] = 0, 0
    whole = [[moves[k][c] for k in moves] for c in (0, 2, 5)]
    expected = {k: sum(move[n] * min(1.0, 0.5 / max(norm(move), 1e-9)) for move in whole) / 6 for n, k in enumerate(moves)}
    moves["a"][1, 0, 0], moves["b"][3, 2] = np.nan, np.inf
    moves = jax.tree.map(jnp.asarray, moves)
    shares = clipped_shares(moves, jnp.array([1 / 6, 1 / 6, 1 / 6, 1 / 6, 0.0, 1 / 6]), 0.5, 6)
    assert [float(s) for s in shares[jnp.array([1, 3, 4])]] == [0, 0, 0] and float(shares[0]) == pytest.approx(1 / 6)
    assert_trees_close(add_up(None, moves, shares), expected)


def test_an_absent_client_changes_nothing_but_its_own_part():
    """With two of three clients there, the sum is of two and the divisor three; what the third has is nonsense."""
    found = made(FEDAVG)
    _, _, state, round = program(found.config)
    data = data_of(found.config)
    there = data._replace(weights=jnp.array([0.5, 0.5, 0.0]), rows=data.rows.at[:, 2].set(10**6))
    assert_trees_close(arrays(round(state, there)[0].model), expected(found, there=(0, 1)), rtol=1e-4, atol=2e-6)


def test_neither_slices_nor_the_order_of_clients_matter():
    for kind, slices in (({}, (None,)), (FEDAVG, (None, 1))):
        found = made(kind)
        for at_once in slices:
            federated = dataclasses.replace(found.config.federated, clients_at_once=at_once)
            _, _, state, round = program(dataclasses.replace(found.config, federated=federated))
            for order in ([0, 1, 2], [2, 0, 1]):
                data = data_of(found.config)
                data = data._replace(rows=data.rows[:, jnp.array(order)], clients=jnp.array(order))
                after = averaged(found.config, round(state, data)[0].model)
                assert_trees_close(arrays(after), expected(found), rtol=1e-4, atol=2e-6)


def test_a_resumed_run_is_the_same_bit_for_bit():
    """Three rounds of a hundred clients, and the last two of them again from the first one's state, by another program."""
    config = tiny_config(
        federated=dict(
            num_clients=100, clients_per_round=3, weighting="uniform", client_optimizer_state="reset", local_steps=1
        ),
        privacy=dict(dp="client", dp_clip=0.1, dp_noise=0.5),
        aggregator=dict(momentum=0.5),
    )
    ends = []
    saved = None
    for begin in (0, 1):
        simulation = make_simulation(config, clients=100)
        if saved is None:
            state = simulation.init_state()
        else:
            state = jax.device_put(saved, simulation.state_sharding)
        for n in range(begin, 3):
            state, _ = simulation.run_round(state, n)
            if saved is None:
                saved = jax.device_get(state)
        ends.append(jax.device_get(state))
        simulation.close()
    for a, b, start in zip(*map(jax.tree.leaves, (*ends, saved)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert start.ndim == 0 or not np.array_equal(a, start)

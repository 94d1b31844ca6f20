"""Averages in fixed point: exact sums under pads, ranges that follow the last average, and rounds that train as without."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import assert_trees_close, cohort, program, tiny_config

from fedbert_jax.federated.average import add_up
from fedbert_jax.federated.fixed_point import FIRST, HEADROOM, first_ranges, fixed_point, next_ranges

RNG = np.random.default_rng(0)
BLINDED = dict(averaging="blinded")


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def test_sums_are_exact_in_any_order_and_under_pads():
    """The basis of blinded averaging: integers modulo 2**32, and pads that cancel."""
    channel = fixed_point(jnp.array([FIRST]))
    parts = [normal(5, 7) for _ in range(6)]
    sent = [np.asarray(channel.send(x, None)["int32"]) for x in parts]
    assert sent[0].dtype == np.int32
    pads = RNG.integers(-(2**31), 2**31, (5, 5, 7), dtype=np.int32)
    with np.errstate(over="ignore"):
        total = sum(sent[1:], sent[0])
        padded = [x + pad for x, pad in zip(sent, [*pads, -pads.sum(axis=0, dtype=np.int32)], strict=True)]
        assert np.array_equal(sum(padded[::-1], np.int32(0)), total)
    quantum = 2.0 ** (FIRST - 31)
    exact, found = np.sum(np.asarray(parts, np.float64), axis=0), total.astype(np.float64) * quantum
    np.testing.assert_allclose(found, exact, rtol=0, atol=6 * quantum / 2)  # each number is off by half of one at most
    whole = channel.total({"int32": jnp.asarray(total), "finite": jnp.float32(0.0)})
    np.testing.assert_array_equal(whole, found.astype(np.float32))


@pytest.mark.parametrize("weights", [(0.9, 0.1, 0.0), (1 / 3, 1 / 3, 1 / 3)])
def test_a_number_beyond_its_range_is_clipped_and_the_sum_does_not_turn_around(weights):
    channel = fixed_point(jnp.array([-3]))
    x = jnp.array([[5.0, 0.1, -9.0], [4.0, -0.1, -7.0], [2.0, 0.05, -6.0]])
    found = channel.total(add_up(channel, x, jnp.asarray(weights)))
    np.testing.assert_allclose(found, [0.125, np.dot(weights, x[:, 1]), -0.125], rtol=2e-3)
    np.testing.assert_allclose(found[1], np.dot(np.asarray(weights, np.float64), x[:, 1]), atol=3 * 2.0**-35 + 1e-8)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_fixed_point_hides_nothing_that_is_not_finite(bad):
    """A client whose segment ends with a NaN shows, in that tensor only; a client that is left out doesn't."""
    stacked, channel = {"a": normal(3, 4).at[1, 2].set(bad), "b": normal(3, 2)}, fixed_point(jnp.full(2, FIRST))
    total = add_up(channel, stacked, jnp.array([0.5, 0.3, 0.2]))
    found = channel.total(total)
    assert np.isnan(found["a"]).all() and np.isfinite(found["b"]).all()
    assert next_ranges(jnp.full(2, FIRST), total)[0] == FIRST
    without = channel.total(add_up(channel, stacked, jnp.array([0.5, 0.0, 0.5])))
    np.testing.assert_allclose(without["a"], 0.5 * (stacked["a"][0] + stacked["a"][2]), atol=1e-6)


def test_ranges_follow_the_last_average_and_keep_the_digits_of_small_numbers():
    small = {"g": 1e-6 * normal(4, 50, 60), "h": normal(4, 9), "zero": jnp.zeros((4, 3))}
    weights, ranges = jnp.array([0.1, 0.2, 0.3, 0.4]), first_ranges(jax.tree.map(lambda x: x[0], small))
    np.testing.assert_array_equal(ranges, [FIRST] * 3)
    errors = []
    wanted = np.einsum("c,cij->ij", np.asarray(weights, np.float64), np.asarray(small["g"], np.float64))
    for _ in range(2):
        channel = fixed_point(ranges)
        total = add_up(channel, small, weights)
        errors.append(np.abs(np.asarray(channel.total(total)["g"], np.float64) - wanted).max())
        before, ranges = ranges, next_ranges(ranges, total)
    assert before[2] == ranges[2] == FIRST  # nothing is known of a tensor whose average is 0
    for n, name in enumerate(("g", "h")):
        largest = np.abs(np.einsum("c,c...->...", np.asarray(weights), np.asarray(small[name]))).max()
        assert 2.0**HEADROOM * largest <= 2.0 ** float(ranges[n]) <= 2.0 ** (HEADROOM + 1) * largest * 1.001, name
    # In units of 2**-24 numbers of 1e-6 keep four bits; in units of their range's, nearly float32's.
    assert errors[0] > 1e-8 and errors[1] < 4 * 2.0 ** (float(ranges[0]) - 32) + 1e-13 and errors[1] < 1e-12


def trained(rounds: int = 3, weights=(0.5, 0.2, 0.3), spoiled: int | None = None, **changes):
    """The state after some rounds, and all the states on the way."""
    config = tiny_config(**changes)
    setting, _, state, round = program(config)
    states = []
    for n in range(rounds):
        state, metrics = round(state, cohort(config, round=n, seed=n, weights=weights))
        states.append(state)
    return setting, states, metrics


KINDS = [
    dict(average="gradients"),
    dict(client_optimizer_state="reset", local_steps=1),
    dict(body="merged", client_optimizer_state="reset", local_steps=1),
    dict(strategy="fedavg", client_optimizer_state="reset", local_steps=1),
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_blinded_average_is_the_average(kind):
    plain = trained(federated=kind)[1][-1]
    setting, states, _ = trained(federated=kind, privacy=BLINDED)
    assert setting.blinded
    assert_trees_close(states[-1].model, plain.model, rtol=1e-4, atol=2e-6)
    same = jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), states[-1].model.client, plain.model.client)
    assert not all(jax.tree.leaves(same))
    ranges = [np.asarray(s.averaging.ranges.client) for s in states]
    assert (ranges[0] < FIRST).any() and not np.array_equal(ranges[0], ranges[-1])
    crosses = kind.get("strategy") == "fedavg"  # with a cut, copies of the body are at the server
    assert bool(jax.tree.leaves(states[-1].averaging.ranges.server)) == crosses


def test_the_outer_optimizer_gets_the_moves_that_it_would():
    adam = dict(aggregator=dict(name="adam", learning_rate=1e-2, eps=1e-3))
    kind = KINDS[1]
    plain = trained(federated=kind, **adam)[1][-1]
    found = trained(federated=kind, privacy=BLINDED, **adam)[1][-1]
    assert_trees_close(found.model, plain.model, rtol=1e-4, atol=2e-6)
    assert_trees_close(found.averaging.outer, plain.averaging.outer, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[1]], ids=str)
def test_slices_and_absent_clients_change_nothing(kind):
    whole = trained(federated=kind, privacy=BLINDED)[1][-1]
    sliced = trained(federated=kind | dict(clients_at_once=1), privacy=BLINDED)[1][-1]
    assert_trees_close(sliced.model, whole.model, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(sliced.averaging.ranges.client, whole.averaging.ranges.client)
    # The third client is absent, whatever it holds.
    without = trained(federated=kind, privacy=BLINDED, weights=(0.5, 0.5, 0.0))[1][-1]
    plain = trained(federated=kind, weights=(0.5, 0.5, 0.0))[1][-1]
    assert_trees_close(without.model, plain.model, rtol=1e-4, atol=2e-6)

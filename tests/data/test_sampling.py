"""Cohorts, turns and blocks are functions of (seed, round, client), and fair."""

from __future__ import annotations

import numpy as np
import pytest

from fedbert_jax.data.sampling import block_indices, client_weights, draw_cohort, turn_order
from fedbert_jax.data.streams import Seeds


def test_a_cohort_is_drawn_without_replacement_and_anew_each_round():
    cohorts = [draw_cohort(Seeds(3, 3), n, 50, 8) for n in range(400)]
    assert all(len(set(c)) == 8 and np.all(np.diff(c) > 0) for c in cohorts)
    assert len({tuple(c) for c in cohorts}) > 390
    counts = np.bincount(np.concatenate(cohorts), minlength=50)
    assert ((counts - 64) ** 2 / 64).sum() < 95  # chi-squared, 49 degrees of freedom, p about 1e-4
    assert np.array_equal(draw_cohort(Seeds(3, 3), 7, 50, 8), cohorts[7])
    assert not np.array_equal(draw_cohort(Seeds(4, 4), 7, 50, 8), cohorts[7])
    assert np.array_equal(draw_cohort(Seeds(3, 3), 7, 8, 8), np.arange(8))


def test_turns_change_from_round_to_round():
    orders = [tuple(turn_order(Seeds(0, 0), n, 8)) for n in range(50)]
    assert all(sorted(o) == list(range(8)) for o in orders)
    assert len(set(orders)) > 45


def test_weights_sum_to_one():
    sizes = np.array([1, 2, 3, 4])
    np.testing.assert_allclose(client_weights(sizes, np.array([1, 3]), "examples"), [1 / 3, 2 / 3], rtol=1e-6)
    np.testing.assert_allclose(client_weights(sizes, np.array([1, 3]), "uniform"), [0.5, 0.5])


@pytest.mark.parametrize("size", [1, 5, 64])
def test_every_block_comes_once_an_epoch_however_the_stream_is_cut(size):
    whole = block_indices(Seeds(1, 1), 2, size, 0, 4 * size)
    for epoch in range(4):
        assert sorted(whole[epoch * size : (epoch + 1) * size]) == list(range(size))
    pieces = [block_indices(Seeds(1, 1), 2, size, n, 1) for n in range(4 * size)]
    assert np.array_equal(np.concatenate(pieces), whole)


def test_clients_and_epochs_have_orders_of_their_own():
    one, other = (block_indices(Seeds(1, 1), c, 40, 0, 80) for c in (0, 1))
    assert not np.array_equal(one, other)
    assert not np.array_equal(one[:40], one[40:])

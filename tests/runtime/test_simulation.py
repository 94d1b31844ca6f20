"""The simulation: a round's data, how often it compiles, and what does not grow with the number of clients."""

from __future__ import annotations

import logging

import jax
import numpy as np
import pytest
from tiny import VOCAB, assert_trees_close, make_simulation, tiny_config

from fedbert_jax.federated.setting import slices
from fedbert_jax.workdir.checkpoint import Checkpoints


def rounds(simulation, count=3):
    state = simulation.init_state()
    losses = []
    for n in range(count):
        state, metrics = simulation.run_round(state, n)
        losses.append(float(metrics.loss))
    simulation.close()
    return state, losses


@pytest.mark.slow
def test_text_from_memory_and_from_disk_trains_the_same():
    ends = [rounds(make_simulation(tiny_config(data=dict(store=store)))) for store in ("device", "memmap")]
    assert ends[0][1] == ends[1][1]
    for a, b in zip(jax.tree.leaves(ends[0][0]), jax.tree.leaves(ends[1][0]), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("codec", ["float32", "int8"])
def test_averaged_gradients_go_on_bit_for_bit(codec, tmp_path):
    """They go on from a checkpoint in another simulation, which includes what int8 has yet to send."""
    config = tiny_config(
        federated=dict(average="gradients", num_clients=5, clients_per_round=3), wire=dict(gradient_codec=codec)
    )
    first, checkpoints = make_simulation(config, clients=5), Checkpoints(tmp_path, keep=1)
    state = first.init_state()
    for n in range(2):
        state, _ = first.run_round(state, n)
    checkpoints.save(2, state, {})
    state, _ = first.run_round(state, 2)
    checkpoints.close()
    second = make_simulation(config, clients=5)
    again, _ = Checkpoints(tmp_path).restore(2, second.state_shape, second.state_sharding)
    again, _ = second.run_round(again, 2)
    first.close()
    second.close()
    assert jax.tree.structure(again) == jax.tree.structure(state)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True))
    assert bool(jax.tree.leaves(state.averaging)) == (codec == "int8")


def test_a_round_does_not_depend_on_the_rounds_asked_for_before():
    simulation = make_simulation(tiny_config(federated=dict(num_clients=5, clients_per_round=2)), clients=5)
    wanted = jax.device_get(simulation.feed.draw(2))
    rounds(simulation)
    again = jax.device_get(simulation.feed.draw(2))
    assert all(np.array_equal(a, b) for a, b in zip(wanted, again, strict=True))


def test_one_program_a_run_over_changing_cohorts_evaluations_and_a_resume(caplog, tmp_path):
    """Nothing is compiled again, and nothing moves between host and device except by `device_put`."""
    config = tiny_config(federated=dict(num_clients=5, clients_per_round=2, rounds=6))
    simulation = make_simulation(config, clients=5)
    state = simulation.init_state()
    state, _ = simulation.run_round(state, 0)
    simulation.evaluate(state)
    with jax.log_compiles(), caplog.at_level(logging.WARNING), jax.transfer_guard("disallow"):
        for n in range(1, 6):
            state, _ = simulation.run_round(state, n)
            simulation.evaluate(state)
    compiled = [r.message for r in caplog.records if "Compiling" in r.message]
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    checkpoints.save(6, state, {})
    checkpoints.wait()
    state, _ = checkpoints.restore(6, simulation.state_shape, simulation.state_sharding)
    simulation.run_round(state, 6)
    checkpoints.close()
    simulation.close()
    assert compiled == []
    assert simulation.compiled() == 1


def test_a_cohort_in_slices_of_any_size():
    """Five of nine clients, two at a time: three slices, the last one padded."""
    whole, sliced = (
        rounds(
            make_simulation(
                tiny_config(
                    federated=dict(strategy="fedavg", num_clients=9, clients_per_round=5, clients_at_once=at_once),
                ),
                clients=9,
            ),
            2,
        )
        for at_once in (None, 2)
    )
    np.testing.assert_allclose(sliced[1], whole[1], rtol=1e-6)
    assert_trees_close(sliced[0], whole[0], atol=3e-6)


@pytest.mark.parametrize(
    "cohort, at_once, devices, expected",
    [
        (8, None, 1, (1, 8)),
        (5, None, 4, (1, 8)),
        (9, 8, 1, (2, 5)),
        (1000, 300, 1, (4, 250)),
        (8, 4, 8, (1, 8)),
        (20, 3, 4, (5, 4)),
        (7, 1, 1, (7, 1)),
        (2, 8, 1, (1, 2)),
    ],
)
def test_slices_are_few_and_shared_out_by_the_devices(cohort, at_once, devices, expected):
    assert slices(cohort, at_once, devices) == expected
    assert slices(expected[0] * expected[1], at_once, devices) == expected  # once padded, it stays as it is


@pytest.mark.parametrize("strategy", ["parallel", "parallel gradients", "sequential", "centralized", "local", "fedavg"])
def test_every_strategy_learns(strategy):
    """Loss on text with something to learn falls well below where it starts."""
    opt = dict(learning_rate=0.02, warmup_steps=5, clip_norm=None, eps=1e-6)
    strategy, _, average = strategy.partition(" ")
    config = tiny_config(
        federated=dict(strategy=strategy, average=average or "parameters", rounds=25, local_steps=4, batch_size=4),
        client_optimizer=opt,
        server_optimizer=opt,
    )
    simulation = make_simulation(config)
    # The text has two words only: a model that learns anything learns that.
    tokens = np.asarray(simulation.train.tokens)
    tokens[tokens >= 5] = 5 + tokens[tokens >= 5] % 2
    _, losses = rounds(simulation, 25)
    assert losses[0] > 2.0
    assert losses[-1] < 1.0


def test_only_the_cohort_costs():
    """With ten thousand clients, eight per round, the state and the round's arrays are as with ten."""
    sizes = []
    for clients in (10, 10_000):
        config = tiny_config(federated=dict(num_clients=clients, clients_per_round=8), eval=dict(max_clients=4))
        simulation = make_simulation(config, clients=clients, blocks=1)
        data = simulation.feed.draw(0)
        shapes = [x.shape for x in jax.tree.leaves((simulation.state_shape, data))]
        sizes.append(shapes)
        assert len(np.unique(simulation._eval_set.clients)) <= 4
        simulation.close()
    assert sizes[0] == sizes[1]


def test_a_cohort_that_devices_do_not_divide_is_padded_with_weight_0():
    simulation = make_simulation(tiny_config(federated=dict(num_clients=5)), clients=5)
    simulation.feed.padding = 3
    data = simulation.feed.draw(0)
    assert data.rows.shape[1] == 8
    assert list(np.asarray(data.weights[5:])) == [0, 0, 0]
    assert np.isclose(data.weights.sum(), 1)
    assert int(data.rows.max()) < VOCAB
    simulation.close()

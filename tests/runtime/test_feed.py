"""A round's data: which clients take part, in which order, with which blocks and weights, all drawn again by tests/draws.py.

Also the settings of the simulation's optimizers, and the data of its evaluation.
"""

from __future__ import annotations

from typing import Any

import draws
import jax
import numpy as np
import pytest
from tiny import make_simulation, tiny_config

from fedbert_jax.data.streams import Seeds
from fedbert_jax.runtime import feed as feed_lib
from fedbert_jax.runtime import simulation as simulation_lib

SERVER, CLIENT = 5, 9  # the parties' seeds; in a run they are one number
K, B, ROUNDS = 2, 3, 6
SIZES = [4, 5, 6, 7, 8, 9, 10]  # training blocks of the seven clients; a round takes six, so epochs end within rounds


@pytest.fixture(scope="module")
def simulate():
    """A function that returns the simulation of seven clients with given keys; those it made are closed at the end."""
    made: dict[str, Any] = {}

    def make(eval: dict[str, Any] | None = None, optimizers: dict[str, Any] | None = None, **federated: Any) -> Any:
        name = repr((eval, optimizers, federated))
        if name not in made:
            federated = dict(num_clients=7, local_steps=K, batch_size=B, rounds=ROUNDS) | federated
            config = tiny_config(seed=SERVER, federated=federated, eval=eval or {}, **(optimizers or {}))
            with pytest.MonkeyPatch.context() as patch:
                for module in (feed_lib, simulation_lib):
                    patch.setattr(module, "seeds_of", lambda config: Seeds(config.seed, CLIENT))
                made[name] = make_simulation(config, clients=7, blocks=4)
        return made[name]

    yield make
    for simulation in made.values():
        simulation.close()


def wanted(simulation: Any, round: int, clients: list[int]) -> np.ndarray:
    """The blocks [K, C, B, T] of clients in a round."""
    stored, taken = np.asarray(simulation.train.tokens), []
    for c in clients:
        places = draws.blocks(CLIENT, c, SIZES[c], round * K * B, K * B)
        taken.append(stored[[sum(SIZES[:c]) + n for n in places]].reshape(K, B, -1))
    return np.stack(taken, 1)


def shares(clients: list[int]) -> list[float]:
    return [SIZES[c] / sum(SIZES[d] for d in clients) for c in clients]


@pytest.mark.parametrize("average", ["parameters", "gradients"])
def test_cohorts_blocks_and_weights_round_by_round(simulate, average):
    """Three of seven clients take part, weighted by their text."""
    simulation, cohorts = simulate(clients_per_round=3, average=average), []
    for round in range(ROUNDS):
        data, cohort = jax.device_get(simulation.feed.draw(round)), draws.cohort(SERVER, round, 7, 3)
        assert data.clients.tolist() == cohort and data.round == round
        np.testing.assert_array_equal(data.rows, wanted(simulation, round, cohort))
        np.testing.assert_allclose(data.weights, shares(cohort), rtol=1e-6)
        cohorts.append(tuple(cohort))
    assert len(set(cohorts)) > 3


@pytest.mark.parametrize("store", ["device", "memmap"])
def test_padding_a_cohort_leaves_its_weights_alone(simulate, monkeypatch, store):
    simulation = simulate(clients_per_round=3)
    monkeypatch.setattr(simulation.feed, "padding", 2)
    monkeypatch.setattr(simulation.feed, "_on_device", store == "device")
    data, cohort = jax.device_get(simulation.feed.draw(1)), draws.cohort(SERVER, 1, 7, 3)
    np.testing.assert_allclose(data.weights, shares(cohort) + [0, 0], rtol=1e-6)
    np.testing.assert_array_equal(data.rows[:, :3], wanted(simulation, 1, cohort))


def test_clients_may_count_the_same(simulate):
    simulation = simulate(clients_per_round=3, weighting="uniform")
    np.testing.assert_allclose(simulation.feed.draw(1).weights, [1 / 3] * 3, rtol=1e-6)


@pytest.mark.parametrize("order", ["shuffled", "fixed"])
def test_turns_are_taken_in_the_order_drawn(simulate, order):
    """Blocks and weights follow the clients."""
    simulation, orders = simulate(strategy="sequential", clients_per_round=4, order=order), []
    for round in range(ROUNDS):
        data, cohort = jax.device_get(simulation.feed.draw(round)), draws.cohort(SERVER, round, 7, 4)
        turns = draws.turns(SERVER, round, cohort) if order == "shuffled" else cohort
        assert data.clients.tolist() == turns
        np.testing.assert_array_equal(data.rows, wanted(simulation, round, turns))
        np.testing.assert_allclose(data.weights, shares(turns), rtol=1e-6)
        orders.append(turns == cohort)
    assert all(orders) if order == "fixed" else sum(orders) < 3


@pytest.mark.parametrize(
    "federated, cohort",
    [(dict(strategy="centralized", clients_per_round=2), 2), (dict(average="gradients", batch_by="size"), 7)],
)
def test_pooled_text_is_one_stream(simulate, federated, cohort):
    """So are all clients' blocks if rows are in proportion to a client's text: as many in all as if each gave B."""
    simulation, rows = simulate(**federated), cohort * B
    stored = np.asarray(simulation.train.tokens)
    for round in range(ROUNDS):
        data = jax.device_get(simulation.feed.draw(round))
        places = draws.blocks(CLIENT, 0, sum(SIZES), round * K * rows, K * rows)
        np.testing.assert_array_equal(data.rows, stored[places].reshape(K, 1, rows, -1))
        assert (data.weights, data.clients) == ([1], [0])


def test_a_round_gets_its_own_data_however_rounds_are_asked_for(simulate, monkeypatch):
    """The next round's data is fetched ahead; asking for another round returns that round's data."""
    simulation, fed = simulate(clients_per_round=3), []
    monkeypatch.setattr(simulation, "_round", lambda state, data: fed.append(jax.device_get(data)) or (state, None))
    asked = [0, 1, 2, 5, 1, 1, 3]
    for round in asked:
        simulation.run_round((), round)
    assert [int(data.round) for data in fed] == asked
    for round, data in zip(asked, fed, strict=True):
        np.testing.assert_array_equal(data.rows, wanted(simulation, round, draws.cohort(SERVER, round, 7, 3)))


# --- what each segment's optimizer does ------------------------------------------------------------------------------


@pytest.mark.parametrize("side, clip, rate", [("client", 0.5, 0.25), ("server", 2.0, 0.125)])
def test_each_segment_has_its_own_optimizer_and_limit(simulate, side, clip, rate):
    """A step of plain SGD is as long as the rate times the limit, and half as long for a gradient of half the limit."""
    sgd = dict(name="sgd", warmup_steps=0, schedule="constant", eps=None)
    sections = {
        "client_optimizer": sgd | dict(clip_norm=0.5, learning_rate=0.25),
        "server_optimizer": sgd | dict(clip_norm=2.0, learning_rate=0.125),
    }
    tx = getattr(simulate(optimizers=sections).setting, f"{side}_tx")
    params = {"a": np.zeros(4, np.float32), "b": {"bias": np.zeros((2, 2), np.float32)}}
    for size, expected in ((100.0, rate * clip), (clip / 2, rate * clip / 2)):
        grads = jax.tree.map(lambda x, size=size: np.full(x.shape, size / 8**0.5, np.float32), params)
        moved, _, norm = tx.update(grads, tx.init(params), params, np.int32(0))
        length = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(moved)))
        np.testing.assert_allclose((length, norm), (expected, size), rtol=1e-5)


# --- evaluation ------------------------------------------------------------------------------------------------------


def test_the_evaluated_clients_and_their_blocks_are_drawn(simulate):
    simulation = simulate(eval=dict(max_clients=3, max_blocks=2))
    data = jax.device_get(simulation._eval_set)
    chosen = sorted(draws.generator("server", SERVER, draws.EVALUATED).choice(7, 3, replace=False).tolist())
    assert data.clients.tolist() == chosen == simulation._owners.tolist()
    for n, c in enumerate(chosen):
        blocks = sorted(draws.generator("client", CLIENT, draws.SCORED_BLOCKS, c).choice(3, 2, replace=False).tolist())
        assert data.blocks[n][data.real[n] > 0].tolist() == blocks


def test_a_clients_score_weighs_by_its_training_text(simulate, monkeypatch):
    """Three of the clients with 4, 5, 6, ... training blocks are evaluated, all with equally many held-out blocks."""
    simulation = simulate(eval=dict(max_clients=3, max_blocks=2))
    sums = np.array([[6.0, 1, 4], [4.0, 3, 4], [9.0, 2, 3]], np.float32)  # summed loss, right answers, count
    for name in ("_evaluate", "_evaluate_frequencies"):
        monkeypatch.setattr(simulation, name, lambda *_: sums)
    share = np.array(shares(simulation._owners.tolist()))
    for found in (simulation.evaluate(None), simulation.evaluate_frequencies(np.ones(61, int), (0,))):
        np.testing.assert_allclose(found.by_text, ((1.5, 1, 3) @ share, (0.25, 0.75, 2 / 3) @ share))
        np.testing.assert_allclose(found.over_clients, (5.5 / 3, (0.25 + 0.75 + 2 / 3) / 3))

"""The data of a round of fine-tuning: the order of turns, each client's examples, and the weight of its numbers."""

from __future__ import annotations

from typing import Any

import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

from fedbert_jax.data.streams import Seeds, secrets
from fedbert_jax.errors import ConfigError
from fedbert_jax.federated.setting import slices
from fedbert_jax.glue import simulation, tasks
from fedbert_jax.glue.examples import TaskData
from fedbert_jax.glue.sequences import ExampleStream, Sequences
from fedbert_jax.glue.simulation import Finetuning

SEED, CLIENT, K, B, CLIENTS = 5, 99, 2, 3, 4  # the parties' seeds; in a run they are one number, as a rule
EXAMPLES = 120


@pytest.fixture(scope="module")
def tune():
    """A function that returns the fine-tuning of four clients; an example's first token is its number."""
    rng = np.random.default_rng(0)
    tokens = np.concatenate([np.arange(EXAMPLES)[:, None] % 61, rng.integers(5, 61, (EXAMPLES, 8))], 1).astype(np.int32)
    train = Sequences(tokens, np.zeros_like(tokens), np.full(EXAMPLES, 9, np.int32), np.arange(EXAMPLES, dtype=np.int32) % 2)
    data = TaskData(tasks.find_task("SST-2"), train, {}, {}, {})
    made: dict[str, Any] = {}

    def make(strategy: str = "sequential", weighting: str = "examples", **federated: Any) -> Finetuning:
        name = repr((strategy, weighting, federated))
        if name not in made:
            config = tiny_config(
                seed=SEED,
                task="finetune",
                finetune=dict(epochs=2.0),
                data=dict(source="glue:SST-2", tokenizer="one", partition=dict(kind="dirichlet", alpha=1.0)),
                federated=dict(
                    strategy=strategy, num_clients=CLIENTS, local_steps=K, batch_size=B, weighting=weighting, **federated
                ),
            )
            made[name] = Finetuning(config, data, None, (SEED, SEED + 1))
        return made[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulation, "seeds_of", lambda config: Seeds(config.seed, CLIENT))
        yield make


def rounds(tuning: Finetuning) -> range:
    return range(tuning.rounds)


def test_slices_that_do_not_divide_the_clients_are_refused(tune, monkeypatch):
    """More devices may need larger slices than the config asks for, as four devices do with two clients at once."""
    monkeypatch.setattr(simulation, "slices", lambda cohort, at_once, devices: slices(cohort + 2, at_once, 4))
    with pytest.raises(ConfigError, match=r"clients_at_once=2: accepted with task='finetune' on .* divides 4 clients"):
        tune("parallel", clients_at_once=2)


@pytest.mark.parametrize("order", ["shuffled", "fixed"])
def test_turns_are_taken_in_the_order_drawn(tune, order):
    tuning = tune(order=order)
    orders = [tuning.order(n).tolist() for n in rounds(tuning)]
    expected = [draws.turns(SEED, n, [0, 1, 2, 3]) if order == "shuffled" else [0, 1, 2, 3] for n in rounds(tuning)]
    assert orders == expected and len(orders) > 4
    assert tune("parallel").order(1).tolist() == [0, 1, 2, 3]


def test_a_clients_examples_are_its_own_stream_for_every_seed(tune):
    """This holds whoever's turn it is. Seeds side by side have orders of their own, but the same clients."""
    tuning = tune(order="shuffled")
    labels, lengths = tuning.data.train.labels, tuning.data.train.lengths
    assert sorted(np.concatenate(tuning.clients)) == list(range(EXAMPLES))
    for party, seed in (("server", SEED), ("client", CLIENT)):
        found = jax.random.key_data(getattr(tuning._secrets(), party))
        wanted = [getattr(secrets(Seeds(seed + s, seed + s)), party) for s in range(2)]
        np.testing.assert_array_equal(found, [jax.random.key_data(key) for key in wanted])
    for round in rounds(tuning):
        batches = tuning.batches(round)
        for s in range(2):
            seeds = Seeds(SEED + s, CLIENT + s)
            for n, c in enumerate(draws.turns(SEED, round, [0, 1, 2, 3])):
                own = tuning.clients[c]
                index = own[ExampleStream(seeds, c, lengths[own], K, B).round(round)][: batches.labels.shape[1]]
                np.testing.assert_array_equal(batches.labels[s, :, n, :, 0], labels[index])
                np.testing.assert_array_equal(batches.tokens[s, :, n, :, :9], tuning.data.train.tokens[index])
        assert not np.array_equal(batches.tokens[0], batches.tokens[1])


@pytest.mark.parametrize(
    "strategy, weighting", [("sequential", "examples"), ("parallel", "examples"), ("parallel", "uniform")]
)
def test_a_clients_weight_goes_with_it(tune, monkeypatch, strategy, weighting):
    tuning, given = tune(strategy, weighting), []
    real = simulation.make_strategy
    spied = lambda s: real(s)._replace(round=lambda state, cohort: given.append(cohort) or (state, None))  # noqa: E731
    monkeypatch.setattr(simulation, "make_strategy", spied)
    sizes = np.array([len(own) for own in tuning.clients])
    assert len(set(sizes)) > 2
    for round in range(3):
        order = tuning.order(round)
        secrets = jax.tree.map(lambda x: x[0], tuning._secrets())
        tuning._one_round((), (), jnp.asarray(order), jnp.int32(round), secrets)
        share = sizes[order] / EXAMPLES if weighting == "examples" else np.full(CLIENTS, 1 / CLIENTS)
        np.testing.assert_allclose(given[-1].weights, share, rtol=1e-6)
        assert given[-1].clients.tolist() == order.tolist() and given[-1].round == round

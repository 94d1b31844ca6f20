"""Draws before training: who holds which document, what is held out, and in which order a task's examples come."""

from __future__ import annotations

import draws
import numpy as np
import pytest
from tiny import tiny_config

from fedbert_jax.config import PartitionConfig
from fedbert_jax.data import dataset, partition
from fedbert_jax.data.partition import assign, hold_out
from fedbert_jax.data.streams import Seeds, Stream
from fedbert_jax.glue import examples as examples_lib
from fedbert_jax.glue.sequences import ExampleStream, Sequences

GROUPS = [name for name in "abcd" for _ in range(15)]


def owners(kind: str, server: int, client: int) -> list[list[int]]:
    how = PartitionConfig(kind=kind)  # type: ignore[arg-type]
    return [mine.tolist() for mine in assign(GROUPS, np.ones(60, int), how, 5, Seeds(server, client))[1]]


@pytest.mark.parametrize("kind", ["iid", "dirichlet"])
def test_dealing_follows_from_the_servers_seed(kind):
    """Before documents are dealt, no client holds anything, so the server draws."""
    assert owners(kind, 3, 8) == owners(kind, 3, 9)
    assert len({str(owners(kind, seed, 3)) for seed in range(6)}) == 6


def test_dealing_is_the_draw_it_was():
    place = draws.generator("server", 3, draws.DEAL).permutation(60)  # the n-th document drawn goes to client n mod 5
    assert owners("iid", 3, 0) == [sorted(place[client::5].tolist()) for client in range(5)]


def held(server: int, client: int, number: int) -> list[int]:
    return np.flatnonzero(hold_out(np.ones(40, int), 0.2, Seeds(server, client), number)).tolist()


def test_what_is_held_out_follows_from_the_clients_seed_and_the_client():
    assert held(8, 3, 1) == held(9, 3, 1)
    assert len({tuple(held(3, seed, number)) for seed in range(4) for number in range(4)}) == 16
    assert held(0, 3, 1) == sorted(draws.generator("client", 3, 20, 1).permutation(40)[:8].tolist())


def examples(seed: int, client: int, rounds: int = 12, count: int = 64) -> np.ndarray:
    """Returns the first rounds, [rounds, 2, 5], of a client's `count` examples, all of one length."""
    stream = ExampleStream(Seeds(seed + 100, seed), client, np.full(count, 7), steps=2, batch=5)
    return np.stack([stream.round(n) for n in range(rounds)])


def test_a_tasks_examples_come_in_an_order_of_the_seed_the_client_and_the_epoch():
    orders = {examples(seed, client).tobytes() for seed in range(3) for client in range(3)}
    assert len(orders) == 9
    first, second = examples(0, 0, count=60).reshape(2, 60)
    assert sorted(first) == sorted(second) == list(range(60)) and first.tolist() != second.tolist()
    same = ExampleStream(Seeds(7, 1), 2, np.full(64, 7), steps=2, batch=5)
    np.testing.assert_array_equal(same.round(9), examples(1, 2)[9])  # whatever the server's seed and the earlier rounds are


def test_what_a_task_holds_out_follows_from_the_seed(monkeypatch):
    whole = Sequences(np.arange(40)[:, None], np.zeros((40, 1), np.int32), np.ones(40, np.int32), np.arange(40))
    monkeypatch.setattr(examples_lib.files, "load", lambda *_: {"train": examples_lib.tasks.Examples([], None, None, [])})
    monkeypatch.setattr(examples_lib, "encode", lambda *_: whole)
    found = []
    for seed in range(4):
        sections = dict(data=dict(source="glue:SST-2", tokenizer="one"), federated=dict(strategy="centralized"))
        config = tiny_config(seed=seed, task="finetune", finetune=dict(holdout=0.25), **sections)
        data = examples_lib.read_task(config, None)
        assert sorted([*data.train.labels, *data.dev["holdout"].labels]) == list(range(40))
        assert data.dev["holdout"].labels.tolist() == draws.generator("client", seed, 24).permutation(40)[:10].tolist()
        found.append(tuple(sorted(data.dev["holdout"].labels)))
    assert len(set(found)) == 4


def test_preparation_draws_by_the_runs_seed_and_the_clients_number(tmp_path, monkeypatch):
    drawn, real = [], partition.generator
    monkeypatch.setattr(partition, "generator", lambda *name: drawn.append(name) or real(*name))
    rng = np.random.default_rng(0)
    documents = [" ".join(rng.choice(list("abcdefgh"), 40)) for _ in range(36)]
    (tmp_path / "all.txt").write_text("\n\n".join(documents))
    source = dict(source=f"text:{tmp_path}/all.txt", tokenizer="train:100", eval_fraction=0.2, partition=dict(kind="iid"))
    config = tiny_config(seed=7, data=source, federated=dict(num_clients=3))
    dataset.prepare(config, tmp_path / "data")
    seeds = Seeds(7, 7)
    assert drawn == [(seeds, Stream.DEAL), *[(seeds, Stream.HOLD_OUT, client) for client in range(3)]]

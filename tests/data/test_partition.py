"""Every document goes to one client, skew is what alpha says, and nothing held out is trained on."""

from __future__ import annotations

import collections
import time

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon

from fedbert_jax.config import PartitionConfig
from fedbert_jax.data.partition import assign, hold_out, js_divergence
from fedbert_jax.data.streams import Seeds
from fedbert_jax.errors import UserError

GROUPS = ["b", "a", "c", "a", "b", "b", "d"] * 30
WORDS = np.random.default_rng(0).integers(1, 50, len(GROUPS))


def deal(kind: str, num_clients: int | None, seed: int = 0, alpha: float = 0.5, groups: list[str] | None = None):  # type: ignore[no-untyped-def]
    groups = GROUPS if groups is None else groups
    words, partition = np.resize(WORDS, len(groups)), PartitionConfig(kind=kind, alpha=alpha)  # type: ignore[arg-type]
    return assign(groups, words, partition, num_clients, Seeds(seed, seed))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind,clients", [("natural", None), ("iid", 9), ("dirichlet", 9)])
def test_every_document_goes_to_one_client(kind: str, clients: int | None) -> None:
    names, owned = deal(kind, clients)
    assert len(names) == len(owned) == (clients or 4) == len(set(names))
    assert sorted(np.concatenate(owned)) == list(range(len(GROUPS)))
    assert all((np.diff(mine) > 0).all() for mine in owned)


def test_natural_clients_are_the_groups_by_name() -> None:
    names, owned = deal("natural", None)
    assert names == ("a", "b", "c", "d")
    for name, mine in zip(names, owned, strict=True):
        assert {GROUPS[i] for i in mine} == {name}


def test_fewer_natural_clients_are_the_largest() -> None:
    groups, words = ["d", "a", "b", "c", "c"], np.array([5, 7, 5, 3, 3])
    names, owned = assign(groups, words, PartitionConfig(), 3, Seeds(0, 0))
    assert names == ("a", "b", "c")  # b and d are as large: the name decides
    assert [mine.tolist() for mine in owned] == [[1], [2], [3, 4]]


@pytest.mark.parametrize("kind,clients,known", [("natural", 5, "4"), ("iid", 211, "210"), ("dirichlet", 211, "210")])
def test_more_clients_than_there_can_be_are_refused(kind: str, clients: int, known: str) -> None:
    with pytest.raises(UserError, match=rf"federated\.num_clients={clients}: accepted: 1 to {known}\b"):
        deal(kind, clients)


def test_iid_clients_have_equally_many_documents() -> None:
    sizes = [len(mine) for mine in deal("iid", 9)[1]]
    assert max(sizes) - min(sizes) <= 1
    groups = [name for name in "abcd" for _ in range(900)]
    _, owned = assign(groups, np.ones(3600, int), PartitionConfig(kind="iid"), 9, Seeds(0, 0))
    mixed = [collections.Counter(groups[i] for i in mine)[name] for mine in owned for name in "abcd"]
    assert min(mixed) > 60 and max(mixed) < 140  # 100 each, with a standard deviation of 8


@pytest.mark.parametrize("kind", ["iid", "dirichlet"])
def test_the_seed_decides(kind: str) -> None:
    same, other = deal(kind, 9, seed=3)[1], deal(kind, 9, seed=4)[1]
    assert all(np.array_equal(a, b) for a, b in zip(deal(kind, 9, seed=3)[1], same, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(other, same, strict=True))


def test_skew_grows_as_alpha_falls() -> None:
    groups = [f"g{i % 10}" for i in range(20_000)]
    labels = np.array([int(g[1:]) for g in groups])
    skews = []
    for alpha in (1000.0, 10.0, 1.0, 0.1, 0.01):
        _, owned = deal("dirichlet", 20, alpha=alpha, groups=groups)
        counts = [np.bincount(labels[mine], minlength=10) for mine in owned if len(mine)]
        skews.append(js_divergence(counts, np.bincount(labels)).mean())
    assert skews == sorted(skews)
    assert skews[0] < 0.01 and skews[-1] > 0.5


@pytest.mark.parametrize("kind", ["natural", "iid", "dirichlet"])
def test_ten_thousand_clients_are_quick(kind: str) -> None:
    groups = [f"g{i % 10_000:05d}" if kind == "natural" else f"g{i % 8}" for i in range(50_000)]
    start = time.process_time()
    names, owned = deal(kind, 10_000, groups=groups, alpha=0.05)
    for client, mine in enumerate(owned):
        hold_out(np.ones(len(mine), int), 0.05, Seeds(0, 0), client)
    assert time.process_time() - start < 5  # about half a second; a loop over clients and documents takes minutes
    assert len(names) == 10_000 and sum(map(len, owned)) == 50_000


# --- held-out documents ---


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.3, 0.9])
def test_enough_is_held_out_and_no_more_than_needed(fraction: float) -> None:
    held = hold_out(WORDS, fraction, seeds=Seeds(1, 1), client=2)
    assert held.shape == WORDS.shape and held.dtype == bool
    assert fraction * WORDS.sum() <= WORDS[held].sum() < fraction * WORDS.sum() + WORDS.max()


def test_something_always_stays_for_training() -> None:
    assert not hold_out(np.array([9]), 0.5, Seeds(0, 0), 0).any()
    assert hold_out(np.zeros(0, int), 0.5, Seeds(0, 0), 0).shape == (0,)
    for seed in range(20):
        assert hold_out(np.array([1, 1000]), 0.99, Seeds(seed, seed), 0).sum() == 1
        assert hold_out(np.array([1, 1, 1]), 0.999, Seeds(seed, seed), 0).sum() == 2


def test_clients_and_seeds_draw_their_own() -> None:
    draws = {hold_out(np.ones(40, int), 0.2, Seeds(s, s), client).tobytes() for s in range(3) for client in range(3)}
    assert len(draws) == 9
    assert np.array_equal(hold_out(WORDS, 0.2, Seeds(5, 5), 6), hold_out(WORDS, 0.2, Seeds(5, 5), 6))


# --- divergence ---


def test_divergence_is_scipys() -> None:
    rng = np.random.default_rng(0)
    counts = rng.poisson(rng.gamma(0.3, 4, (6, 300)))
    counts[1] = np.arange(300) < 10  # a client with few of the tokens
    pooled = counts.sum(0)
    expected = [jensenshannon(row, pooled, base=2) ** 2 for row in counts]
    np.testing.assert_allclose(js_divergence(iter(counts), pooled), expected, rtol=1e-9)


def test_divergence_at_its_ends() -> None:
    same, apart = np.array([3, 3, 0, 0]), np.array([0, 0, 5, 1])
    assert js_divergence([same * 7], same) == pytest.approx(0)
    assert js_divergence([apart], same) == pytest.approx(1)
    assert js_divergence([np.zeros(4, int)], same) == 0


def test_divergence_of_ten_thousand_clients_is_quick() -> None:
    rng = np.random.default_rng(0)
    size = 30_522
    pooled = rng.integers(1, 100, size)
    start = time.process_time()
    each = (np.bincount(rng.integers(0, size, 200), minlength=size) for _ in range(10_000))
    assert len(js_divergence(each, pooled)) == 10_000
    assert time.process_time() - start < 8

"""The weighted average: its numbers, both ways of computing it, and that a client of weight 0 changes nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

from fedbert_jax.config import AggregatorConfig, WireConfig
from fedbert_jax.federated.average import outer_update, weighted_average
from fedbert_jax.federated.optim import make_aggregator
from fedbert_jax.federated.split import split_step
from fedbert_jax.federated.wire import make_cut
from fedbert_jax.models.bert import make_segments

WEIGHTS = np.array([0.5, 0.0, 0.3, 0.2], np.float32)


@pytest.fixture(params=["one pass", "contraction"])
def way(request, monkeypatch):
    """A CPU with one device uses one pass; with several devices, or on other machines, a contraction is used."""
    assert jax.default_backend() == "cpu" and len(jax.devices()) == 1
    if request.param == "contraction":
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


def clients() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "matrix": rng.standard_normal((4, 3, 5), np.float32),
        "scalar": rng.standard_normal(4, np.float32),
        "count": np.full(4, 7, np.int32),
    }


def expected(stacked: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    mean = lambda x: 0.5 * x[0] + 0.3 * x[2] + 0.2 * x[3]  # noqa: E731
    return {"matrix": mean(stacked["matrix"]), "scalar": mean(stacked["scalar"]), "count": np.int32(7)}


@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf, -np.inf])
@pytest.mark.usefixtures("way")
def test_a_client_of_weight_0_changes_nothing(bad):
    stacked = clients()
    stacked["matrix"][1], stacked["scalar"][1] = bad, bad
    found = weighted_average(stacked, jnp.asarray(WEIGHTS))
    for name, value in expected(stacked).items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-7, err_msg=name)
    assert found["count"].dtype == jnp.int32


@pytest.mark.usefixtures("way")
def test_a_client_that_counts_is_not_left_out_for_its_numbers():
    """A number that is not finite shows: no client is dropped silently."""
    stacked = clients()
    stacked["scalar"][2] = np.nan
    found = weighted_average(stacked, jnp.asarray(WEIGHTS))
    assert np.isnan(found["scalar"]) and np.isfinite(found["matrix"]).all()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_an_outer_update_leaves_a_client_of_weight_0_out(name):
    stacked = {"a": clients()["matrix"]}
    start = {"a": np.full((3, 5), 0.5, np.float32)}
    tx = make_aggregator(AggregatorConfig(name=name, learning_rate=0.1))
    ends = []
    for bad in (0.0, np.nan):
        stacked["a"][1] = bad
        moves = {"a": stacked["a"] - start["a"][None]}
        average = weighted_average(moves, jnp.asarray(WEIGHTS))
        ends.append(np.asarray(outer_update(tx, start, average, tx.init(start))[0]["a"]))
    np.testing.assert_array_equal(*ends)
    if name == "sgd":
        np.testing.assert_allclose(ends[0], 0.5 + 0.1 * (expected(clients())["matrix"] - 0.5), rtol=1e-5)


def test_across_the_cut_a_client_of_weight_0_changes_nothing(batch):
    """Its segment is NaN everywhere; the body's gradient and the other clients' gradients are as without it."""
    rng, segments = np.random.default_rng(0), make_segments(tiny_config().model)
    one, body = jax.jit(segments.init)(*jax.random.split(jax.random.key(0)))
    three = jax.tree.map(lambda x: np.asarray(x)[None] + 0.1 * rng.standard_normal((3, *x.shape)).astype(np.float32), one)
    cut = make_cut(segments, WireConfig())
    step = jax.jit(lambda client, weights: split_step(cut, client, body, batch, weights))
    weights = jnp.array([0.6, 0.0, 0.4])
    broken = jax.tree.map(lambda x: jnp.asarray(x).at[1].set(jnp.nan), three)
    sound, left_out = step(three, weights), step(broken, weights)
    for a, b in zip(jax.tree.leaves(sound.server_grads), jax.tree.leaves(left_out.server_grads), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(jax.tree.leaves(sound.client_grads), jax.tree.leaves(left_out.client_grads), strict=True):
        np.testing.assert_array_equal(a[jnp.array([0, 2])], b[jnp.array([0, 2])])
    assert np.isnan(left_out.loss[1]) and np.isfinite(left_out.loss[jnp.array([0, 2])]).all()

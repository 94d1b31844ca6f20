"""Numbers that are not finite are found and named: the array, the client, the client with whom it began."""

from __future__ import annotations

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import make_strategy, random_blocks, tiny_config

from fedbert_jax.config import ARRANGEMENTS, CODECS, Arrangement
from fedbert_jax.devices.mesh import has_client_axis
from fedbert_jax.federated import finite, rounds
from fedbert_jax.federated.finite import first_to_fail, in_round, in_scores, in_state, not_finite
from fedbert_jax.federated.metrics import blame
from fedbert_jax.federated.state import Cohort, Pair, State
from fedbert_jax.federated.wire import Channel

NAN, INF = float("nan"), float("inf")
NAMES = ("north", "south", "west")


def small_state(clients: int | None = None) -> dict:
    """A state with a counter; with `clients`, each of that many clients has arrays of its own."""
    lead = () if clients is None else (clients,)
    params = {"head": {"bias": jnp.zeros((*lead, 7)), "dense": {"kernel": jnp.ones((*lead, 3, 3))}}}
    return {"model": {"client": params}, "opt": {"count": jnp.full(lead, 2, jnp.int32), "mu": params}}


def put(tree: dict, path: str, index: tuple[int, ...], value: float) -> dict:
    def leaf(at, x):
        return x.at[index].set(value) if "/".join(p.key for p in at) == path else x

    return jax.tree_util.tree_map_with_path(leaf, tree)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_the_array_that_is_not_finite_is_named(value):
    assert not_finite(small_state()) is None and in_state(small_state(), NAMES) == ""
    bad = put(small_state(), "opt/mu/head/dense/kernel", (2, 1), value)
    assert not_finite(bad) == (("opt/mu/head/dense/kernel",), ())
    assert in_state(bad, NAMES) == "not all numbers are finite of opt/mu/head/dense/kernel"


def test_of_clients_arrays_the_client_is_named_too():
    bad = put(small_state(3), "model/client/head/bias", (1, 6), NAN)
    bad = put(bad, "opt/mu/head/bias", (2, 0), INF)
    assert not_finite(bad) == (("model/client/head/bias", "opt/mu/head/bias"), (1, 2))
    said = "not all numbers are finite of model/client/head/bias and 1 more array, of clients south, west"
    assert in_state(bad, NAMES) == said
    assert has_client_axis("model/client/head/bias", 2) and not has_client_axis("model/client/head/bias", 1)


def test_scores_that_are_not_finite_name_their_clients():
    each = {"north": {"loss": 5.0, "accuracy": 0.1}, "a.b [x]": {"loss": NAN, "accuracy": 0.0}}
    said = in_scores({"round": 3, "eval_loss": NAN, "eval_clients": each})
    assert said == "the held-out loss is not finite, of client a.b [x]"
    assert in_scores({"eval_loss": INF, "eval_accuracy": 0.5}) == "the held-out loss is not finite"
    fine = {"eval_loss": 5.0, "train_loss": NAN, "eval_clients": {"north": each["north"]}, "eval_clients_scored": 1}
    assert in_scores(fine) == in_scores({}) == ""


def test_a_round_that_is_not_finite_is_told_with_its_numbers():
    said = in_round(5.0, INF, 0.5, ["east", "west"])
    assert said == (
        "the loss or a gradient is not finite (loss 5.0, gradient norms inf at the clients, 0.5 at the server), "
        "first with clients east, west"
    )
    assert in_round(1.0, 2.0, 3.0, ["east"]) == ""
    assert finite.listed(list("abcdefg")) == "clients a, b, c, d, e and 2 more"


TOGETHER = ARRANGEMENTS["parallel", "pooled", "parameters"]
PRIVATE = ARRANGEMENTS["parallel", "private", "parameters"]


@pytest.mark.parametrize(
    "failed, how, first",
    [
        ([0, 3, 5, 5], ARRANGEMENTS["sequential", "pooled", "parameters"], [1]),  # handed on
        ([2, 3, 2, 2], TOGETHER, [1]),  # a step later it had reached everybody
        ([3, 3, 3, 3], TOGETHER, [0, 1, 2, 3]),
        ([2, 3, 0, 0], ARRANGEMENTS["local", "pooled", "parameters"], [0, 1]),  # each for itself
        ([2, 3, 0, 0], ARRANGEMENTS["fedavg", "pooled", "parameters"], [1]),  # shared at the end of a round
        ([2, 3, 0, 0], PRIVATE, [1]),  # the segments are averaged
        ([4], ARRANGEMENTS["centralized", "pooled", "parameters"], []),
        ([4, 4, 4], ARRANGEMENTS["parallel", "pooled", "gradients"], []),  # one model, whose step is everybody's
        ([3, 4, 3], ARRANGEMENTS["parallel", "pooled", "gradients"], [1]),
        ([0, 0, 0], TOGETHER, []),
    ],
)
def test_with_whom_it_began(failed, how, first):
    assert first_to_fail(np.array(failed, np.int32), how) == first


def test_with_whom_it_began_is_asked_of_any_arrangement():
    """Whatever the strategy's name: nobody else's step is lost if bodies and segments are clients' own, cut or not."""
    for cut in (True, False):
        assert first_to_fail(np.array([1, 0, 2], np.int32), Arrangement("apart", "own", "own", cut)) == [0, 2]
        assert first_to_fail(np.array([1, 0, 2], np.int32), Arrangement("apart", "own", "copies", cut)) == [2]


def nan_for(client: int, tree):
    """A tree [N, ...] in which one client's numbers are not finite."""
    return jax.tree.map(lambda x: x.at[client].set(NAN) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


@pytest.mark.parametrize(
    "strategy, mode, failed",
    [
        ("local", "average", [0, 3, 0]),  # client 1's model is gone from the start, and nobody else's
        ("parallel", "keep", [1, 2, 1]),  # its moments are: so its second step fails, and then the shared body
        ("sequential", "keep", [0, 2, 3]),  # likewise, and then the client with the next turn
    ],
)
def test_a_round_counts_the_steps_that_failed_by_client(strategy, mode, failed):
    federated = dict(strategy=strategy, client_optimizer_state=mode, local_steps=3, batch_size=1)
    config = tiny_config(federated=federated)
    _, rule, state = make_strategy(config)
    opt = Pair(nan_for(1, state.opt.client), state.opt.server)
    state = State(nan_for(1, state.model) if strategy == "local" else state.model, opt, state.averaging)
    cohort = Cohort(random_blocks(0, 3, 3, 1), jnp.arange(3), jnp.full(3, 1 / 3), jnp.int32(0))
    _, metrics = jax.jit(rule.round)(state, cohort)
    assert metrics.failed.tolist() == failed


@pytest.mark.parametrize("wire", [{}, dict(gradient_codec="int8"), dict(gradient_clip=1.0), dict(codec="int8")])
@pytest.mark.parametrize("weights, failed", [((0.5, 0.2, 0.3), [2, 3, 2]), ((0.5, 0.0, 0.5), [0, 0, 0])])
def test_of_averaged_gradients_the_client_is_known_whose_rows_are_not_finite(wire, weights, failed):
    """One model's step is everybody's, so a step later nobody's numbers are finite."""
    config = tiny_config(federated=dict(average="gradients", local_steps=3), wire=wire)
    setting, _, state = make_strategy(config)

    def embed(params, batch, keys):
        theirs = jnp.any(batch.positions == 11, axis=-1)  # whoever predicts the last place, which holds a special token
        return setting.segments.embed(params, batch, keys) * jnp.where(theirs, NAN, 1.0)[:, None, None]

    rule = rounds.make_strategy(dataclasses.replace(setting, segments=setting.segments._replace(embed=embed)))
    rows = random_blocks(0, 3, 3, 2).at[..., 11].set(3).at[:, 1, 0, :].set(3).at[:, 1, 0, 11].set(9)
    _, metrics = jax.jit(rule.round)(state, Cohort(rows, jnp.arange(3), jnp.asarray(weights), jnp.int32(0)))
    assert metrics.failed.tolist() == failed
    assert first_to_fail(np.asarray(metrics.failed), config.federated.arrangement) == [1] * (max(failed) > 0)


def test_who_is_absent_is_not_to_blame():
    failed, rows = jnp.array([0, 1, 1]), jnp.array([[1, 1, 0], [1, 1, 0], [0, 1, 0]])
    found = blame(failed, rows, jnp.array([0.5, 0.0, 0.5]))
    assert found.tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 1]]  # of the last step nobody is known


WHOLE = Channel(lambda x, _: jnp.round(x * 1024).astype(jnp.int16), lambda n: n.astype(jnp.float32) / 1024)


def test_a_codec_whose_payload_holds_whole_numbers_alone_is_looked_at_too():
    with mock.patch.dict(CODECS, {"own": lambda dtype: WHOLE}):
        _, rule, state = make_strategy(tiny_config(federated=dict(average="gradients"), wire=dict(codec="own")))
        cohort = Cohort(random_blocks(0, 2, 3, 2), jnp.arange(3), jnp.full(3, 1 / 3), jnp.int32(0))
        _, metrics = jax.jit(rule.round)(state, cohort)
    assert metrics.failed.tolist() == [0, 0, 0] and np.isfinite(metrics.loss)

"""`model.client_layers`: the cut lies deeper, and the model stays the same."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import LENGTH, assert_trees_close, make_simulation, random_blocks, tiny_config

from fedbert_jax.data.masking import MaskedBatch
from fedbert_jax.federated.joined import joined_loss
from fedbert_jax.federated.split import split_step
from fedbert_jax.federated.wire import make_cut
from fedbert_jax.models import bert
from fedbert_jax.models.bert import make_segments
from fedbert_jax.models.huggingface import from_tensors, to_tensors
from fedbert_jax.models.layers import fold_in

LAYERS = 3


def segments(own: int, **model):
    return make_segments(tiny_config(model=dict(num_layers=LAYERS, client_layers=own, **model)).model)


@pytest.fixture(scope="module")
def whole():
    """A model whose layers all belong to the server."""
    return jax.jit(segments(0).init)(*jax.random.split(jax.random.key(0)))


def moved(model, own: int):
    """The same model with its first layers at the client."""
    client, server = model
    part = lambda first, last: jax.tree.map(lambda x: x[first:last], server["layers"])  # noqa: E731
    return {**client, "layers": part(0, own)}, {"layers": part(own, LAYERS)}


@pytest.mark.parametrize("own", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_same_model_wherever_it_is_cut(whole, batch, own):
    """Losses and gradients across the deeper cut, also of padded sequences, are those of the uncut model."""
    weights = jnp.array([0.5, 0.2, 0.3])
    cut = make_cut(segments(own), tiny_config().wire)
    padded = batch._replace(lengths=jnp.array([[LENGTH, 9], [7, LENGTH], [LENGTH, LENGTH]], jnp.int32))
    client, server = moved(whole, own)
    step = jax.jit(lambda data: split_step(cut, client, server, data, weights, shared_client=True))
    loss = jax.jit(jax.value_and_grad(lambda m, data: joined_loss(segments(0), *m, data)))
    for data in (batch, padded):
        out, body = step(data), 0.0
        for n in range(3):
            value, grads = loss(whole, jax.tree.map(lambda x, n=n: x[n], data))
            np.testing.assert_allclose(out.loss[n], value, rtol=1e-6)
            own_grads, rest = moved(grads, own)
            assert_trees_close(jax.tree.map(lambda x, n=n: x[n], out.client_grads), own_grads)
            body = jax.tree.map(lambda g, b, n=n: b + weights[n] * g, rest, body or jax.tree.map(jnp.zeros_like, rest))
        assert_trees_close(out.server_grads, body)


def test_exports_and_imports_are_of_the_whole_model(whole):
    tensors = to_tensors(*whole)
    for own in (1, 2):
        cut = moved(whole, own)
        again = to_tensors(*cut)
        assert again.keys() == tensors.keys() and all(np.array_equal(again[k], tensors[k]) for k in tensors)
        blank = jax.tree.map(jnp.zeros_like, cut)
        *filled, missing = from_tensors(tensors, *blank)
        assert not missing
        assert_trees_close(tuple(filled), cut, rtol=0, atol=0)


def test_each_party_draws_its_own_layers():
    """Initial values and dropout of the client's layers follow from its secret, those of the server's from the server's."""
    made = segments(1, hidden_dropout=0.5)
    keys = jax.random.split(jax.random.key(1), 4)
    one, other_client, other_server = (made.init(keys[a], keys[b]) for a, b in ((0, 1), (2, 1), (0, 3)))
    kernel = lambda params: params["layers"]["up"]["kernel"]  # noqa: E731
    assert kernel(one[0]).shape[0] == 1 and kernel(one[1]).shape[0] == LAYERS - 1
    for other, same in ((other_client, 1), (other_server, 0)):
        assert np.array_equal(kernel(one[same]), kernel(other[same]))
        assert not np.allclose(kernel(one[1 - same]), kernel(other[1 - same]))
    draws = np.concatenate([kernel(one[0]).ravel(), *np.asarray(kernel(one[1])).reshape(LAYERS - 1, -1)])
    assert len(np.unique(draws)) > 0.99 * len(draws)
    batch = MaskedBatch(random_blocks(0, 2), None, None, None)
    embed = jax.jit(lambda keys: made.embed(one[0], batch, keys))
    assert not np.allclose(embed(keys[:1]), embed(keys[1:2]))
    # Its layers draw from another branch of the key than its embedding: no key is both drawn from and split.
    with pytest.MonkeyPatch.context() as patch:
        folded = []
        patch.setattr(bert, "fold_in", lambda keys, n: folded.append(n) or fold_in(keys, n))
        jax.eval_shape(lambda keys: made.embed(one[0], batch, keys), keys[:1])
    assert folded[0] == bert.OWN_LAYERS
    alone = make_segments(tiny_config(model=dict(num_layers=1)).model).init(keys[0], keys[1])[1]
    assert not np.allclose(kernel(made.init(keys[0], keys[1])[0]), kernel(alone))
    same_key = jax.jit(segments(0).init)(keys[1], keys[0])[1]  # a server whose key is the client's
    assert not np.allclose(kernel(one[0])[0], kernel(same_key)[0])


@pytest.mark.parametrize("kind", [dict(), dict(average="gradients"), dict(body="merged")], ids=str)
def test_a_deeper_cut_trains_and_is_judged(kind):
    federated, model = dict(local_steps=1) | kind, dict(num_layers=2, client_layers=1)
    simulation = make_simulation(tiny_config(federated=federated, model=model, wire=dict(clip=4.0)))
    state = simulation.init_state()
    before = simulation.evaluate(state).over_clients.loss
    for n in range(3):
        state, metrics = simulation.run_round(state, n)
    assert not np.asarray(metrics.failed).any()
    assert simulation.evaluate(state).over_clients.loss != before
    assert simulation.model_of(state).client["layers"]["up"]["kernel"].shape[0] == 1
    simulation.close()

"""Evaluation: what is asked, which model answers, which mean a number is, and how guessing scores at the same positions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import LENGTH, VOCAB, make_simulation, mask_spec, random_blocks, tiny_config

from fedbert_jax.data.streams import Seeds, secrets
from fedbert_jax.federated.evaluation import EvalSet, evaluation, log_frequencies, make_evaluate, masked, plan_evaluation
from fedbert_jax.federated.state import Pair
from fedbert_jax.models.layers import take_positions

SEEDS = Seeds(0, 0)
MASK = 4  # the tiny vocabulary's [MASK]
ask = jax.jit(masked, static_argnums=2)


@pytest.fixture(scope="module")
def simulation():
    made = make_simulation(tiny_config(eval=dict(batch_size=2)))
    yield made
    made.close()


@pytest.fixture(scope="module")
def spec():
    return mask_spec(tiny_config())


def batches(data: EvalSet) -> list[EvalSet]:
    return [jax.tree.map(lambda x, n=n: x[n], data) for n in range(len(data.clients))]


def test_every_asked_position_is_masked_and_nothing_else_is_changed(simulation, spec):
    data = jax.device_get(simulation._eval_set)
    for batch in batches(data):
        questions = ask(secrets(simulation.feed.seeds), batch, spec)
        expected = np.array(batch.tokens, np.int32)
        assert np.array_equal(questions.labels, np.take_along_axis(expected, np.asarray(questions.positions), 1))
        np.put_along_axis(expected, np.asarray(questions.positions), MASK, 1)
        assert np.array_equal(questions.tokens, expected)
        assert (np.asarray(questions.weights) == 1).all()


def test_a_model_that_only_copies_is_never_right(simulation, spec):
    """It answers with the token at the position asked for, which is always [MASK]."""
    copier = simulation.setting.segments._replace(
        embed=lambda params, batch, *_: jax.nn.one_hot(batch.tokens, VOCAB),
        transform=lambda params, h, positions, *_: take_positions(h, positions),
        predict=lambda params, z, *_: 10.0 * z,
    )
    evaluate = jax.jit(make_evaluate(copier, spec, SEEDS, lambda state, client: Pair((), ())))
    sums = np.asarray(evaluate((), jax.device_get(simulation._eval_set)))
    assert sums[:, 1].sum() == 0 and sums[:, 2].sum() == 3 * 3 * spec.num_masked


def test_scores_and_guessing_by_hand(simulation, spec):
    """Each client's loss and accuracy, by a loop over its blocks, for the model and for guessing by frequency."""
    segments, state = simulation.setting.segments, simulation.init_state()

    @jax.jit
    def answer(client, server, questions):
        """Log-probabilities [B, T, V] of the tokens at all positions."""
        z = segments.transform(server, segments.embed(client, questions))
        return jax.nn.log_softmax(segments.predict(client, z))

    counts = np.bincount(np.asarray(simulation.train.tokens).ravel(), minlength=VOCAB)
    special = (0, 1, 2, 3, 4)
    found, guessing = simulation.evaluate(state), simulation.evaluate_frequencies(counts, special)
    data = jax.device_get(simulation._eval_set)
    usual = [t for t in range(VOCAB) if t not in special]
    total = sum(counts[t] + 1 for t in usual)
    commonest = max(usual, key=lambda t: (counts[t], -t))
    for c in range(3):
        nll, right, chance_nll, chance_right = [], [], [], []
        for batch in batches(data):
            if batch.clients != c:
                continue
            questions = ask(secrets(simulation.feed.seeds), batch, spec)
            log_probs = np.asarray(answer(*state.model, questions))
            for row in np.flatnonzero(batch.real):
                for position, label in zip(questions.positions[row], questions.labels[row], strict=True):
                    nll.append(-log_probs[row, position, label])
                    right.append(log_probs[row, position].argmax() == label)
                    chance_nll.append(-np.log((counts[label] + 1) / total))
                    chance_right.append(label == commonest)
        assert len(nll) == 3 * spec.num_masked  # three held-out blocks each
        np.testing.assert_allclose(found.clients[c], (np.mean(nll), np.mean(right)), rtol=1e-5)
        np.testing.assert_allclose(guessing.clients[c], (np.mean(chance_nll), np.mean(chance_right)), rtol=1e-5)


def test_special_tokens_are_never_guessed():
    found = log_frequencies(np.array([900, 3, 0, 5]), (0,))
    np.testing.assert_allclose(np.exp(found), [0, 4 / 11, 1 / 11, 6 / 11], rtol=1e-6)


def test_the_two_means():
    """Clients of 1, 6 and 3 training blocks; the second was asked eight questions, the others four; a further one, none."""
    sums = np.array([[8.0, 1, 4], [4, 1, 4], [2, 4, 4], [0, 0, 0], [3, 2, 4]])
    found = evaluation(sums, np.array([0, 1, 1, 2, 3]), np.array([1, 6, 9, 3]))
    assert found.clients == {0: (2.0, 0.25), 1: (0.75, 0.625), 3: (0.75, 0.5)}
    np.testing.assert_allclose(found.over_clients, ((2 + 0.75 + 0.75) / 3, (0.25 + 0.625 + 0.5) / 3))
    np.testing.assert_allclose(found.by_text, (0.1 * 2 + 0.9 * 0.75, 0.1 * 0.25 + 0.6 * 0.625 + 0.3 * 0.5))
    assert found.headline("examples") == found.by_text and found.headline("uniform") == found.over_clients
    fields = found.fields("eval_loss", "eval_accuracy", "uniform")
    assert fields["eval_loss"] == fields["eval_loss_over_clients"] == found.over_clients.loss
    assert fields["eval_accuracy_by_text"] == found.by_text.accuracy
    assert found.scope("examples", 706) == "mean by text, 3 of 706 clients"
    assert found.scope("uniform", 706) == "mean over 3 of 706 clients"
    assert evaluation(np.zeros((0, 3)), np.zeros(0, int), np.ones(3)) is None
    assert evaluation(np.zeros((1, 3)), np.zeros(1, int), np.ones(3)) is None


def test_a_client_at_which_nothing_is_asked_has_no_score(simulation, monkeypatch):
    """All of its tokens are special, so it has nothing to predict; that doesn't count as predicting perfectly."""
    data = simulation._eval_set
    special = jnp.where(data.clients[:, None, None] == 1, jnp.ones_like(data.tokens), data.tokens)
    monkeypatch.setattr(simulation, "_eval_set", data._replace(tokens=special))
    found = simulation.evaluate(simulation.init_state())
    assert set(found.clients) == {0, 2}
    assert np.isclose(found.over_clients.loss, np.mean([found.clients[c].loss for c in (0, 2)]))


def test_scored_blocks_are_a_draw():
    offsets = np.array([0, 40, 40, 43])
    plan = plan_evaluation(offsets, np.arange(3), max_blocks=6, batch=4, seeds=SEEDS)
    assert list(plan.clients) == [0, 0, 2] and plan.real.sum() == 6 + 3
    first = plan.rows[:2][plan.real[:2] > 0]
    assert len(set(first)) == 6 and set(first) <= set(range(40))
    assert sorted(first) != list(range(6))  # not the first ones
    assert sorted(plan.rows[2][plan.real[2] > 0]) == [40, 41, 42]  # all there are
    assert np.array_equal(plan.blocks[2], plan.rows[2] - 40)
    again = plan_evaluation(offsets, np.arange(3), max_blocks=6, batch=4, seeds=SEEDS)
    assert all(np.array_equal(a, b) for a, b in zip(plan, again, strict=True))
    draws = {tuple(plan_evaluation(offsets, [0], 6, 6, Seeds(0, seed)).rows[0]) for seed in range(5)}
    assert len(draws) == 5
    # Every block is equally likely: six of 40 are drawn.
    counts = sum(np.bincount(plan_evaluation(offsets, [0], 6, 6, Seeds(0, n)).rows[0], minlength=40) for n in range(400))
    assert ((counts - 60) ** 2 / 60).sum() < 80  # chi-squared with 39 degrees of freedom, p about 1e-4


def test_scores_do_not_depend_on_how_rows_fall_into_batches():
    found = []
    for size in (1, 2, 32):
        made = make_simulation(tiny_config(eval=dict(batch_size=size)))
        found.append(made.evaluate(made.init_state()))
        made.close()
    for other in found[1:]:
        np.testing.assert_allclose(other.by_text, found[0].by_text, rtol=1e-6)


def test_no_two_blocks_are_asked_at_the_same_places():
    """Another block, client or seed has other masks; the same ones have the same masks."""
    block = np.asarray(random_blocks(0))
    spec = mask_spec(tiny_config())._replace(num_masked=5)

    def places(client: int, number: int, seed: int = 0) -> tuple[int, ...]:
        batch = EvalSet(block[None], np.ones(1), np.array([number]), np.int32(client))
        return tuple(np.asarray(ask(secrets(Seeds(9, seed)), batch, spec).positions[0]).tolist())

    drawn = [places(c, n, s) for c in range(3) for n in range(4) for s in range(2)]
    assert len(set(drawn)) > 20  # of 24, among 252 choices
    assert places(1, 2) == places(1, 2)
    assert block.shape[-1] == LENGTH

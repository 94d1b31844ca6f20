"""A replayed round is the run's own round, and what it keeps is what crossed."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import VOCAB, assert_trees_close, make_simulation, tiny_config

from fedbert_jax.audit import replay as replaying
from fedbert_jax.audit.case import Case, Sizes
from fedbert_jax.audit.groups import gather
from fedbert_jax.audit.replay import log, replay
from fedbert_jax.audit.source import Source
from fedbert_jax.federated.split import StepResult
from fedbert_jax.federated.wire import codec
from fedbert_jax.runtime.simulation import Simulation

STRATEGIES = {
    "parameters": dict(federated=dict(strategy="parallel", clients_at_once=1), wire=dict(downlink="all")),
    "gradients": dict(federated=dict(strategy="parallel", average="gradients")),
    "private": dict(
        federated=dict(strategy="parallel", body="private", client_optimizer_state="reset"),
        privacy=dict(averaging="blinded"),
    ),
    "sequential": dict(federated=dict(strategy="sequential")),
}


def source_of(rounds: int = 2, **changes) -> tuple[Source, Simulation]:
    """A run of random text that is to begin its third round; and what runs it."""
    config = tiny_config(**changes)
    sim = make_simulation(config)
    state = sim.init_state()
    for round in range(rounds):
        state, _ = sim.run_round(state, round)
    return Source(
        config=config, setting=sim.setting, mesh=sim.mesh, tokenizer=None, vocab_size=VOCAB, special_ids=(0, 1, 2, 3, 4),
        text=(np.asarray(sim.train.tokens),), state=state, round=2, cohort=sim.feed.draw, replayed=2,
        before=(1, 0), segments={"segment": lambda: state.model.client}, clients=("a", "b", "c"),
    ), sim  # fmt: skip


# A round each, compiled and replayed.
@pytest.fixture(
    params=[pytest.param(s, marks=pytest.mark.slow if s in ("private", "sequential") else ()) for s in STRATEGIES],
    scope="module",
)
def case(request):
    source, sim = source_of(**STRATEGIES[request.param])
    return request.param, source, sim, replay(source)


def test_a_replay_ends_as_the_round_does(case):
    name, source, sim, found = case
    copy = jax.tree.map(jnp.copy, source.state)
    end, _ = sim.run_round(copy, 2)
    # With gradients averaged, the run pools all clients' rows; the replay keeps each client's own gradient beside.
    assert_trees_close(
        found.state, end, rtol=2e-4 if name == "gradients" else 1e-6, atol=2e-6 if name == "gradients" else 1e-7
    )


def test_an_attacker_knows_how_deep_the_cut_is():
    """By it, rows are gathered in another way."""
    source, _ = source_of(
        rounds=0, model=dict(num_layers=2, client_layers=1), federated=dict(strategy="parallel", average="gradients")
    )
    ids = dict(pad_token_id=0, unk_token_id=1, cls_token_id=2, sep_token_id=3, mask_token_id=4, all_special_ids=range(5))
    tokenizer = SimpleNamespace(get_vocab=lambda: {str(n): n for n in range(VOCAB)}, name_or_path="", **ids)
    source = dataclasses.replace(source, tokenizer=tokenizer)
    log = Case(source, Sizes(), "", print).view.log
    expected = gather(log.messages.h, log.geometry, log.messages.unasked, 0.0, layers=1)
    np.testing.assert_array_equal(log.groups.of, expected.of)
    assert (log.groups.of != gather(log.messages.h, log.geometry, log.messages.unasked, 0.0).of).any()


def test_who_adds_up_numbers_under_pads_sees_no_words(case):
    name, source, _, _ = case
    granted = Case(source, Sizes(), "", print).granted("aggregator")
    if name == "private":
        assert isinstance(granted, str) and "under pads (privacy.averaging='blinded')" in granted
    else:
        assert granted == ({} if name != "sequential" else "nobody adds the clients' segments up")


def test_of_rows_drawn_by_size_nobody_is_said_to_add_up_clients_gradients():
    """The simulation makes one gradient of them, which as the first client's would say who has which words."""
    source, _ = source_of(rounds=0, federated=dict(average="gradients", batch_by="size"))
    granted = Case(source, Sizes(), "", print).granted("aggregator")
    assert isinstance(granted, str) and "one gradient of all clients' rows (federated.batch_by='size')" in granted


def test_the_sizes_of_gradients_are_those_that_cross():
    """Behind int8 a small row of a large table's is what its own scale leaves of it."""
    table = jnp.asarray(np.random.default_rng(0).standard_normal((2, 7, 5)), jnp.float32)
    out = StepResult(jnp.zeros(2), {"embeddings": {"word": {"embedding": table}}}, {}, {})
    rounded = np.round(table / (np.abs(table).max(-1, keepdims=True) / 127)) * np.abs(table).max(-1, keepdims=True) / 127
    for channel, sent in ((None, table), (codec("int8", jnp.float32), rounded)):
        np.testing.assert_allclose(replaying.norms_of(out, channel), np.linalg.norm(sent, axis=-1), rtol=1e-6)
    assert not np.allclose(np.linalg.norm(rounded, axis=-1), np.linalg.norm(table, axis=-1), rtol=1e-6)


def test_what_is_kept_is_what_the_clients_sent(case):
    """The first step's rows are the embeddings, by the round's segment, of the run's masked blocks; labels are its own."""
    name, source, sim, found = case
    cohort = source.cohort(2)
    batch, _ = sim.setting.draw(cohort.rows[0], cohort.round, jnp.int32(0), cohort.clients)
    clients, size = batch.tokens.shape[:2]
    count = clients * size  # blocks of a step
    tokens = np.asarray(batch.tokens).reshape(count, -1)
    first = range(size) if name == "sequential" else range(count)  # later turns begin with another segment
    expected = sim.setting.segments.embed(source.state.model.client, jax.tree.map(lambda x: x.reshape(count, -1), batch))
    np.testing.assert_array_equal(found.truth.tokens[:count], tokens)
    np.testing.assert_array_equal(found.truth.original[:count], np.asarray(cohort.rows[0]).reshape(count, -1))
    np.testing.assert_array_equal(found.truth.labels[:count], np.asarray(batch.labels).reshape(count, -1))
    np.testing.assert_allclose(found.messages.h[list(first)], np.asarray(expected)[list(first)], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found.messages.client[:count], np.repeat(np.asarray(cohort.clients), size))
    # Where all hidden states come back, the zeros of dz show which were asked for.
    np.testing.assert_array_equal(found.messages.positions[:count], np.asarray(batch.positions).reshape(count, -1))
    assert found.messages.z.shape == found.messages.dz.shape == (len(found.truth.labels), 3, 16)
    assert (np.abs(found.messages.dz).sum(axis=-1) > 0)[found.truth.real].all()


def test_text_is_what_is_neither_predicted_nor_special(case):
    _, source, sim, found = case
    truth = found.truth
    predicted = np.zeros_like(truth.text)
    cohort = source.cohort(2)
    for k, rows in enumerate(np.asarray(cohort.rows)):
        batch, _ = sim.setting.draw(jnp.asarray(rows), cohort.round, jnp.int32(k), cohort.clients)
        places = np.asarray(batch.positions).reshape(-1, 3)
        some = predicted[k * len(places) : (k + 1) * len(places)]
        np.put_along_axis(some, places, True, axis=1)
    np.testing.assert_array_equal(truth.text, ~predicted & (truth.tokens > 4))
    assert truth.text.any()


def test_whoever_adds_up_sees_moves_moments_or_gradients(case):
    name, source, _, found = case
    views = found.aggregate.views
    alone = {"gradients": {"gradient"}, "private": {"move"}}  # moments that are made anew each round don't travel
    assert set(views) == alone.get(name, {"move", "moments"})
    for seen_of, seen in views.items():
        assert seen.shape == ((3, VOCAB, 16) if seen_of == "move" else (3, VOCAB))
        assert np.isfinite(seen).all() and (seen > 0).any() and (seen_of == "move" or (seen > -1e-9).all())
    held = np.zeros((3, VOCAB), bool)
    for client, tokens, text, labels, real in zip(found.messages.client, *found.truth[:4], strict=True):
        held[client, tokens[text]] = True
        held[client, labels[real]] = True
    order = np.asarray(source.cohort(2).clients)
    np.testing.assert_array_equal(found.aggregate.held, held[order])


def test_a_log_is_made_of_the_rounds_before(case):
    """The last round before comes first, its blocks masked as they were, embedded by the segment of now."""
    _, source, sim, _ = case
    messages, truth = log(source, 17)  # a round has 12
    assert messages.z is None and len(truth.tokens) == 17
    taken = []
    for round in (1, 0):
        before = source.cohort(round)
        for k, rows in enumerate(before.rows):
            batch, _ = sim.setting.draw(rows, before.round, jnp.int32(k), before.clients)
            taken.append(jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), batch))
    batch = jax.tree.map(lambda *x: jnp.concatenate(x)[:17], *taken)
    np.testing.assert_array_equal(truth.tokens, np.asarray(batch.tokens))
    expected = sim.setting.segments.embed(source.state.model.client, batch)
    np.testing.assert_allclose(messages.h, np.asarray(expected), rtol=1e-5, atol=1e-6)


def test_noise_and_codec_are_in_what_is_kept():
    """A segment that is the same in both runs: rows differ by noise of the given size, and by the codec's rounding."""
    sent = {}
    for name, wire in (("noise", dict(noise=0.5)), ("int8", dict(codec="int8"))):
        other, _ = source_of(rounds=0, wire=wire)
        sent[name] = log(other, 12)[0].h
    exact = log(source_of(rounds=0)[0], 12)[0].h
    assert 0.45 < np.std(sent["noise"] - exact) < 0.55
    scale = np.abs(exact).max(axis=-1, keepdims=True) / 127
    assert np.abs(sent["int8"] - exact).max() > 0 and (np.abs(sent["int8"] - exact) <= scale * 0.51).all()

"""Attacks find what messages hold and guessing finds what it finds; each is checked against numbers from elsewhere."""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import multivariate_t
from sklearn.metrics import roc_auc_score
from tiny import LENGTH, VOCAB, random_blocks, tiny_config

from fedbert_jax.audit import cipher, decoder, inverter, known, labels, learned, regression, views, words
from fedbert_jax.audit.attacks import ATTACKS, KINDS
from fedbert_jax.audit.geometry import best, describe, distinct, unit
from fedbert_jax.audit.groups import gather
from fedbert_jax.audit.score import floors, score
from fedbert_jax.audit.tables import Table, alike
from fedbert_jax.audit.views import Aggregate, Answers, Known, Log, Messages, Public, Truth, View
from fedbert_jax.data.masking import MaskedBatch
from fedbert_jax.federated import wire
from fedbert_jax.models.bert import make_segments

CONFIG = tiny_config().model
SPECIAL = (0, 1, 2, 3, 4)
EVERYWHERE = np.ones((40, LENGTH), bool)


@pytest.fixture(scope="module")
def bert():
    """The tiny segments, a client's parameters that differ as after training, and a body's."""
    segments = make_segments(CONFIG)
    client, server = segments.init(jax.random.key(1), jax.random.key(2))
    client = jax.tree.map(lambda x: x * 20 if x.ndim == 2 else x, client)  # initial tables are small
    return segments, client, server


@pytest.fixture(scope="module")
def blocks():
    return np.asarray(random_blocks(3, 40), np.int64)


@pytest.fixture(scope="module")
def h(bert, blocks):
    segments, client, _ = bert
    tokens = jnp.asarray(blocks)
    return np.asarray(segments.embed(client, MaskedBatch(tokens, tokens, tokens, tokens)))


def view_of(bert, h, **more) -> View:
    segments, _, server = bert
    public = Public(segments, VOCAB, SPECIAL, 4, 3, 1, None, more.pop("noise", 0.0))
    messages = Messages(h, np.zeros(len(h), int))
    return View(public, messages, Log(messages, public.noise), server, **more)


def attack(name: str):
    return next(a for a in ATTACKS if a.name == name)


def share(guesses, truth) -> float:
    return float((guesses[..., 0] == truth)[:, 1:5].mean())


# --- a table ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["float32", "bfloat16", "int8"])
def test_the_segment_reads_every_token_through_every_codec(bert, h, blocks, codec):
    channel = wire.codec(codec, jnp.float32)
    sent = np.asarray(channel.receive(channel.send(jnp.asarray(h), None)), np.float32)
    guesses = attack("nearest").guess(view_of(bert, sent, segment=bert[1]))
    assert guesses.shape == (40, LENGTH, 5) and (guesses[..., 0] == blocks).all()


def test_nearest_is_the_smallest_of_all_distances(bert, h):
    segments, client, _ = bert
    every = np.stack(
        [np.asarray(segments.embed(client, MaskedBatch(*[jnp.full((1, LENGTH), v)] * 4)))[0] for v in range(VOCAB)]
    )
    distances = ((h[:3, :, None] - every.swapaxes(0, 1)[None]) ** 2).sum(-1)  # [3, T, V]
    ids, scores = Table(segments, client, LENGTH, VOCAB).nearest(h[:3] + 0.5, 5)
    distances = ((h[:3, :, None] + 0.5 - every.swapaxes(0, 1)[None]) ** 2).sum(-1)
    np.testing.assert_array_equal(ids, np.argsort(distances, axis=-1)[..., :5])
    np.testing.assert_allclose(scores, -0.5 * np.sort(distances, axis=-1)[..., :5], rtol=1e-4, atol=1e-4)


def test_a_clipped_row_is_compared_with_clipped_rows(bert, h, blocks):
    clipped = np.asarray(wire.clip(0.5).send(jnp.asarray(h), None))
    view = view_of(bert, clipped, segment=bert[1])
    view = dataclasses.replace(view, public=dataclasses.replace(view.public, clip=0.5))
    assert (attack("nearest").guess(view)[..., 0] == blocks).all()


def test_another_seeds_table_reads_nothing(bert, h, blocks):
    segments, _, _ = bert
    other = segments.init(jax.random.key(5), jax.random.key(6))[0]
    for name in ("nearest", "likeness"):
        assert share(attack(name).guess(view_of(bert, h, segment=other)), blocks) < 0.1


def test_a_table_that_training_has_moved_is_still_told_apart(bert, h, blocks):
    """All words but the frequent ones drift together, by more than they lie apart: distances fail, directions don't."""
    segments, client, _ = bert
    drift = 4 * np.random.default_rng(0).standard_normal(16).astype(np.float32)
    moved = np.asarray(client["embeddings"]["word"]["embedding"]) + drift * (np.arange(VOCAB) > 20)[:, None]
    after = {**client, "embeddings": {**client["embeddings"], "word": {"embedding": jnp.asarray(moved)}}}
    tokens = jnp.asarray(blocks)
    now = np.asarray(segments.embed(after, MaskedBatch(tokens, tokens, tokens, tokens)))
    view = view_of(bert, now, segment=client)
    near, like = (share(attack(name).guess(view), blocks) for name in ("nearest", "likeness"))
    assert like > near + 0.2 and like > 0.6


def test_pairs_are_read_whichever_sentence_a_token_is_in(bert, blocks):
    segments, client, _ = bert
    tokens, types = jnp.asarray(blocks[:4]), jnp.asarray(np.arange(LENGTH) > 6, jnp.int32)[None].repeat(4, 0)
    h = np.asarray(segments.embed(client, MaskedBatch(tokens, tokens, tokens, tokens, types)))
    one, two = (Table(segments, client, LENGTH, VOCAB, None, kinds).nearest(h)[0][..., 0] for kinds in (1, 2))
    assert (two == blocks[:4]).all() and (one != blocks[:4])[:, 7:].any()


# --- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["float32", "bfloat16", "int8"])
def test_labels_are_read_off_the_gradient_that_jax_computes(bert, codec):
    segments, client, _ = bert
    rng = np.random.default_rng(0)
    z = jnp.asarray(rng.standard_normal((6, 3, 16)), jnp.float32)
    asked = jnp.asarray(rng.integers(5, VOCAB, (6, 3)))
    batch = MaskedBatch(asked, asked, asked, jnp.ones((6, 3)))
    dz = jax.grad(lambda z: segments.loss(client, z, batch))(z)
    channel = wire.codec(codec, jnp.float32)
    dz = channel.receive(channel.send(dz, None))
    found = labels.read_labels(segments, client, np.asarray(z), np.asarray(dz))
    assert found.shape == (6, 3, 5)
    assert (found[..., 0] == np.asarray(asked)).mean() > (0.99 if codec == "float32" else 0.9)


def test_labels_are_read_off_a_model_that_has_learnt_little(bert, monkeypatch):
    """Its head knows hardly more than one direction, by which most labels differ little from one another, and few are looked
    at exactly."""
    monkeypatch.setattr(labels, "LIKELY", 5)
    segments, client, _ = bert
    dense = client["head"]["dense"]["kernel"]
    one = 3 * jnp.outer(jnp.linspace(-1, 1, len(dense)), jnp.linspace(1, -0.5, len(dense)))
    client = {**client, "head": {**client["head"], "dense": {**client["head"]["dense"], "kernel": one + 1e-3 * dense}}}
    z = jax.random.normal(jax.random.key(3), (40, 3, 16))
    asked = jax.random.randint(jax.random.key(4), (40, 3), 5, VOCAB)
    batch = MaskedBatch(asked, asked, asked, jnp.ones(asked.shape))
    dz = jax.grad(lambda z: segments.loss(client, z, batch))(z)
    found = labels.read_labels(segments, client, np.asarray(z), np.asarray(dz))
    assert (found[..., 0] == np.asarray(asked)).mean() > 0.95


@pytest.mark.parametrize("clip, outputs", [(None, 0), (0.004, 0), (None, 3)])
def test_labels_under_noise_are_those_of_bayes_rule(bert, monkeypatch, clip, outputs):
    """Compared with every label's own gradient, as jax computes it, and its probability, in float64.

    Labels are as frequent as the model says. Alone, neither prediction nor gradient finds as many.
    """
    segments, client, _ = bert
    if outputs:
        segments = make_segments(CONFIG, outputs=outputs)
        client = segments.init(jax.random.key(1), jax.random.key(2))[0]
        client = {**client, "classifier": jax.tree.map(lambda x: x * 20, client["classifier"])}
    rows, asked = 80, 1 if outputs else 3
    z = jax.random.normal(jax.random.key(3), (rows, asked, 16))
    logits = segments.predict(client, z)
    drawn = jax.random.categorical(jax.random.key(4), logits)

    def loss(z, labels):
        return segments.loss(client, z, MaskedBatch(labels, labels, labels, jnp.ones(labels.shape)))

    every = jnp.arange(logits.shape[-1])
    of = np.asarray(jax.lax.map(lambda y: jax.grad(loss)(z, jnp.full(drawn.shape, y)), every), np.float64)  # [V, R, M, D]
    if clip is not None:
        assert (np.linalg.norm(of, axis=-1) > clip).mean() > 0.1
        of *= np.minimum(1, clip / np.linalg.norm(of, axis=-1, keepdims=True))
    where = tuple(np.ogrid[:rows, :asked])
    sigma = (2.0 if outputs else 1.0) * of[(np.asarray(drawn), *where)].std()
    dz = of[(np.asarray(drawn), *where)] + sigma * np.random.default_rng(0).standard_normal(z.shape)
    likelihood = -np.square(dz - of).sum(axis=-1) / (2 * sigma**2)
    posterior = np.asarray(jax.nn.log_softmax(logits), np.float64) + np.moveaxis(likelihood, 0, -1)

    monkeypatch.setattr(labels, "LIKELY", 9)  # by dL/dz, and as many that the model expects, of all that there are
    found = labels.weigh_labels(segments, client, np.asarray(z), dz.astype(np.float32), float(sigma), clip)
    assert all(len(set(five)) == min(5, len(every)) for five in found.reshape(-1, 5).tolist())
    right = (found[..., 0] == np.asarray(drawn)).mean()
    assert found.shape == (rows, asked, 5) and (found[..., 0] == posterior.argmax(axis=-1)).mean() > 0.97
    alone = labels.read_labels(segments, client, np.asarray(z), dz.astype(np.float32))
    assert right > (alone[..., 0] == np.asarray(drawn)).mean() + 0.02
    assert right > float((logits.argmax(axis=-1) == drawn).mean()) + 0.02


def test_classes_are_read_off_the_gradient(bert):
    segments = make_segments(CONFIG, outputs=3)
    client, _ = segments.init(jax.random.key(1), jax.random.key(2))
    z = jnp.asarray(np.random.default_rng(0).standard_normal((9, 1, 16)), jnp.float32)
    classes = jnp.arange(9)[:, None] % 3
    batch = MaskedBatch(classes, classes, classes, jnp.ones((9, 1)))
    dz = jax.grad(lambda z: segments.loss(client, z, batch))(z)
    found = labels.read_labels(segments, client, np.asarray(z), np.asarray(dz))
    np.testing.assert_array_equal(found[..., 0], np.asarray(classes))


# --- without a table --------------------------------------------------------------------------------------------------


def test_equal_words_are_gathered_without_a_name(h, blocks):
    groups = gather(h, describe(h, EVERYWHERE), EVERYWHERE, 0.0)
    pairs = {(g, t) for g, t in zip(groups.of[:, 1:5].ravel(), blocks[:, 1:5].ravel(), strict=True)}
    assert len(pairs) < 1.4 * len(np.unique(blocks[:, 1:5]))
    np.testing.assert_array_equal(groups.nearest(describe(h, EVERYWHERE).centred(h[:3])), groups.of[:3])


def far_apart(words: int, rows: int, seed: int = 0):
    """Rows [rows, 8, 32] of words that lie far apart, and the words: a Markov chain, in which company tells words apart."""
    rng = np.random.default_rng(seed)
    follow = rng.dirichlet(np.full(words, 0.08), words) * 0.9 + 0.1 * np.arange(words, 0, -1) / np.arange(words + 1).sum()
    text = np.zeros((rows, 8), np.int64)
    for t in range(8):
        for r in range(rows):
            text[r, t] = (
                rng.choice(words, p=follow[text[r, t - 1]] / follow[text[r, t - 1]].sum()) if t else rng.integers(words)
            )
    return text, rng


def test_noise_averages_out_in_groups():
    text, rng = far_apart(30, 400)
    rows = 2 * rng.standard_normal((30, 32)).astype(np.float32)
    noisy = rows[text] + rng.standard_normal((*text.shape, 32)).astype(np.float32)
    where = np.ones(text.shape, bool)
    where[:, 0] = False
    groups = gather(noisy, describe(noisy, where), where, 1.0)
    assert (groups.of[:, 0] == -1).all()
    table = np.zeros((len(groups.means), 30), int)
    np.add.at(table, (groups.of[where], text[where]), 1)
    assert table.max(axis=1).sum() / where.sum() > 0.97 and table.max(axis=0).sum() / where.sum() > 0.9
    named = alike(rows, groups.means)[:, 0]
    assert (named[groups.of[where]] == text[where]).mean() > 0.9


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_words_are_gathered_by_direction_where_their_neighbours_show_in_them(noise):
    """As behind a client's own layer: no two rows of a word are equal, and the whitened ones are not alike enough."""
    text, rng = far_apart(30, 400)
    rows, beside = rng.standard_normal((2, 30, 32)).astype(np.float32)
    h = rows[text] + 0.4 * beside[np.roll(text, 1, axis=1)] + noise * rng.standard_normal((*text.shape, 32))
    where = np.ones(text.shape, bool)
    where[:, 0] = False
    geometry = describe(h, where)
    groups = gather(h, geometry, where, noise, layers=1)
    assert (groups.of[:, 0] == -1).all()
    np.testing.assert_array_equal(groups.nearest(geometry.centred(h))[where], groups.of[where])
    table = np.zeros((len(groups.means), 30), int)
    np.add.at(table, (groups.of[where], text[where]), 1)
    assert table.max(axis=1).sum() / where.sum() > 0.9 and table.max(axis=0).sum() / where.sum() > 0.75
    if not noise:
        flat = gather(h, geometry, where, noise)
        table = np.zeros((int(flat.of.max()) + 1, 30), int)
        np.add.at(table, (flat.of[where], text[where]), 1)
        assert table.max(axis=0).sum() / where.sum() < 0.75, "what gathers rows that neighbours leave alone would do"


@pytest.mark.parametrize("size", [1.0, 0.05])
def test_what_is_gathered_does_not_depend_on_how_large_rows_are(size):
    text, rng = far_apart(30, 300)
    rows = 2 * rng.standard_normal((30, 32)).astype(np.float32)
    noisy = size * (rows[text] + rng.standard_normal((*text.shape, 32)).astype(np.float32))
    where = np.ones(text.shape, bool)
    groups = gather(noisy, describe(noisy, where), where, size)
    named = alike(rows, groups.means)[:, 0]
    assert (named[groups.of] == text).mean() > 0.9
    assert (groups.nearest(describe(noisy, where).centred(noisy)) == groups.of).mean() > 0.95


def test_a_cipher_is_solved_by_text_of_the_same_kind_alone():
    text, rng = far_apart(40, 1500)
    public = text[750:]
    secret = rng.permutation(40)
    names = cipher.solve(secret[text[:750]], public, 40)
    right = (names[secret[text[:750]]][..., 0] == text[:750]).mean()
    assert right > 0.8
    shuffled = rng.permuted(public.ravel()).reshape(public.shape)  # the frequencies stay, the company goes
    assert (cipher.solve(secret[text[:750]], shuffled, 40)[secret[text[:750]]][..., 0] == text[:750]).mean() < right - 0.3


def test_left_out_rows_are_no_company():
    company = cipher._Company(np.array([[0, 1, -1, 2], [1, 0, 2, 0]]), 3)
    np.testing.assert_array_equal(company.beside(np.arange(3), np.arange(3), 0), [[0, 1, 1], [1, 0, 0], [1, 0, 0]])
    np.testing.assert_array_equal(company.beside(np.arange(3), np.arange(3), 1), [[1, 0, 0], [0, 0, 2], [0, 0, 0]])


def test_known_text_reads_the_words_that_it_has(bert, h, blocks):
    where = (blocks > 4)[:2]
    known = Known(h[:2], blocks[:2], where)
    guesses = attack("known words").guess(view_of(bert, h, known=known))
    has = np.isin(blocks, blocks[:2][where])
    assert (guesses[..., 0] == blocks)[has].mean() > 0.9 and not (guesses[..., 0] == blocks)[~has].any()


def a_round(follows: float):
    """A round and a log of text in which a word is the follower of the one before so often, or any word.

    dL/dz is as it is for a head that is a matrix. All but the number of blocks is as in a round: 3 of 12 words are hidden
    and asked for, and blocks 40 on are not attacked.
    """
    rng, size = np.random.default_rng(0), VOCAB - 5
    chain = follows * np.eye(size)[rng.permutation(size)] + (1 - follows) / size
    text = np.empty((700, LENGTH), int)
    text[:, 0] = rng.integers(0, size, 700)
    for t in range(1, LENGTH):
        text[:, t] = [rng.choice(size, p=chain[w]) for w in text[:, t - 1]]
    text += 5
    table, places = rng.standard_normal((VOCAB, 24)), np.sort(np.argsort(rng.random((700, LENGTH)))[:, :3], axis=1)
    labels, seen = np.take_along_axis(text, places, axis=1), text.copy()
    np.put_along_axis(seen, places, 4, axis=1)
    h = (table[seen] + 0.3 * rng.standard_normal((LENGTH, 24))).astype(np.float32)
    z, head, mix = rng.standard_normal((700, 3, 24)), rng.standard_normal((24, 24)), rng.standard_normal((24, 24))
    dz = (0.5 * z @ mix - table[labels]) @ head + 0.5 * rng.standard_normal(z.shape)
    return text, places, labels, h, z.astype(np.float32), (1e-3 * dz).astype(np.float32)


@pytest.fixture(scope="module")
def told_apart():
    return a_round(0.85)


@pytest.fixture(scope="module")
def little_company():
    """A round whose words tell little of those beside them."""
    return a_round(0.25)


def without_a_segment(bert, told_apart, monkeypatch, known: int, shuffled: bool = False, by: str = "gradient") -> float:
    """The share of labels read in 40 blocks of a round of 80, by public text and `known` of the others.

    The cipher, which other tests solve, names each group with the word that most of it is.
    """
    text, places, labels, h, z, dz = told_apart
    dz = np.random.default_rng(1).permuted(dz[:80].reshape(-1, 24), axis=0).reshape(80, 3, 24) if shuffled else dz[:80]
    segments, _, server = bert
    messages = [Messages(h[n], np.zeros(40, int), places[n], z[n], dz[n]) for n in (slice(40), slice(40, 80))]
    log = Log(Messages(h[80:400], np.zeros(320, int), places[80:400]), 0.0, 0, text[400:], VOCAB)
    where = np.ones((40, LENGTH), bool)
    np.put_along_axis(where, places[40:80], False, axis=1)
    rows = np.arange(known)
    of = log.groups.of
    most = [np.bincount(text[80:400][of == n]).argmax() for n in range(len(log.groups.means))]
    named, solved = np.repeat(np.array(most)[:, None], 5, axis=1), []
    for module in (cipher, views):
        monkeypatch.setattr(module, "solve", lambda of, text, size, told=None: solved.append(told) or named)
    answers = Answers(rows, Known(h[40 + rows], text[40 + rows], where[rows]), labels[40 + rows]) if known else None
    public = Public(segments, VOCAB, SPECIAL, 4, 3, 1, None, 0.0)
    view = View(public, messages[0], log, server, text=text[400:], others=messages[1], answers=answers)
    knows = "known_text" if known else "public_text"
    found = next(a for a in ATTACKS if a.name.endswith(by) and a.knows == (knows,)).guess(view)
    assert found.shape == (40, 3, 5) and found.min() >= 0
    if known:  # the words of known blocks are told to the cipher
        told = solved[-1]
        assert (told >= 0).any() and set(told[told >= 0]) <= set(text[40 : 40 + known].ravel())
    return float((found[..., 0] == labels[:40]).mean())


def test_labels_are_read_without_a_segment(bert, told_apart, little_company, monkeypatch):
    """Public text alone, or a few known blocks, name words; what dL/dz has to do with their rows follows."""
    read = lambda *given, of=told_apart, **by: without_a_segment(bert, of, monkeypatch, *given, **by)  # noqa: E731
    assert read(0) > 0.8 and read(8) > 0.8
    assert min(read(0) - read(0, by="beside"), read(8) - read(8, by="beside")) > 0.1
    # A gradient that is another place's tells nothing: the words beside are left, and guessing.
    assert read(0, True, of=little_company) < 0.35 and read(8, True, of=little_company) < 0.35
    assert read(40, of=little_company) > 0.8
    for given in (0, 8):
        assert read(given, True) < read(given, by="beside") + 0.06
    whole = read(40)
    monkeypatch.setattr(regression, "SWEEPS", 1)
    assert read(40) < whole - 0.03  # what it has guessed helps it to guess


def test_a_few_right_guesses_lead_to_most_labels(monkeypatch):
    """A round of few positions, of which one in seven is guessed: settings held back less than for whole rounds do it."""
    monkeypatch.setattr(regression, "RIDGE", 30.0)
    monkeypatch.setattr(regression, "HEAT", 1.0)
    rng = np.random.default_rng(1)
    rows, frequency = rng.standard_normal((200, 32)), 1 / np.arange(2, 202)
    frequency /= frequency.sum()
    truth, z, guess = rng.choice(200, 1200, p=frequency), rng.standard_normal((1200, 32)), rng.choice(200, 1200, p=frequency)
    head, mix = rng.standard_normal((2, 32, 32))
    dz = unit((0.5 * z @ mix - rows[truth]) @ head + 5 * rng.standard_normal((1200, 32)))
    guess = np.where(rng.random(1200) < 0.15, truth, guess)
    beside = np.log(0.85 * frequency + 0.15 * (guess[:, None] == np.arange(200)))
    asked = regression.Asked(*(x.astype(np.float32) for x in (z, dz)), np.arange(200), rows, beside.astype(np.float32), [])
    scores = regression.search(asked, np.zeros(1200, int), np.zeros(1200, bool))
    assert (beside.argmax(axis=1) == truth).mean() < 0.3 and (scores.argmax(axis=1) == truth).mean() > 0.75


def test_the_words_beside_a_label_say_what_public_text_has_between_them(bert, told_apart, monkeypatch):
    """The reference counts pairs of words in the text itself; a neighbour that isn't seen says nothing."""
    text, places, *_ = told_apart
    counts, pairs = np.bincount(text[400:].ravel(), minlength=VOCAB) + 0.5, np.zeros((VOCAB, VOCAB))
    np.add.at(pairs, (text[400:, :-1].ravel(), text[400:, 1:].ravel()), 1)
    firsts = pairs.sum(axis=1, keepdims=True)
    plain = decoder.SMOOTH / (firsts + decoder.SMOOTH)
    after = (1 - plain) * pairs / np.maximum(firsts, 1) + plain * counts / counts.sum()
    told: list = []
    monkeypatch.setattr(regression, "AT_ONCE", 32)  # so that there are several parts
    monkeypatch.setattr(regression, "_best", lambda *of: told.append(of) or np.zeros((40, 3, 5), int))
    without_a_segment(bert, told_apart, monkeypatch, 0, by="beside")
    scores, words, _ = told[0]
    seen = np.pad(text[:40], ((0, 0), (1, 1)))
    np.put_along_axis(seen, places[:40] + 1, 0, axis=1)
    blocks, at = np.repeat(np.arange(40), 3), places[:40].ravel() + 1
    left, right = seen[blocks, at - 1], seen[blocks, at + 1]
    follows = np.where(left[:, None] > 0, after[left[:, None], words], (counts / counts.sum())[words])
    expected = follows * np.where(right[:, None] > 0, after[words[None], right[:, None]], 1)
    expected /= expected.sum(axis=1, keepdims=True)
    assert min(sum((left > 0) & (right > 0)), sum(left == 0), sum(right == 0)) > 10
    np.testing.assert_allclose(np.exp(scores), expected, rtol=1e-4)


def test_distances_are_those_of_a_regression_on_every_word_as_often_as_it_is_likely(monkeypatch):
    """The reference writes each position once for each word, weighted by the word's chance, in float64, and fits by QR."""
    rng = np.random.default_rng(0)
    monkeypatch.setattr(regression, "RIDGE", 2.0)
    size, words, width = 23, 7, 4
    z, dz = rng.standard_normal((2, size, width)).astype(np.float32)
    rows = rng.standard_normal((words, width)).astype(np.float32)
    chances = rng.dirichlet(np.ones(words), size).astype(np.float32)
    weights, beside = rng.uniform(0.5, 3, size), np.zeros((size, words), np.float32)
    asked = regression.Asked(z, dz, np.arange(words), rows, beside, [np.ones((size, 1), bool)])
    found = regression.distances(asked, chances, weights)

    feature = lambda n, w: np.concatenate([rows[w], z[n], [1.0]])  # noqa: E731
    left, spread = np.zeros((size, words, width)), np.zeros((width, width))
    for fold in range(regression.FOLDS):
        others = [(n, w) for n in range(size) for w in range(words) if n % regression.FOLDS != fold]
        root = np.sqrt([weights[n] * chances[n, w] for n, w in others])[:, None]
        x = np.concatenate([root * [feature(n, w) for n, w in others], np.sqrt(2.0) * np.eye(2 * width + 1)])
        y = np.concatenate([root * [dz[n] for n, _ in others], np.zeros((2 * width + 1, width))])
        q, r = np.linalg.qr(x)
        by = np.linalg.solve(r, q.T @ y)
        for n in range(fold, size, regression.FOLDS):
            for w in range(words):
                left[n, w] = dz[n] - feature(n, w) @ by
                spread += weights[n] * chances[n, w] * np.outer(left[n, w], left[n, w])
    spread /= weights.sum()
    spread += regression.SHARED * np.trace(spread) / width * np.eye(width)
    expected = np.einsum("nwi,ij,nwj->nw", left, np.linalg.inv(spread), left)
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_likelihoods_of_what_is_left_are_those_of_a_t_distribution():
    rng, width = np.random.default_rng(0), 5
    x = rng.standard_normal((9, width))
    expected = multivariate_t(np.zeros(width), np.eye(width), df=regression.DEGREES).logpdf(x)
    found = regression.plausible(np.sum(x**2, axis=1), width)
    np.testing.assert_allclose(found - found[0], expected - expected[0], rtol=1e-9)


def test_a_search_for_labels_goes_from_likelihoods_to_chances_and_counts_outliers_less(monkeypatch):
    """Three sweeps by formulas, with distances that are given; the first so long that no density is a float32 above 0."""
    rng, calls = np.random.default_rng(0), []
    size, words, width, degrees = 6, 4, 3, regression.DEGREES
    squares = rng.chisquare(width, (3, size, words)).astype(np.float32)
    squares[0] += 1e20
    beside = np.log(rng.dirichlet(np.ones(words), size)).astype(np.float32)
    monkeypatch.setattr(regression, "SWEEPS", 3)
    monkeypatch.setattr(regression, "COOLED", 1)
    monkeypatch.setattr(regression, "distances", lambda *of: calls.append(of[1:]) or squares[len(calls) - 1])
    nothing = np.zeros((size, width), np.float32)
    asked = regression.Asked(nothing, nothing, np.arange(words), np.zeros((words, width)), beside, [])
    sure = np.arange(size) == 2
    scores = regression.search(asked, np.full(size, 3), sure)

    def scored(squares, heat):
        t = multivariate_t(np.zeros(width), np.eye(width), df=degrees)
        return np.array([[t.logpdf([np.sqrt(x), 0, 0]) for x in row] for row in squares]) / heat + beside

    chances, weights = [np.exp(beside)], [np.where(sure, 3.0, np.exp(beside).max(axis=1))]
    for before, heat in zip(squares[:2], (regression.HEAT, 1.0), strict=True):
        now = np.where(sure[:, None], np.eye(words)[3], softmax(scored(before, heat), axis=1))
        chances.append(now)
        weights.append(np.where(sure, 3.0, 1.0) * (degrees + width) / (degrees + np.sum(now * before, axis=1)))
    chances[0] = np.where(sure[:, None], np.eye(words)[3], chances[0])
    for (found, counted), expected, count in zip(calls, chances, weights, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(counted, count, rtol=1e-3)
    apart = scores - scored(squares[2], 1.0)
    np.testing.assert_allclose(apart, np.broadcast_to(apart[:, :1], apart.shape), atol=1e-4)


def test_labels_are_given_where_something_came_back_and_five_of_them_however_few_words_there_are():
    where, words = np.array([[True, False], [True, True]]), np.array([7, 9])
    scores = np.array([[0, 1], [2, 1], [3, 4], [9, 0]], float)  # the last is of a block that isn't attacked
    found = regression._best(scores, words, where)
    assert found.shape == (2, 2, 5)
    assert found[0, 0].tolist() == [9, 7, 7, 7, 7] and found[1].tolist() == [[7, 9, 9, 9, 9], [9, 7, 7, 7, 7]]
    dz = np.random.default_rng(0).standard_normal((2, 2, 3)) * where[..., None]
    np.testing.assert_array_equal(regression._asked(Messages(dz, np.zeros(2, int), None, dz, dz)), where)


def test_what_crossed_is_centred_and_scaled_before_it_is_regressed(bert, told_apart, monkeypatch):
    asked: list = []
    search = regression.search
    monkeypatch.setattr(regression, "search", lambda *of: asked.append(of[0]) or search(*of))
    without_a_segment(bert, told_apart, monkeypatch, 0)
    z, dz = asked[0].z, asked[0].dz
    np.testing.assert_allclose(z.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(np.mean(z**2), 1, rtol=0.02)
    np.testing.assert_allclose(np.linalg.norm(dz, axis=1), 1, rtol=1e-5)
    assert z.dtype == dz.dtype == asked[0].rows.dtype == asked[0].beside.dtype == np.float32


@pytest.mark.parametrize("most, expected", [(9, [6, 7, 5, 8]), (2, [6, 7])])
def test_words_have_the_rows_of_their_groups_and_known_ones_no_guessed_rows(monkeypatch, most, expected):
    """Group 0 is known to be word 6 and group 3 guessed to be; word 7 is known, but no group is known to be it."""
    means = np.random.default_rng(0).standard_normal((4, 3))
    of = np.repeat([0, 1, 2, 3, -1], [2, 6, 3, 7, 4])
    names, told = np.array([6, 7, 5, 6]), np.array([6, -1, -1, -1])
    tokens, h = np.array([[6, 7, 8, 7]]), np.random.default_rng(1).standard_normal((1, 4, 3))
    view = SimpleNamespace(
        public=SimpleNamespace(vocab_size=10),
        log=SimpleNamespace(groups=SimpleNamespace(of=of, means=means), geometry=SimpleNamespace(centred=lambda h: h)),
        answers=SimpleNamespace(blocks=Known(h, tokens, np.ones((1, 4), bool))),
    )
    monkeypatch.setattr(regression, "WORDS", most)
    words, rows = regression._rows(view, names, told)
    assert words.tolist() == expected  # 9, 6, 3 and 1 rows are named so
    of_word = {5: means[2], 6: means[0], 7: (h[0, 1] + h[0, 3]) / 2, 8: h[0, 2]}
    raw = np.array([of_word[word] for word in expected])
    raw -= raw.mean(axis=0)
    np.testing.assert_allclose(rows, raw / np.sqrt(np.mean(raw**2)), rtol=1e-9)


def test_known_labels_are_told_from_guessed_ones(bert, told_apart, monkeypatch):
    """Where what stands beside says nothing, labels follow from known ones alone."""

    def nothing(view, messages, where, named, bigrams):
        return np.full((int(where.sum()), len(named.words)), -np.log(len(named.words)), np.float32)

    monkeypatch.setattr(regression, "_beside", nothing)
    assert without_a_segment(bert, told_apart, monkeypatch, 40) > 0.7
    assert without_a_segment(bert, told_apart, monkeypatch, 0) < 0.3


def test_a_word_that_was_left_in_its_place_is_half_of_a_label(bert):
    """Under so much noise that only message 1 tells something, a token that is seen is taken for the label."""
    segments, client, _ = bert
    rng = np.random.default_rng(0)
    z, dz = rng.standard_normal((2, 6, 3, 16)).astype(np.float32)
    seen = np.where(np.arange(18).reshape(6, 3) % 2, rng.integers(5, VOCAB, (6, 3)), -1)
    found = labels.weigh_labels(segments, client, z, dz, 1e6, None, seen)[..., 0]
    expected = np.asarray(segments.predict(client, jnp.asarray(z))).argmax(axis=-1)
    sure = np.asarray(jax.nn.softmax(segments.predict(client, jnp.asarray(z)))).max(axis=-1)
    np.testing.assert_array_equal(found[seen < 0], expected[seen < 0])
    assert (sure < 1).all()
    np.testing.assert_array_equal(found[seen >= 0], seen[seen >= 0])


# --- deeper cuts and whole blocks ---------------------------------------------------------------------------------------


def test_rows_that_depend_on_their_context_are_read_by_statistics(bert):
    segments = make_segments(dataclasses.replace(CONFIG, client_layers=1))
    client, _ = segments.init(jax.random.key(1), jax.random.key(2))
    client = jax.tree.map(lambda x: x * 3 if x.ndim == 2 else x, client)
    pairs = inverter.embedded(segments, client, None, np.arange(5, VOCAB), 4, 3, LENGTH, blocks=200)
    assert ((pairs.tokens == 4).sum(axis=1) == 3).all() and pairs.tokens.min() == 4
    reader = inverter.Discriminant(inverter.Pairs(pairs.h[:150], pairs.tokens[:150]), VOCAB)
    found = reader.likeliest(pairs.h[150:])[0][..., 0]
    assert (found == pairs.tokens[150:]).mean() > 0.95
    log_prior = np.full(VOCAB, -20.0)
    log_prior[7] = 1e6
    assert (inverter.Discriminant(pairs, VOCAB, 0.1, log_prior).likeliest(pairs.h[:2])[0][..., 0] == 7).all()


@pytest.mark.parametrize("told_by", ["rows around", "place"])
def test_a_transformer_learns_what_single_rows_do_not_tell(bert, monkeypatch, told_by):
    """Noisy rows are read better where a block is one word throughout, or every other place has words of its own."""
    rng, (segments, client, _) = np.random.default_rng(1), bert
    tokens = np.repeat(rng.integers(5, 25, (420, 1)), LENGTH, axis=1)
    if told_by == "place":
        tokens = rng.integers(5, 15, (420, LENGTH)) + 10 * (np.arange(LENGTH) % 2)
    h = np.asarray(segments.embed(client, MaskedBatch(*[jnp.asarray(tokens)] * 4)))
    noisy = (h[380:] + 1.5 * rng.standard_normal(h[380:].shape)).astype(np.float32)
    pairs = inverter.Pairs(h[:380], tokens[:380])
    start = inverter.Discriminant(pairs, VOCAB, 1.5)
    monkeypatch.setattr(learned, "RATE", 1e-2)  # of a network as small as this one
    alone = (start.likeliest(noisy)[0][..., 0] == tokens[380:]).mean()
    found = (learned.read_by_transformer(CONFIG, pairs, start, noisy, 1.5)[..., 0] == tokens[380:]).mean()
    assert 0.1 < alone < found - 0.04


def test_known_words_help_to_solve_a_cipher():
    """Text of little company: alone it tells few words, and with the words of some groups known most others."""
    rng = np.random.default_rng(0)
    chain = rng.dirichlet(np.full(400, 0.02), 400)

    def text(rows):
        found = np.empty((rows, 40), int)
        found[:, 0] = rng.integers(0, 400, rows)
        for t in range(1, 40):
            found[:, t] = [rng.choice(400, p=chain[w]) for w in found[:, t - 1]]
        return found

    theirs, public = text(150), text(150)
    name = rng.permutation(400)  # of each group, its word
    groups = np.argsort(name)[theirs]
    alone = cipher.solve(groups, public, 400)[groups][..., 0] == theirs
    few = np.where(np.arange(400) % 20 == 0, name, -1)  # the graph's matching begins, and leaves them alone
    found = cipher.solve(groups, public, 400, few)[groups][..., 0]
    assert (found == theirs)[few[groups] >= 0].all() and not np.isin(found[few[groups] < 0], few[few >= 0]).any()
    told = np.where(np.arange(400) % 3 == 0, name, -1)
    helped = cipher.solve(groups, public, 400, told)[groups][..., 0] == theirs
    unknown = told[groups] < 0
    assert helped[~unknown].all() and helped[unknown].mean() > alone[unknown].mean() + 0.1


def test_known_text_names_groups(bert, h, blocks):
    view = view_of(bert, h)
    groups, geometry = view.log.groups, view.log.geometry
    where = np.zeros(blocks.shape, bool)
    where[:3, 1:5] = True
    found = known.words_of(groups, geometry, Known(h[:6], blocks[:6], where[:6]))
    of = groups.nearest(geometry.centred(h))
    assert set(found[found >= 0]) == set(blocks[where]) and (found[of[where]] == blocks[where]).all()


def test_a_transformer_begins_as_the_discriminant_and_gets_no_worse(bert, h, blocks):
    rng = np.random.default_rng(1)
    pairs = inverter.Pairs(h[:30], blocks[:30])
    noisy = (h[30:] + 0.7 * rng.standard_normal(h[30:].shape)).astype(np.float32)
    start = inverter.Discriminant(pairs, VOCAB, 0.7)
    before = (start.likeliest(noisy)[0][..., 0] == blocks[30:]).mean()
    after = (learned.read_by_transformer(CONFIG, pairs, start, noisy, 0.7)[..., 0] == blocks[30:]).mean()
    assert after > before - 0.08 and after > 0.2


def test_bigrams_are_probabilities():
    public = np.random.default_rng(0).integers(0, 9, (30, 10))
    bigrams = decoder.Bigrams(public, 9)
    np.testing.assert_allclose(np.exp(bigrams.log_prior).sum(), 1)
    for first in range(9):
        np.testing.assert_allclose(np.exp(bigrams.after(np.full(9, first), np.arange(9))).sum(), 1, rtol=0.06)


def test_decoding_is_what_adding_up_all_sentences_gives():
    rng = np.random.default_rng(0)
    bigrams = decoder.Bigrams(rng.integers(0, 6, (40, 10)), 6)
    ids, scores = np.sort(rng.permuted(np.tile(np.arange(6), (4, 1)), axis=1)[:, :5])[None], rng.standard_normal((1, 4, 5))
    chance = np.zeros((4, 5))
    for path in itertools.product(range(5), repeat=4):
        words_ = [ids[0, t, c] for t, c in enumerate(path)]
        log = bigrams.log_prior[words_[0]] + sum(scores[0, t, c] for t, c in enumerate(path))
        log += sum(bigrams.after(np.array(a), np.array(b)) for a, b in itertools.pairwise(words_))
        for t, c in enumerate(path):
            chance[t, c] += np.exp(log)
    expected = np.take_along_axis(ids[0], np.argsort(-chance, axis=1), axis=1)
    np.testing.assert_array_equal(decoder.decode(ids, scores, bigrams)[0], expected)


def test_blocks_are_decoded_one_by_one():
    rng = np.random.default_rng(0)
    bigrams, few = decoder.Bigrams(rng.integers(0, 6, (40, 10)), 6), decoder.AT_ONCE + 3
    ids = np.sort(rng.permuted(np.tile(np.arange(6), (few, 4, 1)), axis=2)[..., :5])
    scores = rng.standard_normal(ids.shape)
    alone = [decoder.likelihoods(ids[i : i + 1], scores[i : i + 1], bigrams)[0] for i in range(few)]
    np.testing.assert_allclose(decoder.likelihoods(ids, scores, bigrams), alone)


def test_a_word_is_likelier_where_the_rest_of_its_block_has_it():
    bigrams = decoder.Bigrams(np.arange(8).reshape(1, 8), 8)  # all words are as frequent
    ids = np.array([[[1, 2], [3, 1], [1, 5]]])
    chance = np.array([[[0.75, 0.25], [0.5, 0.5], [0.0, 0.0]]])  # nothing is known of the third
    share = np.array([[[0.25, 0.0], [0.0, 0.375], [0.625, 0.0]]])  # of two tokens that something is known of
    expected = np.log(1 - decoder.AGAIN + decoder.AGAIN * share * 8)
    np.testing.assert_allclose(decoder.repeated(ids, chance, bigrams), expected)


def test_decoding_reads_noisy_rows_at_least_as_well_as_single_rows(bert, h, blocks):
    rng = np.random.default_rng(1)
    noisy = (h + 0.6 * rng.standard_normal(h.shape)).astype(np.float32)
    view = view_of(bert, noisy, segment=bert[1], text=blocks, noise=0.6)
    near, whole = (share(attack(name).guess(view), blocks) for name in ("nearest", "decoded"))
    assert 0.2 < near < 0.98 and whole > near - 0.05


def test_frequencies_count_once_behind_a_layer(bert, monkeypatch):
    """What is decoded are the likelihoods of rows: a word's frequency is the decoder's to add."""
    segments = make_segments(dataclasses.replace(CONFIG, client_layers=1))
    client, server = segments.init(jax.random.key(1), jax.random.key(2))
    rng = np.random.default_rng(0)
    text = 5 + np.minimum(rng.geometric(0.1, (400, LENGTH)) - 1, VOCAB - 6)  # some words are far more frequent than others
    h = np.asarray(segments.embed(client, MaskedBatch(*[jnp.asarray(text[:6])] * 4)))
    view = dataclasses.replace(view_of((segments, client, server), h, noise=2.0), segment=client, text=text)
    given = []
    monkeypatch.setattr(decoder, "decode", lambda ids, scores, bigrams: given.append((ids, scores)) or ids[..., :5])
    attack("decoded").guess(view)
    (ids, scores), pairs = given[0], inverter.embedded(
        segments, client, text, np.arange(5, VOCAB), 4, 3, LENGTH, clip=None
    )  # fmt: skip
    plain = inverter.Discriminant(pairs, VOCAB, 2.0)  # without frequencies
    of = np.take_along_axis((h - plain.places) @ plain.directions.T + plain.bias, ids, axis=-1)
    seen = of > -1e8
    np.testing.assert_allclose((scores - of)[seen], 0, atol=1e-3)


def test_what_the_model_predicts_is_read_through_more_noise(bert, monkeypatch):
    """A model that knows the word of each place: through noise more is read with what it says than without."""
    rng, (segments, client, _) = np.random.default_rng(0), bert
    words_at = rng.integers(5, VOCAB, LENGTH)
    tokens = np.tile(words_at, (40, 1))
    exact = np.asarray(segments.embed(client, MaskedBatch(*[jnp.asarray(tokens)] * 4)))
    noisy = (exact + 1.5 * rng.standard_normal(exact.shape)).astype(np.float32)
    knows = segments._replace(
        transform=lambda body, h, places: jnp.broadcast_to(places[..., None], (*places.shape, h.shape[-1])),
        predict=lambda params, z: 4.0 * jax.nn.one_hot(jnp.asarray(words_at)[z[..., 0]], VOCAB),
    )
    view = view_of((knows, *bert[1:]), noisy, segment=client, text=rng.integers(5, VOCAB, (60, LENGTH)), noise=1.5)
    monkeypatch.setattr(decoder, "AGAIN", 0.0)
    read = share(attack("decoded").guess(view), tokens)
    monkeypatch.setattr(decoder, "HALF", 0.0)
    assert read > share(attack("decoded").guess(view), tokens) + 0.1


def test_words_that_come_again_in_a_block_are_read_through_more_noise(bert, monkeypatch):
    rng, (segments, client, _) = np.random.default_rng(0), bert
    tokens = np.stack([rng.choice(rng.choice(np.arange(5, VOCAB), 2, replace=False), LENGTH) for _ in range(60)])
    exact = np.asarray(segments.embed(client, MaskedBatch(*[jnp.asarray(tokens)] * 4)))
    noisy = (exact + 0.8 * rng.standard_normal(exact.shape)).astype(np.float32)
    view = view_of(bert, noisy, segment=client, text=rng.integers(5, VOCAB, (60, LENGTH)), noise=0.8)
    read = share(attack("decoded").guess(view), tokens)
    monkeypatch.setattr(decoder, "AGAIN", 0.0)
    assert read > share(attack("decoded").guess(view), tokens) + 0.03


# --- words, scores, views -----------------------------------------------------------------------------------------------


def test_an_auc_is_sklearns():
    rng = np.random.default_rng(0)
    truth, scores = rng.random(50) < 0.3, rng.integers(0, 6, 50).astype(float)
    assert words.auc(scores, truth) == pytest.approx(roc_auc_score(truth, scores))


def test_a_guess_is_over_rare_words_and_the_mean_over_clients():
    rng = np.random.default_rng(0)
    frequencies = np.arange(1, 41) / np.arange(1, 41).sum()
    held, sizes = rng.random((3, 40)) < 0.4, rng.random((3, 40))
    found = words.guess(Aggregate({"gradient": sizes}, held), "gradient", frequencies)
    rare, numbers = frequencies <= np.quantile(frequencies, 0.5), words.beside_others(sizes)
    aucs = [roc_auc_score(mine[rare], x[rare]) for mine, x in zip(held, numbers, strict=True)]
    assert (found.auc, found.low, found.high) == pytest.approx((np.mean(aucs), min(aucs), max(aucs)))
    assert found.floor == pytest.approx(np.mean([roc_auc_score(mine[rare], frequencies[rare]) for mine in held]))
    assert found.clients == 3 and words.guess(Aggregate({"gradient": sizes}, held * False), "gradient", frequencies) is None
    assert words.attacks(Aggregate({"move": sizes[..., None]}, held)) == ["move", "difference", "direction"]


@pytest.mark.parametrize("clients", [2, 3, 4, 7])
def test_the_median_over_the_others(clients):
    x = np.random.default_rng(0).integers(0, 5, (clients, 30, 2)).astype(float)  # with equal numbers
    expected = [np.median(np.delete(x, c, axis=0), axis=0) for c in range(clients)]
    np.testing.assert_array_equal(words.others_median(x), expected)


def told(attack: str, seen: np.ndarray, held: np.ndarray) -> float:
    """The AUC of an attack on what is seen of words that are all as frequent."""
    view, _ = words.ATTACKS[attack]
    return words.guess(Aggregate({view: seen}, held), attack, np.full(held.shape[1], 1 / held.shape[1])).auc


@pytest.mark.parametrize("attack", ["gradient", "move"])
def test_words_are_told_by_size_where_some_move_more_than_others_at_all_clients(attack):
    """Also where several clients have a word, and where what is seen of the others is next to nothing, and noisy."""
    rng = np.random.default_rng(0)
    common, held = 10 ** rng.uniform(-4, 0, 400), rng.random((8, 400)) < 0.1
    sizes = common * 10 ** rng.normal(0, 0.4, (8, 400)) + held * rng.uniform(0.3, 1, (8, 400))
    seen = sizes if attack == "gradient" else sizes[..., None] * np.array([0.6, 0.8])
    assert told(attack, seen, held) > 0.955  # .945 without `LITTLE`


@pytest.mark.parametrize(("attack", "other"), [("difference", "direction"), ("direction", "difference")])
def test_words_are_told_by_where_their_rows_go_where_all_go_as_far(attack, other):
    rng = np.random.default_rng(0)
    held = rng.random((8, 300)) < 0.1
    if attack == "difference":  # each word has a way of its own, which its rows take at whoever lacks it
        ways, apart = np.broadcast_to(10 * rng.standard_normal((300, 16)), (8, 300, 16)), 10
    else:  # each client has one, more or less
        ways, apart = 3 * rng.standard_normal((8, 1, 16)) + rng.standard_normal((8, 300, 16)), 4
    ways = ways + rng.standard_normal((8, 300, 16)) + apart * held[..., None] * rng.standard_normal((8, 300, 16))
    moves = ways / np.linalg.norm(ways, axis=-1, keepdims=True)
    assert told(attack, moves, held) > 0.99 and told(other, moves, held) < 0.9
    assert 0.4 < told("move", moves, held) < 0.6


def test_a_score_by_hand():
    truth = np.array([[1, 2, 3, 1], [1, 1, 2, 2]])
    where = np.array([[True, True, True, False], [True, True, False, False]])
    first = np.array([[1, 2, 9, 1], [1, 1, 9, 9]])
    guesses = np.stack([first, np.full_like(first, 3), *[np.full_like(first, 8)] * 3], axis=-1)
    frequencies = np.array([0, 0.5, 0.25, 0.25])
    found = score(guesses, truth, where, frequencies)
    assert found.top1 == 0.8 and found.top5 == 1.0 and found.exact == 0.5 and found.tokens == 5
    assert found.low <= 2 / 3 and found.high == 1.0  # of the first block alone, of the second alone
    # Alone: (3 * 1 + 2 * 2) / 5 = 1.4 bits. With guesses: whether the first or the second is right.
    assert found.bits == pytest.approx(1.4 + 0.8 * np.log2(0.8) + 0.2 * np.log2(0.2))
    floor = floors(truth, where, frequencies, 3)
    assert floor == (1 / 3, 0.6, 1.0)


def test_shuffled_truth_gives_the_floor(bert, h, blocks):
    guesses = attack("nearest").guess(view_of(bert, h, segment=bert[1]))
    wrong = np.roll(blocks, 1, axis=0)
    frequencies = np.bincount(blocks.ravel(), minlength=VOCAB) * (np.arange(VOCAB) > 4)
    frequencies = frequencies / frequencies.sum()
    found, floor = score(guesses, wrong, wrong > 4, frequencies), floors(wrong, wrong > 4, frequencies, VOCAB - 5)
    assert found.top1 < floor.unigram + 0.03 and found.bits < 0.3


def test_a_view_holds_no_token_of_what_is_read():
    """An attack is given a view and nothing else; what of it may be tokens is text that is known or public."""
    fields = {f.name for f in dataclasses.fields(View)}
    assert fields == {"public", "messages", "log", "body", "segment", "known", "text", "others", "answers"}
    assert set(Messages._fields) & set(Truth._fields) == set()
    assert set(Messages._fields) == {"h", "client", "positions", "z", "dz", "lengths"}


def test_every_attack_has_a_kind_of_knowledge():
    assert {kind for a in ATTACKS for kind in a.knows} | {"aggregator", "neighbour"} == set(KINDS)


def test_best_is_a_sort_and_distinct_rows_are_told_apart():
    rng = np.random.default_rng(0)
    q, of, bias = rng.standard_normal((2, 3, 5)), rng.standard_normal((7, 5)), rng.standard_normal(7)
    ids, values = best(q, of, 3, bias)
    scores = q @ of.T + bias
    np.testing.assert_array_equal(ids, np.argsort(-scores, axis=-1)[..., :3])
    np.testing.assert_allclose(values, -np.sort(-scores, axis=-1)[..., :3], rtol=1e-6)
    x = np.zeros((3, 2, 8), np.float32)
    x[2, 1] = 1
    where = np.array([[True, True], [True, False], [False, True]])
    rows, which = distinct(x, where)
    assert len(rows) == 3 and which.tolist() == [[0, 1], [0, -1], [-1, 2]]
    np.testing.assert_allclose(np.linalg.norm(unit(q), axis=-1), 1, rtol=1e-6)

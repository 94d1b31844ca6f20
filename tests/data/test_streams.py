"""Streams of random numbers: what each is a function of, that no two share a number, and that draws stay as they are."""

from __future__ import annotations

import itertools

import draws
import jax
import numpy as np
import pytest
from tiny import tiny_config

from fedbert_jax.data import streams
from fedbert_jax.data.streams import Secrets, Seeds, Stream, generator, key, secrets

STREAMS = {
    "BODY": (1, "server", ()),
    "BODY_DROPOUT": (2, "server", ("round", "step", "client")),
    "COHORT": (3, "server", ("round",)),
    "ORDER": (4, "server", ("round",)),
    "DEAL": (5, "server", ()),
    "EVALUATED": (6, "server", ()),
    "DP_NOISE": (7, "server", ("round",)),
    "SEGMENT": (16, "client", ()),
    "SEGMENT_DROPOUT": (17, "client", ("round", "step", "client")),
    "MASK": (18, "client", ("round", "step", "client")),
    "BLOCKS": (19, "client", ("client", "epoch")),
    "HOLD_OUT": (20, "client", ("client",)),
    "SCORED_BLOCKS": (21, "client", ("client",)),
    "EVAL_MASK": (22, "client", ("client", "block")),
    "EXAMPLES": (23, "client", ("client", "epoch")),
    "TASK_HOLD_OUT": (24, "client", ()),
    "NOISE": (25, "client", ("round", "step", "client")),
    "EVAL_NOISE": (26, "client", ("round", "client", "batch")),
}
SOME = (0, 1, 2, 10, 11)  # as numbers of a stream
ODD = (0, 1, -1, 3, 31, 2**32, 2**64 + 1, -(2**70), 10**30)  # as seeds


def first(*args) -> int:
    return int(generator(*args).integers(2**62))


def data_of(of: jax.Array) -> tuple[int, ...]:
    return tuple(np.asarray(jax.random.key_data(of)).tolist())


def names(stream: Stream, numbers=SOME):
    return itertools.product(numbers, repeat=len(stream.numbers))


def test_a_streams_tag_party_and_numbers_stay_as_they_are():
    """A new stream has to be entered above; changing an existing one would change every run's draws."""
    assert {s.name: (s.tag, s.party, s.numbers) for s in Stream} == STREAMS
    assert len({s.tag for s in Stream}) == len(STREAMS)


def test_draws_stay_as_they_are():
    """An existing workdir goes on with the same draws."""
    assert generator(Seeds(0, 5), Stream.COHORT, 7).integers(1000, size=4).tolist() == [243, 719, 159, 169]
    assert generator(Seeds(5, 0), Stream.BLOCKS, 3, 2).permutation(8).tolist() == [3, 0, 1, 6, 7, 4, 5, 2]
    assert data_of(secrets(Seeds(0, 0)).server) == (756665463, 2579824915)
    assert data_of(secrets(Seeds(0, 0)).client) == (2422064907, 1929674191)
    assert data_of(key(secrets(Seeds(1, 2)), Stream.MASK, 3, 4, 5)) == (1001177582, 2914434310)
    assert data_of(key(secrets(Seeds(1, 2)), Stream.BODY)) == (676079823, 1397549080)


@pytest.mark.parametrize("stream", Stream, ids=lambda s: s.name)
def test_a_draw_is_its_definitions(stream):
    tag, party, numbers = STREAMS[stream.name]
    given = (3, 0, 12)[: len(numbers)]
    seeds = Seeds(-7, 2**40)
    seed = -7 if party == "server" else 2**40
    expected = draws.generator(party, seed, tag, *given).integers(2**62)
    assert first(seeds, stream, *given) == expected
    assert first(seeds, stream, *map(np.int32, given)) == expected  # numpy's numbers count as numbers, too
    expected = data_of(draws.key(party, seed, tag, *given))
    assert data_of(key(secrets(seeds), stream, *given)) == expected
    assert data_of(jax.jit(lambda of, *n: key(of, stream, *n))(secrets(seeds), *given)) == expected


def test_no_two_generators_share_a_number():
    """Among them are those that once did: HOLD_OUT of client c and ORDER of round c, `[seed, 1]` and `[seed, 1, 0]`."""
    drawn = [first(Seeds(seed, seed), s, *n) for s in Stream for n in names(s) for seed in (0, 1, 11)]
    assert len(set(drawn)) == len(drawn) > 1000


def test_any_whole_numbers_are_seeds_of_their_own():
    for stream in (Stream.COHORT, Stream.HOLD_OUT):
        drawn = {first(Seeds(seed, seed), stream, n) for seed in ODD for n in SOME}
        assert len(drawn) == len(ODD) * len(SOME)
    keys = {data_of(k) for seed in ODD for k in secrets(Seeds(seed, seed))}
    assert len(keys) == 2 * len(ODD)  # nor do the two parties share one


def test_no_two_keys_are_equal_nor_what_becomes_of_them():
    """Whoever draws folds or splits a key, and `split(key)[i]` is `fold_in(key, i)`."""
    of = secrets(Seeds(0, 0))
    keys = [key(of, s, *n) for s in Stream for n in names(s, (0, 1, 2))]
    stack = jax.numpy.stack([*keys, *of])
    below = jax.vmap(lambda k: jax.random.split(k, 3))(stack[: len(keys)]).reshape(-1)
    data = np.asarray(jax.random.key_data(jax.numpy.concatenate([stack, below])))
    assert len(np.unique(data, axis=0)) == len(data) > 400
    assert data_of(jax.random.split(of.client, 3)[1]) == data_of(jax.random.fold_in(of.client, 1))  # as stated above


@pytest.mark.parametrize("stream", Stream, ids=lambda s: s.name)
def test_a_partys_draws_follow_from_its_own_secret_alone(stream):
    numbers = (1,) * len(stream.numbers)
    own, other = (Seeds(9, 4), Seeds(4, 9)) if stream.party == "server" else (Seeds(4, 9), Seeds(9, 4))
    both = Seeds(9, 9)
    assert first(own, stream, *numbers) == first(both, stream, *numbers) != first(other, stream, *numbers)
    drawn = [data_of(key(secrets(seeds), stream, *numbers)) for seeds in (own, both, other)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert both.of(stream.party) == 9 and own.of(stream.party) == 9 and other.of(stream.party) == 4


def test_a_run_has_one_number_for_both_parties_unless_the_clients_have_theirs():
    assert streams.seeds_of(tiny_config(seed=17)) == Seeds(server=17, client=17)
    for given in (4, 0, 10**30):
        assert streams.seeds_of(tiny_config(seed=17, privacy=dict(client_seed=given))) == Seeds(server=17, client=given)
    assert Seeds._fields == Secrets._fields == ("server", "client")


@pytest.mark.parametrize("numbers", [(), (1,), (1, 2, 3)])
def test_a_stream_takes_as_many_numbers_as_it_has(numbers):
    with pytest.raises(ValueError, match=r"BLOCKS is a function of \('client', 'epoch'\)"):
        generator(Seeds(0, 0), Stream.BLOCKS, *numbers)
    with pytest.raises(ValueError, match=f"was given {len(numbers)} numbers"):
        key(secrets(Seeds(0, 0)), Stream.BLOCKS, *numbers)

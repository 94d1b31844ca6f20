"""Masking: exactly M positions, 80/10/10, never a special token, and with whole words never a part of one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedbert_jax.data.masking import MaskSpec, mask_blocks, num_masked

V, T, M = 1000, 64, 10
SPECIAL = (0, 1, 2, 3, 4)
CONTINUES = np.arange(V) % 3 == 0
CONTINUES[:5] = False

mask = jax.jit(mask_blocks, static_argnums=(2, 3))


class Hashed(MaskSpec):
    """A spec that jit accepts as static although it holds an array."""

    def __hash__(self):
        return hash(self[:4])

    def __eq__(self, other):
        return self is other


TOKENS = Hashed(M, V, 4, SPECIAL, None)
WORDS = Hashed(M, V, 4, SPECIAL, CONTINUES)


def blocks(rows=400, seed=0):
    tokens = np.random.default_rng(seed).integers(5, V, (rows, T))
    tokens[:, 0], tokens[:, 20] = 2, 3
    return jnp.asarray(tokens, jnp.uint16)


def test_exactly_m_positions_and_no_special_token():
    tokens = blocks()
    out = mask(jax.random.key(0), tokens, TOKENS)
    assert out.positions.shape == (400, M)
    assert np.all(np.diff(out.positions, axis=1) > 0)  # ascending, so distinct
    assert np.all(out.weights == 1)
    assert np.array_equal(out.labels, np.take_along_axis(np.asarray(tokens, np.int32), np.asarray(out.positions), 1))
    assert not np.isin(out.labels, SPECIAL).any()
    changed = np.asarray(out.tokens) != np.asarray(tokens)
    places = np.zeros_like(changed)
    np.put_along_axis(places, np.asarray(out.positions), True, 1)
    assert not np.any(changed & ~places)


def test_positions_chosen_by_sorting_are_the_same_where_draws_are_equal_too():
    tokens = blocks().at[:50, 3:60].set(0)  # rows with fewer than M to mask: the others' draws are all equal
    for spec in (TOKENS, WORDS):
        sorting = Hashed(*spec[:5], True)
        for a, b in zip(*(mask(jax.random.key(0), tokens, s)[:4] for s in (spec, sorting)), strict=True):
            assert np.array_equal(a, b)


def test_with_hide_all_every_chosen_position_is_the_mask_token():
    tokens = blocks()
    out, usual = (mask(jax.random.key(0), tokens, TOKENS, hide_all) for hide_all in (True, False))
    for a, b in zip(out[1:4], usual[1:4], strict=True):  # the same positions, labels and weights
        assert np.array_equal(a, b)
    expected = np.array(tokens, np.int32)
    np.put_along_axis(expected, np.asarray(out.positions), 4, 1)
    assert np.array_equal(out.tokens, expected)


@pytest.mark.parametrize(
    "mask_prob, length, expected",
    [(0.07, 100, 7), (0.15, 128, 20), (0.15, 100, 15), (0.1, 30, 3), (1e-3, 12, 1), (1.0, 8, 8)],
)
def test_how_many_are_masked_is_reckoned_in_decimals(mask_prob, length, expected):
    assert num_masked(mask_prob, length) == expected


def test_every_position_is_as_likely():
    counts = np.bincount(np.asarray(mask(jax.random.key(0), blocks(4000), TOKENS).positions).ravel(), minlength=T)
    assert counts[0] == counts[20] == 0
    others = np.delete(counts, [0, 20])
    expected = 4000 * M / (T - 2)
    assert ((others - expected) ** 2 / expected).sum() < 110  # chi-squared with 61 degrees of freedom, p about 1e-4


def test_80_10_10():
    out = mask(jax.random.key(1), blocks(4000), TOKENS)
    now = np.take_along_axis(np.asarray(out.tokens), np.asarray(out.positions), 1)
    n = now.size
    assert abs((now == 4).mean() - 0.8) < 4 * np.sqrt(0.16 / n) + 1 / V
    assert abs((now == np.asarray(out.labels)).mean() - 0.1) < 4 * np.sqrt(0.09 / n) + 1 / V
    random = now[(now != 4) & (now != np.asarray(out.labels))]
    assert random.min() < 20 and random.max() > V - 20


def test_a_block_with_little_to_mask_is_padded_with_weight_0():
    tokens = np.full((1, T), 3)
    tokens[0, 7:11] = [100, 101, 102, 103]
    out = mask(jax.random.key(0), jnp.asarray(tokens), TOKENS)
    assert out.weights.sum() == 4
    assert set(np.asarray(out.positions)[np.asarray(out.weights) == 1]) == {7, 8, 9, 10}
    assert np.all(np.asarray(out.tokens)[0, :7] == 3) and np.all(np.asarray(out.tokens)[0, 11:] == 3)


def test_whole_words_are_masked_whole_or_not_at_all():
    tokens = np.asarray(blocks(300, seed=3), np.int32)
    out = mask(jax.random.key(2), jnp.asarray(tokens), WORDS)
    counted = 0
    for row in range(300):
        chosen = set(np.asarray(out.positions[row])[np.asarray(out.weights[row]) == 1].tolist())
        counted += len(chosen)
        assert len(chosen) <= M
        words, begins = [], True
        for place, token in enumerate(tokens[row]):
            if token in SPECIAL:
                begins = True
                continue
            if begins or not CONTINUES[token]:
                words.append([])
            begins = False
            words[-1].append(place)
        for word in words:
            assert len(chosen & set(word)) in (0, len(word))
    assert counted > 300 * (M - 1.5)  # the word that no longer fits is short


def test_a_draw_depends_on_its_key_alone():
    one, again = (mask(jax.random.key(5), blocks(), TOKENS) for _ in range(2))
    other = mask(jax.random.key(6), blocks(), TOKENS)
    assert np.array_equal(one.tokens, again.tokens)
    assert not np.array_equal(one.positions, other.positions)


@pytest.mark.parametrize("prob, length, expected", [(0.15, 128, 20), (0.15, 512, 77), (0.25, 12, 3)])
def test_m_is_rounded_up(prob, length, expected):
    assert num_masked(prob, length) == expected

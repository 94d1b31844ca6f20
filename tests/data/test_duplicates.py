"""No paragraph and no window of tokens is left twice, and text that repeats nothing is left as it was."""

from __future__ import annotations

import numpy as np
import pytest

from fedbert_jax.data import duplicates, repeats
from fedbert_jax.data.duplicates import WINDOW, Paragraphs, kept_spans

# --- paragraphs ---


def without_repeats(texts: list[str], groups: list[int] | None = None, chosen: list[bool] | None = None) -> list[str]:
    """Returns what is left of each text, and checks the counts of its words."""
    paragraphs = Paragraphs()
    for text in texts:
        paragraphs.add(text)
    taken = np.ones(len(texts), bool) if chosen is None else np.array(chosen)
    repeats = paragraphs.repeats(taken, None if groups is None else np.array(groups), None)
    found = [repeats.left(n, text) for n, text in enumerate(texts)]
    assert paragraphs.words.tolist() == [len(text.split()) for text in texts]
    assert repeats.words.tolist() == [len(text.split()) for text in found]
    assert (repeats.words + repeats.dropped).tolist() == paragraphs.words.tolist()
    return found


def test_a_paragraph_seen_before_is_dropped_wherever_it_was() -> None:
    texts = ["Alpha  beta\n\ngamma", "delta\n \nalpha\nBETA", "GAMMA\n\n\n\nalpha beta", "alpha beta delta"]
    assert without_repeats(texts) == ["Alpha  beta\n\ngamma", "delta", "", "alpha beta delta"]


def test_a_text_that_repeats_nothing_is_the_same_object() -> None:
    texts = ["one\n\n\n\ntwo\n", "", "\n\n", "three"]
    assert all(a is b for a, b in zip(texts, without_repeats(texts), strict=True))


def test_only_the_same_group_and_documents_that_take_part_are_compared() -> None:
    texts = ["one\n\ntwo", "one\n\nthree", "two\n\nthree\n\nthree"]
    assert without_repeats(texts, [0, 1, 1]) == ["one\n\ntwo", "one\n\nthree", "two"]
    assert without_repeats(texts, chosen=[False, True, True]) == ["one\n\ntwo", "one\n\nthree", "two"]
    assert without_repeats(texts, [1, 0, 1], [True, True, True]) == [texts[0], texts[1], "three"]


def test_a_long_paragraph_is_compared_like_a_short_one(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["a b\tc\u3000d\x1c e ", "A  b c d e", "a b c d f"]
    expected = [texts[0], "", texts[2]]
    assert without_repeats(texts) == expected
    monkeypatch.setattr(duplicates, "_LONG", 3)
    assert without_repeats(texts) == expected


# --- windows of tokens ---


def left(documents: list[np.ndarray]) -> list[list[list[int]]]:
    """Returns the pieces that are left of each document."""
    ends = np.cumsum([len(d) for d in documents])
    tokens = np.concatenate(documents).astype(np.uint16)
    pieces: list[list[list[int]]] = [[] for _ in documents]
    for document, first, last in kept_spans(tokens, ends):
        pieces[document].append(tokens[first:last].tolist())
    return pieces


def left_by_hand(documents: list[np.ndarray]) -> list[list[list[int]]]:
    """Computes the same as `left`, one window at a time."""
    seen: set[tuple[int, ...]] = set()
    result = []
    for document in documents:
        tokens = document.tolist()
        gone = [False] * len(tokens)
        for start in range(len(tokens) - 31):
            window = tuple(tokens[start : start + 32])
            if window in seen:
                gone[start : start + 32] = [True] * 32
            seen.add(window)
        pieces: list[list[int]] = [[]]
        for token, dropped in zip(tokens, gone, strict=True):
            if dropped:
                pieces.append([])
            else:
                pieces[-1].append(token)
        result.append([p for p in pieces if len(p) >= 32 or (p and not any(gone))])
    return result


def documents(seed: int) -> list[np.ndarray]:
    """Makes documents from stretches that others have, too, runs of one token, and text of their own; some are empty."""
    rng = np.random.default_rng(seed)
    shared = rng.integers(5, 40, 1500)
    made = []
    for _ in range(50):
        parts = [np.zeros(0, np.int64)]
        for _ in range(rng.integers(0, 5)):
            length = rng.integers(1, 100)
            start = rng.integers(0, 1400)
            kinds = shared[start : start + length], rng.integers(5, 40, length), np.full(length, 7)
            parts.append(kinds[rng.choice(3, p=(0.5, 0.4, 0.1))])
        made.append(np.concatenate(parts))
    return made


@pytest.mark.parametrize("seed", range(6))
def test_windows_against_a_plain_loop(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = documents(seed)
    expected = left_by_hand(given)
    assert 0.1 < sum(len(piece) for pieces in expected for piece in pieces) / sum(map(len, given)) < 0.9
    assert left(given) == expected
    monkeypatch.setattr(duplicates, "_CHUNK", 50)  # hashed and sorted in many parts
    monkeypatch.setattr(repeats, "_TOGETHER", 300)
    assert left(given) == expected


def test_only_what_repeats_is_left_out() -> None:
    rng = np.random.default_rng(0)
    text = rng.integers(5, 1000, 400)
    near = text.copy()
    near[200] = 1001  # a near-duplicate, which differs in one word
    own = rng.integers(5, 1000, 50)
    mixed = np.concatenate([own, text[100:160], own[:20], text[300:350], rng.integers(5, 1000, 40)])
    whole, none, pieces = left([text, near, mixed])
    assert whole == [text.tolist()]
    assert none == []  # all but its own word repeats, and that alone is too short
    assert pieces == [own.tolist(), mixed[-40:].tolist()]  # the 20 tokens between two cuts are dropped


def test_windows_end_with_their_document() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.integers(5, 1000, (2, WINDOW - 1))
    assert left([a, b, a, b]) == [[a.tolist()], [b.tolist()]] * 2  # a and b follow one another, but within no document
    both = np.concatenate([a, b])
    assert left([both, a, both]) == [[both.tolist()], [a.tolist()], []]


def test_windows_of_other_groups_are_others() -> None:
    text = np.random.default_rng(4).integers(5, 1000, 60)
    tokens, ends = np.tile(text, 4), 60 * np.arange(1, 5)
    assert kept_spans(tokens, ends, groups=np.array([0, 1, 0, 2])).tolist() == [[0, 0, 60], [1, 60, 120], [3, 180, 240]]


def test_a_run_of_one_token_collapses() -> None:
    assert left([np.full(WINDOW, 5), np.full(WINDOW, 6)]) == [[[5] * WINDOW], [[6] * WINDOW]]
    assert left([np.full(10_000, 5)]) == [[]]


def test_nothing_and_empty_documents() -> None:
    assert kept_spans(np.zeros(0, np.uint16), np.zeros(0, np.int64)).shape == (0, 3)
    assert kept_spans(np.arange(3), np.array([0, 0, 3, 3])).tolist() == [[2, 0, 3]]


def test_windows_that_differ_in_one_token_or_its_place_are_others() -> None:
    rng = np.random.default_rng(2)
    window = rng.integers(0, 3, WINDOW)
    others = [window]
    for i in range(WINDOW):
        other = window.copy()
        other[i] = 9
        others += [other, np.roll(window, i) if i else rng.integers(3, 6, WINDOW)]
    assert len({tuple(o) for o in others}) == len(others)
    assert [len(pieces) for pieces in left(others)] == [1] * len(others)

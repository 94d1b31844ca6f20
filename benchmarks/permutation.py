"""`python -m benchmarks.permutation DIR`: what it would hide if clients sent the rows of each block in a secret order.

Positions are embedded at the client, so a client could permute the rows of a block, anew each time, and the server's layers
would never know. The rows of a run are permuted here, and put in order again by whoever knows no text and no table: what a
row has beside its word says which rows of other blocks stand at the same place, and which place follows which is told by how
much the words at both have to do with one another. The cipher then reads them as usual.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_matrix

from fedbert_jax.audit import attacks, public
from fedbert_jax.audit.case import Case, Sizes
from fedbert_jax.audit.geometry import distinct, unit
from fedbert_jax.audit.source import open_source
from fedbert_jax.audit.views import Log, Messages

FREQUENT = 40  # groups of words by which places are compared; all others count as one
SWEEPS = 4
GROUPS = 100


def permuted(messages: Messages, rng: np.random.Generator) -> tuple[Messages, np.ndarray]:
    """Permutes the rows of each block; returns the messages, and where each row of theirs was, int [R, T]."""
    order = rng.permuted(np.broadcast_to(np.arange(messages.h.shape[1]), messages.h.shape[:2]), axis=1)
    where = np.argsort(order, axis=1)
    assert messages.positions is not None
    asked = np.sort(np.take_along_axis(where, messages.positions.astype(int), axis=1), axis=1)
    return messages._replace(h=np.take_along_axis(messages.h, order[..., None], axis=1), positions=asked), order


def masks(messages: Messages) -> np.ndarray:
    """Returns the T most frequent rows that are asked for, [T, D]: those of [MASK], one for each place."""
    assert messages.positions is not None
    rows = np.take_along_axis(messages.h, messages.positions.astype(int)[..., None], axis=1).reshape(
        -1, 1, messages.h.shape[2]
    )
    some, which = distinct(rows, np.ones(rows.shape[:2], bool))
    return some[np.argsort(-np.bincount(which.ravel()), kind="stable")[: messages.h.shape[1]]]


def places(h: np.ndarray, marks: np.ndarray) -> np.ndarray:
    """Returns at which place each row stands, int [R, T], numbered as `marks` [T, D] are: each place once in a block.

    A row is a word's part and a place's. Rows are grouped by direction, which the word decides; what is left without the
    mean of its group tells the place. Both parts are then estimated in turn.
    """
    h = h.astype(np.float32)
    flat = h.reshape(-1, h.shape[2])
    words = _grouped(unit(flat - flat.mean(axis=0)))
    at, rest = marks - marks.mean(axis=0), flat - _means(words, flat)[words]
    found = np.empty(h.shape[:2], np.int64)
    for _ in range(SWEEPS):
        directions = unit(at).T
        for n, rows in enumerate(rest.reshape(h.shape)):
            found[n] = linear_sum_assignment(-(unit(rows) @ directions))[1]
        at = _means(found.ravel(), rest)
        at = at - at.mean(axis=0)
        rest = flat - _means(words, flat - at[found.ravel()])[words]
    return found


def _means(of: np.ndarray, rows: np.ndarray) -> np.ndarray:
    sums = csr_matrix((np.ones(len(of), np.float32), (of, np.arange(len(of))))) @ rows
    return np.asarray(sums / np.maximum(np.bincount(of), 1)[:, None])


def _grouped(directions: np.ndarray) -> np.ndarray:
    """Returns the group of each direction, by k-means on the sphere."""
    centres = directions[np.random.default_rng(1).choice(len(directions), GROUPS, replace=False)]
    parts = np.array_split(directions, len(directions) // 8192 + 1)
    for _ in range(8):
        of = np.concatenate([(part @ centres.T).argmax(axis=1) for part in parts])
        of = np.unique(of, return_inverse=True)[1]  # without the empty ones
        centres = unit(_means(of, directions))
    return of


def sorted_by(h: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Puts the rows of each block in the order of their places."""
    return np.take_along_axis(h, np.argsort(place, axis=1)[..., None], axis=1)


def following(words: np.ndarray, first: int) -> np.ndarray:
    """Returns the order in which places follow one another, by the words [R, T] that stand there; `first` is the first."""
    counts = np.bincount(words[words >= 0])
    common = np.full(len(counts) + 1, FREQUENT)
    common[np.argsort(-counts, kind="stable")[:FREQUENT]] = np.arange(FREQUENT)
    of = common[words]  # -1 is the last one: left out, and so one of the others
    hot = (of[..., None] == np.arange(FREQUENT)).astype(np.float32)
    hot = hot - hot.mean(axis=0)
    flat = hot.transpose(1, 2, 0).reshape(words.shape[1], FREQUENT, -1)
    near = np.zeros((words.shape[1],) * 2)
    for a in range(len(near)):
        together = np.einsum("ir,bjr->bij", flat[a], flat) / len(words)
        near[a] = np.sqrt((together**2).sum(axis=(1, 2)))
    np.fill_diagonal(near, -np.inf)
    order, left = [first], set(range(len(near))) - {first}
    while left:
        before = order[-1]
        order.append(max(left, key=lambda b: near[before, b]))
        left.remove(order[-1])
    return np.array(order)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.permutation", description=__doc__.splitlines()[0])
    parser.add_argument("workdir", type=Path, metavar="DIR", help="of a finished run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there, too")
    args = parser.parse_args()
    start, rng = time.monotonic(), np.random.default_rng(0)
    source = open_source(args.workdir, None, {})
    case = Case(source, Sizes(), public.default_source(source.config), print)
    log, order = permuted(case.log[0], rng)
    read, read_order = permuted(case.replay.messages, rng)
    truth = case.replay.truth

    marks = masks(log)
    place, read_place = np.split(places(np.concatenate([log.h, read.h]), marks), [len(log.h)])
    # How often the rows said to stand at a place really do, when each place is named as most of its rows would.
    names = np.stack([np.bincount(order[place == n], minlength=len(marks)) for n in range(len(marks))])
    told = names.max(axis=1).sum() / names.sum()

    there = lambda m, where: m._replace(  # noqa: E731
        h=sorted_by(m.h, where), positions=np.sort(np.take_along_axis(where, m.positions.astype(int), axis=1), axis=1)
    )
    view = case.view
    again = Log(there(log, place), view.log.noise, view.log.layers)
    alone = np.array([np.ptp(again.messages.h[:, n], axis=0).max() for n in range(len(marks))])
    following_ = following(again.groups.of, int(np.argmin(alone)))  # [CLS] is the same in every block
    true = names.argmax(axis=1)[following_]
    neighbours = (np.abs(np.diff(true)) == 1).mean()
    rank = np.argsort(following_)
    log, read = there(log, rank[place]), there(read, rank[read_place])
    guesses = attacks.by_public_text(replace(view, messages=read, log=Log(log, view.log.noise, view.log.layers)))[..., 0]
    mine = np.take_along_axis(read_order, np.argsort(rank[read_place], axis=1), axis=1)  # where each row really was
    right = guesses == np.take_along_axis(truth.tokens, mine, axis=1)
    text = np.take_along_axis(truth.text, mine, axis=1)
    results = {
        "rows at their place": float(told),
        "places next to the right one": float(neighbours),
        "tokens of rows, by the cipher": float(right[text].mean()),
        "tokens of text": int(text.sum()),
    }
    for name, value in results.items():
        print(f"{name}: {value:.1%}" if isinstance(value, float) else f"{name}: {value:,}")
    print(f"{args.workdir}, {len(log.h)} blocks logged; {time.monotonic() - start:.0f} s")
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()

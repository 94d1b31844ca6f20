"""`python -m benchmarks.limits DIR`: how far attacks that have no segment could get, if they guessed as well as can be.

The cipher names groups of rows: with each group called by its commonest word, so many tokens would be right. Labels are read
by a regression on guessed labels: fitted to the true labels of the blocks that aren't attacked, or of all, but each
time for the fifth of the positions that is judged, it reads so many.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.tables import markdown
from fedbert_jax import cli
from fedbert_jax.audit import public, regression
from fedbert_jax.audit.case import Case, Sizes
from fedbert_jax.audit.source import open_source
from fedbert_jax.errors import UserError


def named(groups: np.ndarray, tokens: np.ndarray) -> float:
    """Returns the share of rows that are right, if each group is called by its commonest word.

    Args:
      groups: which group each row is in, int [N].
      tokens: what each row is of, int [N].
    """
    pairs, counts = np.unique(np.stack([groups, tokens]), axis=1, return_counts=True)
    commonest = np.zeros(groups.max() + 1, int)
    np.maximum.at(commonest, pairs[0], counts)
    return float(commonest.sum() / len(groups))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.limits", description=__doc__)
    parser.add_argument("workdir", type=Path, metavar="DIR", help="of a finished run")
    parser.add_argument("--public", metavar="SOURCE", help="public text, as of an audit")
    args = parser.parse_args(arguments)
    source = open_source(args.workdir, None, {})
    text = public.default_source(source.config) if args.public is None else args.public
    case = Case(source, Sizes(), text, print)
    if case.text is None:
        raise UserError(f"{args.workdir}: there is no public text; accepted: --public SOURCE.")
    view, (_, log) = case.view, case.log
    of = view.log.groups.of
    where = log.text & (of >= 0)
    rows = [("tokens of the log", "each group called by its commonest word", named(of[where], log.tokens[where]))]
    asked = regression.ask(view)
    parts = [case.replay.truth, case.others[1]][: len(asked.where)]
    true = np.concatenate([part.labels[where] for part, where in zip(parts, asked.where, strict=True)])
    place = np.full(source.vocab_size, -1)
    place[asked.words] = np.arange(len(asked.words))
    labels, count = place[true], int(asked.where[0].sum())
    attacked = np.arange(len(labels)) < count
    chances = (labels[:, None] == np.arange(len(asked.words))).astype(np.float32)
    for what, some in (("of the blocks that aren't attacked", ~attacked), ("of all other positions", attacked | True)):
        weights = (some & (labels >= 0)).astype(float)
        if not weights.any():
            continue
        squares = regression.distances(asked, chances, weights)
        scores = regression.plausible(squares, asked.dz.shape[1]) + asked.beside
        right = float((scores[:count].argmax(axis=1) == labels[:count]).mean())
        rows.append(("labels", f"fitted to the true labels {what}", right))
    print(markdown(("of", "at best", "right"), [(*row[:2], f"{row[2]:.1%}") for row in rows]))
    print(
        f"{args.workdir}, the round after {source.round}: {count:,} labels; {int(where.sum()):,} tokens in the log, "
        f"of {len(np.unique(log.tokens[where])):,} words, in {len(np.unique(of[where])):,} groups."
    )


if __name__ == "__main__":
    cli.run(main)

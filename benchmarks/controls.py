"""`python -m benchmarks.controls DIR`: what an audit's attacks find where there is nothing to find.

With the initial tables of other seeds, a row's nearest word should be right as seldom as a word drawn at random; and what
the right segment makes of some blocks should fit the text of others only as often as frequent words do.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from benchmarks.tables import markdown
from fedbert_jax import cli
from fedbert_jax.audit import attacks
from fedbert_jax.audit.case import Case, Sizes
from fedbert_jax.audit.source import drawn, open_source
from fedbert_jax.errors import UserError

SEEDS = 3


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.controls", description=__doc__)
    parser.add_argument("workdir", type=Path, metavar="DIR", help="of a finished run that did not begin with a checkpoint")
    parser.add_argument("--blocks", type=int, default=Sizes.blocks, help="(default: %(default)s)")
    parser.add_argument("--log", type=int, default=Sizes.log, help="blocks before the round (default: %(default)s)")
    args = parser.parse_args(arguments)
    source = open_source(args.workdir, None, {})
    case = Case(source, Sizes(args.blocks, args.log), "", print)
    truth, seed = case.replay.truth, source.config.seed
    if isinstance(found := source.segments["seed"](), str):
        raise UserError(f"{args.workdir}: {found}; accepted: a run that began with random numbers.")

    def right(segment: object, attack: attacks.Attack, other: int = 0) -> float:
        guesses = attack.guess(dataclasses.replace(case.view, segment=jax.device_get(segment)))[..., 0]
        where = truth.text & np.roll(truth.text, other, axis=0)
        return float((guesses == np.roll(truth.tokens, other, axis=0))[where].mean())

    nearest, likeness = (attack for attack in attacks.ATTACKS if attack.name in ("nearest", "likeness"))
    if not nearest.works(case.view):
        raise UserError(f"{args.workdir}: accepted: a run with model.client_layers=0.")
    rows = []
    for n in range(SEEDS + 1):
        config = dataclasses.replace(source.config, seed=seed + n)
        whose = f"the initial table of seed {seed + n}" + ("" if n else ", the run's")
        rows += [
            (whose, attack.name, f"{right(drawn(config, source.setting), attack):.2%}") for attack in (nearest, likeness)
        ]
    half = len(truth.tokens) // 2
    if not isinstance(found := source.segments["segment"](), str):
        rows.append(("the segment", nearest.name, f"{right(found, nearest):.2%}"))
        rows.append(
            ("the segment, compared with the text of other blocks", nearest.name, f"{right(found, nearest, half):.2%}")
        )
    print(markdown(("who has", "attack", "tokens:"), rows))
    print(f"{args.workdir}, round {source.round}, {len(truth.tokens)} blocks; {1 / source.vocab_size:.2%} at random.")


if __name__ == "__main__":
    cli.run(main)

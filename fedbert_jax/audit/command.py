"""The command that audits a run.

    python -m fedbert_jax.audit DIR [--clients DIR,...] [--round N] [--knows KIND,...] [--attacks NAME,...] ...

It replays a round by the run's own functions, or takes what a federation's server has recorded, attacks what crossed, and
prints for every attack what it recovered, beside what guessing gives. It trains nothing of the run's, and gives the same
numbers when repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fedbert_jax import cli, disk
from fedbert_jax.audit import public, results, words
from fedbert_jax.audit.attacks import ATTACKS, KINDS, Attack
from fedbert_jax.audit.case import Case, Sizes
from fedbert_jax.audit.recorded import Recordings
from fedbert_jax.audit.results import Row
from fedbert_jax.audit.score import floors, score
from fedbert_jax.audit.source import open_source
from fedbert_jax.audit.tables import GUESSES
from fedbert_jax.config import from_text, listed
from fedbert_jax.console.output import make_console, print_table, shown
from fedbert_jax.console.progress import waiting
from fedbert_jax.errors import ConfigError, UserError
from fedbert_jax.report.plots import to_png
from fedbert_jax.workdir.log import to_json
from fedbert_jax.workdir.paths import Workdir

if TYPE_CHECKING:
    from rich.console import Console

WORDS = "words"  # the attack of those who add segments up, or stand beside a client in turn
SLOW = 0.1  # share of the highest learning rate below which clients move so little that it hides their words
ASKED = ("codec", "clip", "noise", "gradient_clip", "gradient_noise")  # keys of `wire` that an audit may suppose


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = cli.Parser(
        prog=cli.program("audit"),
        description="Measures how much of the clients' text can be read off what crosses.",
        epilog="kinds of knowledge: " + "; ".join(f"{kind}: {said}" for kind, said in KINDS.items())
        + ". --config.wire.KEY=VALUE supposes that a key of the wire had been set, without training anew: "
        + ", ".join(ASKED) + ".",
    )  # fmt: skip
    sizes = Sizes()
    parser.add_argument("workdir", type=Path, metavar="DIR", help="the workdir of a run, or of a server with audit.record")
    parser.add_argument("--clients", metavar="DIR,...", help="of a server: the workdirs of the clients that are attacked")
    parser.add_argument(
        "--round", type=int, help="which checkpoint, or recorded round, it begins with (default: the newest)"
    )
    parser.add_argument("--knows", metavar="KIND,...", help=f"(default: all) {', '.join(KINDS)}")
    parser.add_argument("--attacks", metavar="NAME,...", help="(default: all that fit)")
    parser.add_argument(
        "--public", metavar="SOURCE", help="public text, as in data.source (default: docs: of other packages)"
    )
    parser.add_argument("--blocks", type=int, default=sizes.blocks, help=f"blocks attacked (default: {sizes.blocks})")
    parser.add_argument("--log", type=int, default=sizes.log, help=f"earlier blocks logged (default: {sizes.log})")
    parser.add_argument("--known_blocks", type=int, default=sizes.known, help=f"of known text (default: {sizes.known})")
    parser.add_argument("--json", metavar="FILE", help="write the rows there, too")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    place = "in DIR/audit; of a part of an audit, in a folder of its own there"
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"where audit.json and audit.png go (default: {place})")
    given = sys.argv[1:] if arguments is None else arguments
    flags = parser.parse_args([word for word in given if not word.startswith("--config.")])
    given_parts = {name: getattr(flags, name) for name in ("round", "knows", "attacks")}
    flags.part = [f"{name}={value}" for name, value in given_parts.items() if value is not None]
    flags.supposed = _supposed([word for word in given if word.startswith("--config.")])
    flags.knows = _chosen("--knows", flags.knows, tuple(KINDS))
    names = (*dict.fromkeys(attack.name for attack in ATTACKS), WORDS)
    flags.asked_for = flags.attacks is not None
    flags.attacks = _chosen("--attacks", flags.attacks, names)
    for name in ("blocks", "log", "known_blocks"):
        if getattr(flags, name) < 1:
            raise UserError(f"--{name} {getattr(flags, name)}: accepted: at least 1.")
    return flags


def _chosen(flag: str, given: str | None, accepted: tuple[str, ...]) -> tuple[str, ...]:
    names = accepted if given is None else tuple(given.split(","))
    for name in names:
        if name not in accepted:
            raise UserError(f"{flag} {name}: accepted: {', '.join(accepted)}.")
    return names


def _supposed(given: Sequence[str]) -> dict[str, Any]:
    """Reads `--config.wire.KEY=VALUE`."""
    found = {}
    for argument in given:
        key, equals, text = argument.removeprefix("--config.").partition("=")
        if not equals or key not in [f"wire.{name}" for name in ASKED]:
            accepted = ", ".join(f"--config.wire.{name}=VALUE" for name in ASKED)
            raise ConfigError(f"{argument}: accepted: {accepted}.")
        found[key] = from_text(key, text)
    return found


def audit(
    case: Case, kinds: Sequence[str], attacks: Sequence[str], all_that_fit: bool, say: Callable[[str], None]
) -> list[Row]:
    """Runs the attacks that fit, one after another, and returns their rows.

    Args:
      case: the run.
      kinds: of knowledge, from `KINDS`.
      attacks: names.
      all_that_fit: leave out attacks that could only repeat what another one finds; False: those named are wanted.
      say: called with what is left out, and why.
    """
    rows = []
    for kind in kinds:
        mine = [a for a in ATTACKS if kind in a.knows and a.name in attacks]
        aggregated = kind in ("aggregator", "neighbour") and WORDS in attacks
        if not mine and not aggregated:
            continue
        facts = case.granted(kind)
        if isinstance(facts, str):
            say(f"{kind}: left out, since {facts}")
            continue
        if aggregated:
            rows += _words(case, kind)
            if "move" in case.aggregate.views and (share := case.source.rate()) < SLOW:
                say(f"{kind}: the learning rate of this round is {share:.1%} of its peak; moves tell more where it is "
                    "higher (--round)")  # fmt: skip
        view = dataclasses.replace(case.view, **facts)
        wire = case.source.config.wire
        if kind == "seed" and (wire.noise or wire.gradient_noise) and case.source.config.privacy.client_seed is None:
            say("seed: the noise follows from it, too, since privacy.client_seed is not set; these rows don't subtract it")
        if "segment" in kind and case.source.setting.blinded:
            say(f"{kind}: the server has none (privacy.averaging='blinded'); these rows are what one client could tell it")
        for attack in mine:
            if attack.needs_text and view.text is None:
                say(f"{kind}, {attack.name}: left out, since it needs public text (--public)")
            elif not attack.works(view):
                if not all_that_fit:
                    say(f"{kind}, {attack.name}: left out, since it can't read what this run sends")
            elif attack.adds(view) or not all_that_fit:
                rows.append(_attacked(case, kind, attack, view))
    return rows


def _attacked(case: Case, kind: str, attack: Attack, view: Any) -> Row:
    start = time.monotonic()
    guesses = attack.guess(view)
    seconds = time.monotonic() - start
    truth = case.replay.truth
    if attack.of == "tokens":
        asked, frequencies = (truth.tokens, truth.text), case.frequencies
    else:
        asked, frequencies = (truth.labels, truth.real), case.label_frequencies
    shape = (*asked[0].shape, GUESSES)
    if not (isinstance(guesses, np.ndarray) and np.issubdtype(guesses.dtype, np.integer) and guesses.shape == shape):
        got = f"{guesses.dtype} {list(guesses.shape)}" if isinstance(guesses, np.ndarray) else type(guesses).__name__
        raise UserError(
            f"the attack {attack.name!r} has guessed {got}: accepted: whole numbers {list(shape)} in a numpy array."
        )
    found = score(guesses, *asked, frequencies)
    floor = floors(
        *asked, frequencies, int(np.count_nonzero(frequencies)) if attack.of == "labels" else len(view.public.words)
    )
    return Row(
        kind, attack.name, attack.of, found.top1, found.top5, found.low, found.high, found.exact, found.bits, None,
        floor.random, floor.unigram, floor.unigram5, found.tokens, seconds, case.source.round,
    )  # fmt: skip


def _words(case: Case, kind: str) -> list[Row]:
    rows = []
    for attack in words.attacks(case.aggregate):
        start = time.monotonic()
        found = words.guess(case.aggregate, attack, case.frequencies)
        if found is not None:
            rows.append(
                Row(kind, f"{WORDS} by {attack}", "words", None, None, found.low, found.high, None, None, found.auc, 0.5,
                    found.floor, None, found.clients, time.monotonic() - start, case.source.round)
            )  # fmt: skip
    return rows


def _recordings(flags: argparse.Namespace) -> Recordings | None:
    """Opens what a server has recorded; None if the workdir isn't a server's."""
    clients = [Path(name) for name in listed(flags.clients)]
    if Workdir(flags.workdir).read_config().task != "serve":
        if clients:
            raise UserError(f"--clients: accepted with a server's workdir (task='serve'), which {flags.workdir} is not.")
        return None
    if flags.supposed:
        raise ConfigError(
            f"--config.{next(iter(flags.supposed))}: accepted with what was recorded: none; it is as it crossed."
        )
    return Recordings(flags.workdir, flags.round, clients)


class Audited(NamedTuple):
    """What an audit has found."""

    rows: list[Row]
    said: list[str]  # of what it was done with


def audited(flags: argparse.Namespace, console: Console) -> Audited:
    """Audits a run, and writes what it finds.

    Args:
      flags: as `parse` returns them.
      console: where to print what is left out, and why.

    Raises:
      UserError: for a directory that is no run, a run in which nothing crosses, or a file that can't be written.
    """
    say = lambda text: console.print(shown(text), style="dim")  # noqa: E731
    # A part, or what is only supposed, is not taken for the run's audit by `compare` and the report.
    apart = [*flags.part, *(f"{key}={value}" for key, value in flags.supposed.items())]
    out = flags.out or (flags.workdir / "audit").joinpath(*(re.sub(r"[^\w.,=-]", "_", name) for name in apart))
    recordings = _recordings(flags)
    source = open_source(flags.workdir, flags.round, flags.supposed) if recordings is None else recordings.source
    for folder in (out, *([Path(flags.json).parent] if flags.json else [])):
        if any(place.exists() and not place.is_dir() for place in (folder, *folder.parents)):
            raise UserError(f"{folder} is no directory; give another place.")
        with disk.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
    text = public.default_source(source.config) if flags.public is None else flags.public
    case = Case(source, Sizes(flags.blocks, flags.log, flags.known_blocks), text, say, recordings)
    with waiting(console, f"auditing {shown(flags.workdir)}"):
        rows = audit(case, flags.knows, flags.attacks, not flags.asked_for, say)
        truth, owners = case.replay.truth, case.replay.messages.client
    if not rows:
        raise UserError(f"{flags.workdir}: no attack fits what was asked for.")
    given = {"blocks": len(truth.tokens), "log": len(case.log[1].tokens), "known_blocks": flags.known_blocks}
    given |= {"public": text, "divergence": case.divergence} | flags.supposed
    written = to_json([row.to_dict() | {"given": given} for row in rows], indent=1) + "\n"
    with disk.writing(out):
        (out / "audit.json").write_text(written, encoding="utf-8")
        (out / "audit.png").write_bytes(to_png(results.figure(rows, KINDS)))
    if flags.json:
        with disk.writing(Path(flags.json)):
            Path(flags.json).write_text(written, encoding="utf-8")
    supposed = "".join(f", supposing {key}={value}" for key, value in flags.supposed.items())
    when = f"the round after {source.round}"
    if source.replayed != source.round:  # a fine-tuned task keeps the model that it ended with, and no other
        when = f"the text of round {source.replayed + 1} once more, by the model as it is after round {source.round}"
    said = [
        f"{when}: {len(truth.tokens)} blocks of {len(set(owners.tolist()))} clients, with "
        f"{int(truth.text.sum()):,} tokens of text and {int(truth.real.sum()):,} labels{supposed}; the floor is always the "
        "commonest word, or, of words, how frequent they are"
    ]
    if apart and not flags.out:
        said.append(f"written to {shown(out)}, since it isn't the whole audit of the run as it is")
    if recordings is not None:
        said.append(recordings.describe_log(given["log"]))
    if case.divergence is not None:
        near = case.divergence <= public.FAR
        weak = "" if near else ": of another domain, and weak; nearer text would tell more"
        said.append(f"public text: {shown(text)}, {case.divergence:.3f} bits from the clients'{weak}")
    return Audited(rows, said)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code.

    Raises:
      UserError: as `audited` does.
    """
    flags, console = parse(arguments), make_console()
    rows, said = audited(flags, console)
    if flags.markdown:
        console.print(results.to_markdown(rows, KINDS))
    else:
        print_table(console, results.to_table(rows, KINDS))
    for sentence in said:
        console.print(shown(sentence), style="dim")
    console.print(results.strongest(rows))
    return 0

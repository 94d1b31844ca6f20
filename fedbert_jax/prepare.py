"""python -m fedbert_jax.prepare --config NAME --out DIR [--config.KEY=VALUE ...]

Reads and encodes a config's text once, for many runs: those with `data.prepared=DIR` begin with it and read nothing.

The runs must agree with it on `seed`, `data.*`, `federated.num_clients` and `privacy.client_seed`, which decide what is
whose and what is held out. They may differ in everything else: strategy, model, optimizers, rounds.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fedbert_jax import cli
from fedbert_jax.config import flags
from fedbert_jax.console.output import make_console, print_table, shown
from fedbert_jax.errors import ConfigError, UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code.

    Raises:
      UserError: for a config that can't be used, text that can't be read, or a directory that holds something else.
    """
    parser = cli.Parser(
        prog=cli.program("prepare"),
        description=cli.usage(__doc__, "prepare"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="NAME", help="a config that comes along, or a FILE.py")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="where the blocks go: a new directory")
    given = sys.argv[1:] if arguments is None else list(arguments)
    args = parser.parse_args([word for word in given if not word.startswith("--config.")])
    changes = [word for word in given if word.startswith("--config.")]
    config = flags.load_config(flags.parse([f"--config={args.config}", *changes]))
    if config.task != "pretrain":
        raise ConfigError(f"config key task={config.task!r}: accepted here: 'pretrain'.")
    if config.data.prepared:
        raise ConfigError(f"config key data.prepared={config.data.prepared!r}: accepted here: ''.")

    from fedbert_jax import disk
    from fedbert_jax.console.progress import Stages
    from fedbert_jax.data.dataset import prepare
    from fedbert_jax.data.summary import client_table
    from fedbert_jax.experiment import check_before_reading

    console = make_console()
    cli.raise_on_interrupt()
    if not (args.out / "meta.json").exists():
        check_before_reading(config)
    warn = lambda text: console.print(f"warning: {shown(text)}", style="yellow")  # noqa: E731
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{shown(args.out)} can't be made ({error.strerror}); give another --out.") from error
    with Stages(console) as stages, disk.writing(args.out):
        dataset, _ = prepare(config, args.out, warn=warn, progress=stages, remedy="give another --out")
    print_table(console, client_table(dataset.summary))
    console.print(f"\n{len(dataset.train.tokens):,} blocks of {config.data.seq_len} tokens are in {shown(args.out)}: "
                  f"--config.data.prepared={shown(args.out)} begins with them")  # fmt: skip
    return 0


if __name__ == "__main__":
    cli.run(main)

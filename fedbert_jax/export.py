"""python -m fedbert_jax.export --workdir DIR --out DIR [--client NAME] [--round N]

Writes a trained model as a Hugging Face directory (config, safetensors, tokenizer, model card).
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from fedbert_jax import cli
from fedbert_jax.console import shown
from fedbert_jax.errors import UserError


def main() -> None:
    """Restores the newest checkpoint, or the one asked for, and exports it."""
    parser = argparse.ArgumentParser(prog="python -m fedbert_jax.export", description=__doc__)
    parser.add_argument("--workdir", required=True, type=Path, help="a run's directory")
    parser.add_argument("--out", required=True, type=Path, help="where the model goes; replaced if it is there")
    parser.add_argument("--client", default="", help="whose model, where each client has its own")
    parser.add_argument("--round", type=int, help="which checkpoint (default: the newest)")
    args = parser.parse_args()

    from fedbert_jax.checkpoint import Checkpoints
    from fedbert_jax.run import build, export, restore
    from fedbert_jax.workdir import Workdir

    workdir = Workdir(args.workdir)
    config = workdir.read_config()
    if config.task == "finetune":
        raise UserError(f"{args.workdir} is a run of fine-tuning, whose model is in {workdir.hf} already.")
    if not workdir.checkpoints.is_dir():
        raise UserError(f"{args.workdir} has no checkpoints yet.")
    # The parameters are the same, and this machine need not have the run's devices.
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="xla"))
    cli.raise_on_interrupt()
    checkpoints = Checkpoints(workdir.checkpoints)
    rounds = checkpoints.rounds()
    if not rounds or (args.round is not None and args.round not in rounds):
        raise UserError(f"{args.workdir} has no checkpoint of round {args.round}; it has {rounds or 'none'}.")
    run = build(config, workdir)
    round = rounds[-1] if args.round is None else args.round
    state, meta = restore(run, checkpoints, round)
    name = export(run, state, args.out, meta, args.client)
    print(f"round {round}{f' of client {shown(name)}' if name else ''} is in {shown(args.out)}")


if __name__ == "__main__":
    cli.run(main)

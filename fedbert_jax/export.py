"""python -m fedbert_jax.export --workdir DIR --out DIR [--client NAME] [--round N]

Writes a trained model as a Hugging Face directory (config, safetensors, tokenizer, model card).
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fedbert_jax import cli
from fedbert_jax.console.output import shown
from fedbert_jax.errors import UserError, about

if TYPE_CHECKING:  # slow to import: not before the arguments are read
    from fedbert_jax.config import Config
    from fedbert_jax.workdir.checkpoint import Checkpoints
    from fedbert_jax.workdir.paths import Workdir

# What the model card says beyond what the run knows: each is a flag for a key of the config's `export` section.
CARD = ("license", "language", "datasets", "base_model")


def main() -> None:
    """Restores the newest checkpoint, or the one asked for, and exports it."""
    parser = cli.Parser(prog=cli.program("export"), description=cli.usage(__doc__, "export"))
    parser.add_argument("--workdir", required=True, type=Path, help="a run's directory")
    parser.add_argument("--out", required=True, help="where the model goes: a new or empty directory, or an earlier export")
    parser.add_argument("--client", default="", help="whose model, where each client has its own")
    parser.add_argument("--round", type=int, help="which checkpoint (default: the newest)")
    for name in CARD:
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, help=f"for the model card, in place of the run's config key export.{name}")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # cleans up, as Ctrl-C does

    from fedbert_jax.experiment import export, restore
    from fedbert_jax.finished import changed, elsewhere, find_checkpoint, reopen
    from fedbert_jax.models import huggingface
    from fedbert_jax.workdir.paths import Workdir

    workdir = Workdir(args.workdir)
    config = workdir.read_config()
    if config.task == "finetune":
        raise UserError(f"--workdir {args.workdir} is a run of fine-tuning, which writes its model itself, to {workdir.hf}.")
    if config.task == "join":
        raise UserError(
            f"--workdir {args.workdir} is a client's in a federation, which writes the trained model itself, to "
            f"{workdir.hf}; the server's workdir has checkpoints to export."
        )
    if config.task == "serve" and config.privacy.averaging == "blinded":
        raise UserError(
            f"--workdir {args.workdir} is a server's that never had the clients' segment (privacy.averaging='blinded'): it "
            "has no model to export; each client's workdir has one in hf/."
        )
    if not args.out:
        raise UserError("--out is empty; accepted: a directory.")
    out = Path(args.out)
    with about("--out"):
        check_place(out, workdir.root)
        huggingface.check_target(out)
    given = {name: getattr(args, name) for name in CARD if getattr(args, name) is not None}
    said = {f"export.{name}": value for name, value in given.items()}
    cli.raise_on_interrupt()
    if config.task == "serve":
        checkpoints, round = find_checkpoint(args.workdir, args.round)
        name = ""
        export_served(elsewhere(changed(config, said)), workdir, checkpoints, round, out)
    else:
        run, checkpoints, round = reopen(args.workdir, args.round, said)
        state, meta = restore(run, checkpoints, round)
        name = export(run, state, out, meta, args.client)
    whose = f" of client {shown(name)}" if name else ", the model that all clients share," if args.client else ""
    print(f"round {round}{whose} is in {shown(out)}")


def export_served(config: Config, workdir: Workdir, checkpoints: Checkpoints, round: int, out: Path) -> None:
    """Writes the model that a federation's server has saved after a round: its body, and the segment that clients averaged.

    Raises:
      UserError: if the checkpoint is damaged, or the tokenizer isn't where the config says.
    """
    import jax

    from fedbert_jax.jobs import open_job
    from fedbert_jax.jobs.engine import engine_of, restored

    job, clients = open_job(config), config.federated.num_clients or 0
    engine = engine_of(job, [str(n) for n in range(clients)], clients)  # whoever they are: all have the same model
    state = restored(engine, checkpoints, round, workdir.read_config())
    client, server = jax.device_get((state.segment, state.body))
    job.save(out, client, server, round)


def check_place(out: Path, workdir: Path) -> None:
    """Raises UserError if a directory is a run's workdir, lies in one, or contains this run's workdir.

    Links are followed, and directories are compared by identity, not by name. Everything in a workdir belongs to its run
    alone, including `hf/`, which the run's report describes.
    """
    try:
        place, root = out.resolve(), workdir.resolve()
        above = [path for path in (place, *place.parents) if path.is_dir()]
        for path in above:
            if path.samefile(root) or ((path / ".lock").is_file() and (path / "config.json").is_file()):
                where = "is" if path == place else f"is in {path},"
                raise UserError(f"{out} {where} a run's workdir, in which its run alone writes; give another place.")
        if place in above and any(path.samefile(place) for path in root.parents):
            raise UserError(f"{out} holds {workdir}, the run's workdir; give another place.")
    except (OSError, RuntimeError) as error:  # a name too long, or links in a circle
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{out} can't be written ({reason}); give another place.") from error


if __name__ == "__main__":
    cli.run(main)

"""fedbert COMMAND [ARGUMENTS]: all commands of the package by one name. `python -m fedbert_jax` is the same."""

from __future__ import annotations

import importlib
import sys

import fedbert_jax

fedbert_jax.exit_on_interrupt()  # whatever is imported next: it takes seconds

from fedbert_jax import cli  # noqa: E402
from fedbert_jax.errors import UserError  # noqa: E402

# What a command does, where its function is, and the arguments that it begins with.
COMMANDS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "train": ("trains what a config says: fedbert train --config demo --workdir DIR", "main:main", ()),
    "serve": ("is the server of a federation over a network", "main:main", ("--config=serve",)),
    "join": ("is a client of one", "main:main", ("--config=join",)),
    "prepare": ("reads and encodes text once, for many runs", "prepare:main", ()),
    "provision": ("makes the certificates that they show one another", "provision:main", ()),
    "status": ("says where a federation stands", "status:main", ()),
    "report": ("writes a page about a run, also while it goes on", "report.page:main", ()),
    "compare": ("puts runs side by side", "compare:main", ()),
    "study": ("trains configs with changes over seeds, and compares them", "study:main", ()),
    "audit": ("measures what the messages of a run give away", "audit.command:main", ()),
    "export": ("writes a run's model as a Hugging Face directory", "export:main", ()),
    "glue": ("fine-tunes a model on GLUE", "glue.command:main", ()),
}


def main() -> None:
    """Runs the command that the first argument names; the others are for it."""
    cli.run(_main)


def _main() -> int | None:
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help", "help"):
        cli.say(_usage())
        return 0
    if name == "--version":
        cli.say(f"fedbert_jax {fedbert_jax.__version__}")
        return 0
    if name not in COMMANDS:
        raise UserError(f"there is no command {name!r}; accepted: {', '.join(COMMANDS)}.")
    _, place, first = COMMANDS[name]
    module, _, function = place.partition(":")
    sys.argv = [sys.argv[0], *first, *arguments]
    cli.called(name)
    return getattr(importlib.import_module(f"fedbert_jax.{module}"), function)()


def _usage() -> str:
    """Returns what --help prints."""
    commands = "\n".join(f"  {name:10}  {does}" for name, (does, _, _) in COMMANDS.items())
    about = f"usage: fedbert COMMAND [ARGUMENTS]\n\n{fedbert_jax.__doc__}\n\n{commands}"
    return f"{about}\n\nfedbert COMMAND --help says more, and fedbert --version which version it is."


if __name__ == "__main__":
    main()

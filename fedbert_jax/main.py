"""python -m fedbert_jax.main --config NAME --workdir DIR [--config.KEY=VALUE ...]

Trains what the config says, in DIR; the same command again resumes where it stopped.

On several machines, run the same command on each, with --distributed and the same DIR on a file system that all of them see.
TPU pods, SLURM and Open MPI are detected; elsewhere --coordinator HOST:PORT --processes P --process I say where process 0
is, how many there are, and which one this is. --join_timeout SECONDS (300) is how long they wait for one another.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from fedbert_jax import cli  # nothing else yet: slow imports come once Ctrl-C is handled
from fedbert_jax.errors import ConfigError


def main() -> int:
    """Parses the flags, validates the config before anything expensive, and trains; returns the exit code."""
    from fedbert_jax.config import flags

    given = flags.parse(sys.argv[1:])
    told = flags.tell_about(given, cli.usage(__doc__, "main"))
    if told is not None:
        cli.say(told)
        return 0
    config = flags.load_config(given)
    workdir = Path(given.need("workdir"))
    # JAX and its devices start only here, after the config was validated.
    from fedbert_jax.devices import processes

    which = given.flags
    join = processes.check_flags(
        which.get("distributed", False),
        which.get("coordinator"),
        which.get("processes"),
        which.get("process"),
        which.get("join_timeout", 300),
    )
    if config.task == "finetune":
        if join is not None:
            raise ConfigError("--distributed is for task='pretrain'; fine-tuning runs in one process.")
        from fedbert_jax.glue.finetune import finetune as command
    elif config.task in ("serve", "join"):
        if join is not None:
            raise ConfigError(f"--distributed is for task='pretrain'; task={config.task!r} is one process of each party.")
        if config.task == "serve":
            from fedbert_jax.serve import serve as command
        else:
            from fedbert_jax.join import join as command
    else:
        from fedbert_jax.train import train as command

    cli.raise_on_interrupt()
    # `foreseen` is the inner one, since `joined` ends the process on any error that reaches it.
    with processes.joined(join, cli.tell) if join else contextlib.nullcontext(), cli.foreseen():
        return command(config, workdir)


if __name__ == "__main__":
    cli.run(main)

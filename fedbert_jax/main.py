"""python -m fedbert_jax.main --config configs/NAME.py --workdir DIR [--config.KEY=VALUE ...]

Trains what the config says, in DIR; the same command again goes on where it stopped.

On several machines, the same command on each, with --distributed and the same DIR on a file system that all of them see.
TPU pods, SLURM and Open MPI are found out; elsewhere --coordinator HOST:PORT --processes P --process I say where process 0
is, how many there are, and which this is. --join_timeout SECONDS (300) is how long they wait for one another.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from fedbert_jax import cli
from fedbert_jax.errors import ConfigError

_CONFIG = config_flags.DEFINE_config_file("config", None, "A configs/NAME.py, whose get_config() gives the run.")
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's directory: made if absent, resumed if not.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Train with other processes that run the same command.")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0.")
_PROCESSES = flags.DEFINE_integer("processes", None, "How many processes there are.")
_PROCESS = flags.DEFINE_integer("process", None, "Which of them this is, from 0.")
_JOIN_TIMEOUT = flags.DEFINE_integer("join_timeout", 300, "Seconds in which all processes have to be there.")


def main() -> None:
    """Parses the flags, validates the config before anything expensive, and trains."""
    rest = cli.parse_flags(sys.argv, __doc__ or "")
    if rest:
        raise ConfigError(f"unexpected argument {rest[0]!r}; accepted: --config, --workdir and --config.KEY=VALUE.")
    config = cli.load_config(_CONFIG.value)
    if not _WORKDIR.value:
        raise ConfigError("no workdir given; accepted: --workdir DIR.")
    # JAX and its devices start here, after the config was found good.
    from fedbert_jax import distributed

    join = distributed.check_flags(
        _DISTRIBUTED.value, _COORDINATOR.value, _PROCESSES.value, _PROCESS.value, _JOIN_TIMEOUT.value
    )
    if config.task == "finetune":
        if join is not None:
            raise ConfigError("--distributed is for task='pretrain'; fine-tuning runs in one process.")
        from fedbert_jax.finetune import finetune as command
    else:
        from fedbert_jax.train import train as command

    # `foreseen` is the inner one, since a process that has joined others is ended there.
    with distributed.joined(join, cli.tell) if join else contextlib.nullcontext(), cli.foreseen():
        code = command(config, Path(_WORKDIR.value))
    sys.exit(code)


if __name__ == "__main__":
    cli.run(main)

"""python -m fedbert_jax.main --config configs/NAME.py --workdir DIR [--config.KEY=VALUE ...]

Trains what the config says, in DIR; the same command again goes on where it stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from fedbert_jax import cli
from fedbert_jax.errors import ConfigError

_CONFIG = config_flags.DEFINE_config_file("config", None, "A configs/NAME.py, whose get_config() gives the run.")
_WORKDIR = flags.DEFINE_string("workdir", None, "The run's directory: made if absent, resumed if not.")


def main() -> None:
    """Parses the flags, validates the config before anything expensive, and trains."""
    rest = cli.parse_flags(sys.argv, __doc__ or "")
    if rest:
        raise ConfigError(f"unexpected argument {rest[0]!r}; accepted: --config, --workdir and --config.KEY=VALUE.")
    config = cli.load_config(_CONFIG.value)
    if not _WORKDIR.value:
        raise ConfigError("no workdir given; accepted: --workdir DIR.")
    # JAX and its devices start here, after the config was found good.
    if config.task == "finetune":
        from fedbert_jax.finetune import finetune as command
    else:
        from fedbert_jax.train import train as command

    sys.exit(command(config, Path(_WORKDIR.value)))


if __name__ == "__main__":
    cli.run(main)

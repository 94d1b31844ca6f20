"""What scripts and notebooks call; `fedbert_jax` has these names, too, and imports them when they are asked for."""

from fedbert_jax.api.functions import (
    compare_runs,
    finetune_on_glue,
    register_attack,
    register_channel,
)
from fedbert_jax.api.run import STOP, Run
from fedbert_jax.config import Config
from fedbert_jax.config.files import load_config
from fedbert_jax.errors import UserError

__all__ = [
    "STOP",
    "Config",
    "Run",
    "UserError",
    "compare_runs",
    "finetune_on_glue",
    "load_config",
    "register_attack",
    "register_channel",
]

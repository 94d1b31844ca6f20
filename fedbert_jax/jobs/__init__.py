"""What a federation over a network trains."""

from __future__ import annotations

from fedbert_jax.config import Config
from fedbert_jax.jobs.job import Job
from fedbert_jax.jobs.pretraining import Pretraining


def open_job(config: Config) -> Job:
    """Returns the job of a config.

    Raises:
      UserError: for a tokenizer or a checkpoint that isn't there or doesn't fit.
    """
    return Pretraining(config)

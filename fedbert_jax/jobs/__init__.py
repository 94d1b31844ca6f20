"""What a federation over a network trains: a language model on text, or a classifier on labelled examples."""

from __future__ import annotations

from fedbert_jax.config import Config
from fedbert_jax.jobs.job import Job


def open_job(config: Config) -> Job:
    """Returns the job of a config: which one, its `data.source` says.

    Raises:
      UserError: for a tokenizer or a checkpoint that isn't there or doesn't fit.
    """
    if config.labelled:
        from fedbert_jax.jobs.classifying import Classifying  # here: its metrics take a second to import

        return Classifying(config)
    from fedbert_jax.jobs.pretraining import Pretraining

    return Pretraining(config)

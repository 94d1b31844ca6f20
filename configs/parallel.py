"""The demo's data and budget with FedBERT's parallel strategy as published: segments are averaged every eight steps.

Each client's AdamW sees the gradients of its own two sequences alone, which are noisy, and normalises by that noise, so
its rate is three times the demo's. It moves fewer bytes than averaging gradients does; docs/strategies.md says when that
pays.
"""

from pathlib import Path

import ml_collections

from fedbert_jax.config.files import read_config


def get_config() -> ml_collections.ConfigDict:
    """Returns the demo's config with `federated.average=parameters`."""
    config = read_config(Path(__file__).with_name("demo.py"))
    config.fill_mask = ()
    config.federated.average = "parameters"
    config.client_optimizer.learning_rate = 6e-3
    return config

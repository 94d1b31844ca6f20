"""The demo's data and budget without any federation: all text pooled, no cut. The upper bound.

A step takes 8 x 2 sequences of the pooled text. A run takes about two minutes on two CPU cores.
"""

from pathlib import Path

import ml_collections

from fedbert_jax.config.files import read_config


def get_config() -> ml_collections.ConfigDict:
    """Returns the demo's config with `federated.strategy=centralized`."""
    config = read_config(Path(__file__).with_name("demo.py"))
    config.fill_mask = ()
    config.federated.strategy = "centralized"
    config.federated.average = "parameters"
    return config

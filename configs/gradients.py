"""The demo's data and budget with the clients' gradients averaged at every step: training on all their batches as one.

Everything else is as in `configs/demo.py`. It learns what a single trainer with these batches would learn, and sends more
bytes (docs/strategies.md). It takes about two minutes on two CPU cores.
"""

from pathlib import Path

import ml_collections

from fedbert_jax.config.flags import read_config


def get_config() -> ml_collections.ConfigDict:
    """Returns the demo's config with `federated.average=gradients`."""
    config = read_config(Path(__file__).with_name("demo.py"))
    config.fill_mask = ()
    config.federated.average = "gradients"
    return config

"""The demo's data and budget with every organisation on its own: eight models, never mixed. The lower bound.

Each client trains a whole model on its own text; each model is evaluated on its own client's held-out text. It takes about
four minutes on two CPU cores.
"""

from pathlib import Path

import ml_collections

from fedbert_jax.config.files import read_config


def get_config() -> ml_collections.ConfigDict:
    """Returns the demo's config with `federated.strategy=local`."""
    config = read_config(Path(__file__).with_name("demo.py"))
    config.fill_mask = ()
    config.federated.strategy = "local"
    config.federated.average = "parameters"
    for optimizer in (config.client_optimizer, config.server_optimizer):
        optimizer.learning_rate = 1e-3
    return config

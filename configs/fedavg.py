"""The demo's data and budget with FedAvg of the whole model (McMahan et al. 2017): federation without a cut.

Each client trains all of BERT on its own text for eight steps, then all eight models are averaged. It takes about four
minutes on two CPU cores.
"""

from pathlib import Path

import ml_collections

from fedbert_jax.config.files import read_config


def get_config() -> ml_collections.ConfigDict:
    """Returns the demo's config with `federated.strategy=fedavg`."""
    config = read_config(Path(__file__).with_name("demo.py"))
    config.fill_mask = ()
    config.federated.strategy = "fedavg"
    config.federated.average = "parameters"
    for optimizer in (config.client_optimizer, config.server_optimizer):
        optimizer.learning_rate = 4e-3
    return config

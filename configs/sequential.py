"""The demo's data and budget with FedBERT's sequential strategy: clients take turns and hand the client segment on.

A round is eight turns of eight steps of two sequences: as many tokens as in the demo, in eight times as many optimizer
steps, each an eighth of the size. So the warm-up has eight times as many steps, and the learning rate is lower. It takes
about five minutes on two CPU cores.
"""

from pathlib import Path

import ml_collections

from fedbert_jax.config.files import read_config


def get_config() -> ml_collections.ConfigDict:
    """Returns the demo's config with `federated.strategy=sequential`."""
    config = read_config(Path(__file__).with_name("demo.py"))
    config.fill_mask = ()
    config.federated.strategy = "sequential"
    config.federated.average = "parameters"
    for optimizer in (config.client_optimizer, config.server_optimizer):
        optimizer.learning_rate = 1e-3
        optimizer.warmup_steps = 800
    return config

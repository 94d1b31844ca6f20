"""The demo's data and budget with FedBERT's sequential strategy: clients take turns and hand the client segment on.

A round is eight turns of eight steps of four sequences: as many tokens as the demo's, in eight times as many optimizer
steps, each an eighth of the size. So the warm-up is eight times as many steps, and the rate is lower. About five
minutes on two CPU cores.
"""

import ml_collections

from fedbert_jax.config import default_config


def get_config() -> ml_collections.ConfigDict:
    """Returns the demo's config with `federated.strategy=sequential`."""
    config = default_config()
    config.data.source = "docs:"
    config.data.tokenizer = "train:4096"
    config.data.seq_len = 128
    config.data.partition.kind = "natural"

    config.model.preset = "tiny"

    config.federated.strategy = "sequential"
    config.federated.local_steps = 8
    config.federated.batch_size = 4
    config.federated.rounds = 140

    for optimizer in (config.client_optimizer, config.server_optimizer):
        optimizer.name = "adamw"
        optimizer.learning_rate = 1e-3
        optimizer.warmup_steps = 800
        optimizer.b2 = 0.98
        optimizer.clip_norm = 1.0
    return config

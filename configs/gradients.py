"""The demo's data and budget with the clients' gradients averaged at every step: training on all their batches as one.

What `configs/demo.py` is in all else. It learns what one trainer with these batches would, and costs more bytes:
docs/strategies.md. About two minutes on two CPU cores.
"""

import ml_collections

from fedbert_jax.config import default_config


def get_config() -> ml_collections.ConfigDict:
    """Returns the demo's config with `federated.average=gradients`."""
    config = default_config()
    config.data.source = "docs:"
    config.data.tokenizer = "train:4096"
    config.data.seq_len = 128
    config.data.partition.kind = "natural"

    config.model.preset = "tiny"

    config.federated.strategy = "parallel"
    config.federated.average = "gradients"
    config.federated.local_steps = 8
    config.federated.batch_size = 4
    config.federated.rounds = 140

    for optimizer in (config.client_optimizer, config.server_optimizer):
        optimizer.name = "adamw"
        optimizer.learning_rate = 2e-3
        optimizer.warmup_steps = 100
        optimizer.b2 = 0.98
        optimizer.clip_norm = 1.0
    return config

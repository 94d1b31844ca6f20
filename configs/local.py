"""The demo's data and budget with every organisation on its own: eight models, never mixed. The lower bound.

Each client trains a whole model on its own text; the evaluation asks each model about its own client's held-out text.
About four minutes on two CPU cores.
"""

import ml_collections

from fedbert_jax.config import default_config


def get_config() -> ml_collections.ConfigDict:
    """Returns the demo's config with `federated.strategy=local`."""
    config = default_config()
    config.data.source = "docs:"
    config.data.tokenizer = "train:4096"
    config.data.seq_len = 128
    config.data.partition.kind = "natural"

    config.model.preset = "tiny"

    config.federated.strategy = "local"
    config.federated.local_steps = 8
    config.federated.batch_size = 4
    config.federated.rounds = 140

    for optimizer in (config.client_optimizer, config.server_optimizer):
        optimizer.name = "adamw"
        optimizer.learning_rate = 1e-3
        optimizer.warmup_steps = 100
        optimizer.b2 = 0.98
        optimizer.clip_norm = 1.0
    return config

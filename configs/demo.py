"""Eight organisations pre-train one BERT on the docstrings of eight installed packages.

Every package is a client: different words, different style, very different sizes. FedBERT's parallel strategy with one body
on the server, 2 x 128; the clients' gradients are averaged at every step, and every client counts the same. The other
configs/{parallel,sequential,centralized,local,fedavg}.py train on the same data with the same number of tokens.
"""

import ml_collections

from fedbert_jax.config import default_config


def get_config() -> ml_collections.ConfigDict:
    """Returns the demo's config."""
    config = default_config()
    config.data.source = "docs:"
    config.data.tokenizer = "train:4096"
    config.data.seq_len = 128
    config.data.partition.kind = "natural"

    config.model.preset = "tiny"

    config.federated.strategy = "parallel"
    config.federated.average = "gradients"
    config.federated.weighting = "uniform"
    config.federated.local_steps = 8
    config.federated.batch_size = 2
    config.federated.rounds = 280

    for optimizer in (config.client_optimizer, config.server_optimizer):
        optimizer.name = "adamw"
        optimizer.learning_rate = 2e-3
        optimizer.warmup_steps = 100
        optimizer.b2 = 0.98
        optimizer.clip_norm = 1.0

    config.fill_mask = (
        "Parameters ----[MASK]----- x : array_like",
        "array([1, 2, 3, [MASK]])",
        "LAX-backend implementation of :func:`numpy.[MASK]`.",
    )
    return config

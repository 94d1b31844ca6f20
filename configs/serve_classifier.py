"""The server of a federation that fine-tunes a classifier: `--config configs/serve_classifier.py --workdir runs/server`.

It waits for two clients that run configs/join_classifier.py (`--config.federated.num_clients=N` for others), and trains
a checkpoint further with them, on labelled examples that it never sees. Name the task, whose files it doesn't need, with
`--config.data.source=glue:TASK`, and how long with `--config.federated.rounds=N`: docs/federation.md.
"""

from pathlib import Path

import ml_collections

from fedbert_jax.config.files import read_config


def get_config() -> ml_collections.ConfigDict:
    """Returns the server's config."""
    config = read_config(Path(__file__).with_name("finetune.py"))
    config.task = "serve"
    config.data.partition.kind = "natural"

    config.federated.strategy = "parallel"
    config.federated.num_clients = 2
    config.federated.batch_size = 16
    config.federated.rounds = 50
    config.eval.every_rounds = 10
    config.checkpoint.every_rounds = 10
    for optimizer in (config.client_optimizer, config.server_optimizer):
        optimizer.warmup = 0.1
    return config

"""Your own text: `--config configs/text.py --workdir DIR --config.data.source=text:FOLDER`, and nothing else is needed.

Every folder below FOLDER is a client (`hf:NAME` reads a dataset; docs/bringing-your-own-text.md has other arrangements). A
2 x 128 BERT with a vocabulary of 4,096 is trained from scratch, by FedBERT's parallel strategy, until each block of text has
been seen ten times (`federated.epochs`). At most 16 clients take part in a round. How often it is evaluated and saved
follows from the number of rounds. Two CPU cores train on some 40,000 tokens a second, so ten passes over a megabyte of
English take a minute or two, and ten over 100 MB some two hours. Give larger machines a larger model (`model.preset`).
"""

import ml_collections

from fedbert_jax.config import default_config


def get_config() -> ml_collections.ConfigDict:
    """Returns a config that lacks `data.source`."""
    config = default_config()
    config.data.source = "text:"
    config.data.tokenizer = "train:4096"
    config.data.seq_len = 128

    config.model.preset = "tiny"

    config.federated.strategy = "parallel"
    config.federated.epochs = 10.0
    config.federated.max_clients_per_round = 16
    config.federated.local_steps = 8
    config.federated.batch_size = 4

    config.eval.times = 20
    config.checkpoint.times = 10

    for optimizer in (config.client_optimizer, config.server_optimizer):
        optimizer.name = "adamw"
        optimizer.learning_rate = 2e-3
        optimizer.warmup = 0.1
        optimizer.b2 = 0.98
        optimizer.clip_norm = 1.0
    return config

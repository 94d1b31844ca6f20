"""Fine-tunes a BERT on one GLUE task in the ordinary way, with all examples in one place.

It runs three epochs with batches of 32, using AdamW at 1e-4 with dropout 0.1 (try 2e-5 to 5e-5 for BERT-base, more for tiny
models). Name the model and the task on the command line; the task comes from the hub or from a folder in the official TSV
layout:

    .venv/bin/python -m fedbert_jax.main --config configs/finetune.py --workdir runs/sst2 \\
        --config.model.init_from=runs/demo/hf --config.data.source=glue:SST-2@GLUE/SST-2 --config.finetune.seeds=5

To train across clients with examples dealt by label, add --config.federated.strategy=parallel
--config.federated.num_clients=8 --config.data.partition.kind=dirichlet. `.venv/bin/python -m fedbert_jax.glue` runs all
tasks and prints GLUE's table.
"""

import ml_collections

from fedbert_jax.config import default_config


def get_config() -> ml_collections.ConfigDict:
    """Returns the config."""
    config = default_config()
    config.task = "finetune"
    config.data.source = "glue:SST-2"
    config.data.tokenizer = ""  # the checkpoint's
    config.data.seq_len = 128

    config.model.init_from = "google/bert_uncased_L-2_H-128_A-2"
    config.model.hidden_dropout = 0.1
    config.model.attention_dropout = 0.1

    config.federated.strategy = "centralized"
    config.federated.batch_size = 32
    config.federated.local_steps = 8
    config.data.partition.kind = "iid"  # for strategies with several clients
    config.federated.num_clients = 8

    for optimizer in (config.client_optimizer, config.server_optimizer):
        optimizer.name = "adamw"
        optimizer.learning_rate = 1e-4
        optimizer.weight_decay = 0.01
        optimizer.clip_norm = 1.0
    return config

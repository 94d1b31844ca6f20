"""The demo's eight organisations train a BERT on that exists already, rather than one from nothing.

`--config.model.init_from=DIR` says which: a Hugging Face directory or hub name, whose sizes and tokenizer the run takes
over; without it, BERT-tiny from the hub. Any strategy works, by `--config.federated.strategy=...`. The rate is a quarter
of the demo's. Four to five minutes on two CPU cores for a 2 x 128 BERT with BERT's 30,522 words.
"""

import ml_collections

from fedbert_jax.config import default_config


def get_config() -> ml_collections.ConfigDict:
    """Returns the demo's config with a checkpoint to start from."""
    config = default_config()
    config.data.source = "docs:"
    config.data.tokenizer = ""  # the checkpoint's
    config.data.seq_len = 128
    config.data.partition.kind = "natural"

    config.model.init_from = "google/bert_uncased_L-2_H-128_A-2"  # BERT-tiny of Turc et al. 2019

    config.federated.strategy = "parallel"
    config.federated.local_steps = 8
    config.federated.batch_size = 4
    config.federated.rounds = 50

    for optimizer in (config.client_optimizer, config.server_optimizer):
        optimizer.name = "adamw"
        optimizer.learning_rate = 5e-4
        optimizer.warmup_steps = 50
        optimizer.b2 = 0.98
        optimizer.clip_norm = 1.0

    config.fill_mask = (
        "Parameters ----[MASK]----- x : array_like",
        "(`bool`, *optional*, defaults to [MASK]False`)",
        "Returns a [MASK] with the same shape as the input.",
    )
    return config

"""The demo's eight organisations continue training an existing BERT rather than start from scratch.

`--config.model.init_from=DIR` names it: a Hugging Face directory or hub name, whose sizes and tokenizer the run takes
over. The default is BERT-tiny from the hub. Any strategy works: `--config.federated.strategy=...`. The learning rate is a
quarter of the demo's. It takes four to five minutes on two CPU cores for a 2 x 128 BERT with BERT's 30,522 tokens.
"""

from pathlib import Path

import ml_collections

from fedbert_jax.config.files import read_config


def get_config() -> ml_collections.ConfigDict:
    """Returns the demo's config with a checkpoint to start from."""
    config = read_config(Path(__file__).with_name("demo.py"))
    config.data.tokenizer = ""  # the checkpoint's
    config.model.init_from = "google/bert_uncased_L-2_H-128_A-2"  # BERT-tiny of Turc et al. 2019
    config.federated.average = "parameters"
    config.federated.weighting = "examples"
    config.federated.batch_size = 4
    config.federated.rounds = 50
    for optimizer in (config.client_optimizer, config.server_optimizer):
        optimizer.learning_rate = 5e-4
        optimizer.warmup_steps = 50
    return config

"""The paper's setting: BERT-base on WikiText-103 with ten IID clients of equal size, blocks of 512.

The hyper-parameters are those that the public FedBERT scripts show: Adam (0.9, 0.98), eps 1e-6, peak 5e-4, 10,000 steps of
warm-up, polynomial decay, weight decay 0.01, dropout 0.1. Each article is a document, so held-out text comes from other
articles. The corpus and the tokenizer are read from the Hugging Face hub. 125,000 steps of 10 x 8 sequences are 5.1 billion
tokens: an experiment for accelerators, not for a CPU. For a first look set federated.rounds=100, which is 5,000 steps, with
client_optimizer.warmup_steps=400 and server_optimizer.warmup_steps=400.
"""

import ml_collections

from fedbert_jax.config import default_config


def get_config() -> ml_collections.ConfigDict:
    """Returns the paper's setting with the parallel strategy."""
    config = default_config()
    config.data.source = "hf:Salesforce/wikitext/wikitext-103-raw-v1"
    config.data.document_start = r"^ = [^=].* = \n?$"  # an article's title; sections have two or more equals signs
    config.data.tokenizer = "google-bert/bert-base-uncased"
    config.data.seq_len = 512
    config.data.eval_fraction = 0.01
    config.data.partition.kind = "iid"

    config.model.preset = "base"
    config.model.hidden_dropout = 0.1
    config.model.unroll_layers = False  # twelve layers compile in the time of one

    config.federated.strategy = "parallel"
    config.federated.num_clients = 10
    config.federated.local_steps = 50
    config.federated.rounds = 2500
    config.federated.batch_size = 8

    for optimizer in (config.client_optimizer, config.server_optimizer):
        optimizer.name = "adamw"
        optimizer.learning_rate = 5e-4
        optimizer.schedule = "polynomial"
        optimizer.warmup_steps = 10_000
        optimizer.b1, optimizer.b2, optimizer.eps = 0.9, 0.98, 1e-6
        optimizer.weight_decay = 0.01

    config.eval.every_rounds = 50
    config.checkpoint.every_rounds = 50
    config.fill_mask = ("Paris is the [MASK] of France.",)
    return config

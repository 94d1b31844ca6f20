"""BERT-base from scratch on your own text or a dataset of the hub, on an accelerator, with the clients' gradients averaged.

`--config.data.source=text:FOLDER` (each folder a client) or `hf:NAME` with `--config.data.client_field=COLUMN` says which
text; for IID clients add `--config.data.partition.kind=iid --config.federated.num_clients=N`. The tokenizer is BERT's, from
the hub; `--config.data.tokenizer=train:30522` makes one of the text. Sixteen clients a round give sixteen blocks of 128
tokens each a step, 256 in all as BERT's had, and each block of text is seen three times (`federated.epochs`), without
dropout; AdamW's peak rate and weight decay are BERT's (Devlin et al. 2019, A.2). None of it was tuned here.

Costs: one H200 trains on 660,000 tokens a second with sixteen clients (bfloat16, 12 GB; benchmarks/RESULTS.md), so a
billion tokens in 25 minutes; a CPU is for a look only. A miniature is another preset, `--config.model.preset=mini` (4 x
256), and wants larger rates (the demo has 2e-3 for 2 x 128). For blocks of 512, `--config.data.seq_len=512
--config.federated.batch_size=4`.
"""

import ml_collections

from fedbert_jax.config import default_config


def get_config() -> ml_collections.ConfigDict:
    """Returns a config that lacks `data.source`."""
    config = default_config()
    config.data.source = "text:"
    config.data.tokenizer = "google-bert/bert-base-uncased"
    config.data.seq_len = 128
    config.data.eval_fraction = 0.01

    config.model.preset = "base"

    config.federated.strategy = "parallel"
    config.federated.average = "gradients"
    config.federated.epochs = 3.0
    config.federated.max_clients_per_round = 16
    config.federated.local_steps = 50
    config.federated.batch_size = 16

    config.eval.times = 50
    config.eval.batch_size = 64
    config.checkpoint.times = 20

    for optimizer in (config.client_optimizer, config.server_optimizer):
        optimizer.name = "adamw"
        optimizer.learning_rate = 1e-4
        optimizer.warmup = 0.01
        optimizer.weight_decay = 0.01
        optimizer.eps = 1e-6
    return config

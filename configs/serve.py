"""The server of a federation on this machine: `--config configs/serve.py --workdir runs/server`, and nothing else is needed.

It waits for two clients (`--config.federated.num_clients=N` for others) that run configs/join.py, and trains a BERT
of 2 x 128 with them, on text that it never sees. Clients on other
machines are let in with certificates alone: docs/federation.md.
"""

from pathlib import Path

import ml_collections

from fedbert_jax.config.files import read_config


def get_config() -> ml_collections.ConfigDict:
    """Returns the server's config."""
    config = read_config(Path(__file__).with_name("parallel.py"))
    config.task = "serve"
    config.data.tokenizer = "google-bert/bert-base-uncased"  # all parties have it
    config.federated.num_clients = 2
    config.fill_mask = ()
    return config

"""A client of a federation that fine-tunes a classifier, with a folder of its own examples in GLUE's layout:

    .venv/bin/python -m fedbert_jax.main --config configs/join_classifier.py --workdir runs/north \\
        --config.data.source=glue:SST-2@north

The folder holds the task's train.tsv and dev.tsv (without the latter, `--config.finetune.holdout=0.1`). The workdir's name
is the client's. It joins the server of configs/serve_classifier.py, and ends with a classifier in the workdir's hf/.
"""

from pathlib import Path

import ml_collections

from fedbert_jax.config.files import read_config


def get_config() -> ml_collections.ConfigDict:
    """Returns a client's config: the server's, but for the task and the examples."""
    config = read_config(Path(__file__).with_name("serve_classifier.py"))
    config.task = "join"
    config.federated.num_clients = None  # the server says
    return config

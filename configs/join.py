"""A client of a federation on this machine: `--config configs/join.py --workdir runs/north --config.data.source=text:north`.

The workdir's name is the client's (or `--config.network.name=NAME`), and all text of `data.source` is its own. It joins the
server of configs/serve.py, and ends with a model in the workdir's hf/. All settings but the text are the server's, too.
"""

from pathlib import Path

import ml_collections

from fedbert_jax.config.files import read_config


def get_config() -> ml_collections.ConfigDict:
    """Returns a client's config: the server's, but for the task and the text."""
    config = read_config(Path(__file__).with_name("serve.py"))
    config.task = "join"
    config.federated.num_clients = None  # the server says
    config.data.source = "text:"
    return config

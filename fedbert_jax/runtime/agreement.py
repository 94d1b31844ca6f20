"""What the parties of a federation must have the same, and how they tell without showing it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from fedbert_jax import __version__
from fedbert_jax.config import Config, flatten, to_dict
from fedbert_jax.devices.tuning import compute_dtype
from fedbert_jax.runtime.calls import PROTOCOL, Hello

SECTIONS = ("model", "federated", "client_optimizer", "server_optimizer", "aggregator", "mlm", "wire", "precision")
KEYS = ("data.seq_len", "privacy.averaging", "eval.every_rounds", "eval.batch_size", "eval.max_blocks")
# A party's own business: where it finds a checkpoint, and how its machine computes.
OWN = (
    *("model.init_from", "model.preset", "model.remat", "model.unroll_layers", "model.attention", "model.logits_at_once"),
    *("federated.num_clients", "federated.clients_at_once"),
)


def agreed(config: Config) -> dict[str, Any]:
    """Returns the keys of a resolved config that all parties must have the same, with their values.

    What `precision.compute_dtype=auto` is on this machine is among them: rows cross as they are computed.
    """
    values = flatten(to_dict(config)) | {"precision.compute_dtype": compute_dtype(config).name}
    return {k: v for k, v in values.items() if (k.split(".")[0] in SECTIONS or k in KEYS) and k not in OWN}


def hello_of(config: Config, tokenizer: Any, client_seed: int | None, also: Mapping[str, Any] | None = None) -> Hello:
    """Returns what a party says of itself.

    Args:
      config: resolved.
      tokenizer: its own.
      client_seed: the clients' secret; None at the server, which doesn't know it.
      also: what else all parties must have the same, by the name of its key.
    """
    text = json.loads(tokenizer.backend_tokenizer.to_str())
    text.pop("padding", None)  # what was last asked of it, not what it is
    text.pop("truncation", None)
    secret = "" if client_seed is None else _digest(f"fedbert_jax client secret {client_seed}")
    version = f"{__version__} (messages {PROTOCOL})"
    return Hello(agreed(config) | dict(also or {}), _digest(json.dumps(text, sort_keys=True)), secret, version)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

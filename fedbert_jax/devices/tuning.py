"""Every choice that depends on the backend, each with what was measured for it.

No other module asks which backend it runs on. All choices give the same numbers, up to rounding.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fedbert_jax.config import Config
from fedbert_jax.data.masking import num_masked
from fedbert_jax.errors import ConfigError

UNROLLED_CLIENTS = 16
ON_DEVICE_LIMIT = 2**30  # bytes of token blocks that `data.store=auto` puts on the device


def compute_dtype(config: Config) -> Any:
    """Returns the dtype of the arithmetic: `auto` is bfloat16 on accelerators and float32 on CPU."""
    name = config.precision.compute_dtype
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def resolve_attention(config: Config) -> Config:
    """Returns the config with `model.attention` "xla" or "cudnn": "auto" becomes cudnn if that compiles.

    Raises:
      ConfigError: if cudnn is asked for and doesn't compile here.
    """
    model, f = config.model, config.federated
    # If clients have bodies of their own, attention is vmapped over them, which cuDNN's doesn't support.
    possible = f.arrangement.body == "one" and model.attention_dropout == 0 and jax.default_backend() == "gpu"
    if model.attention == "auto" and not possible:
        return dataclasses.replace(config, model=dataclasses.replace(model, attention="xla"))
    if model.attention == "xla":
        return config
    assert model.hidden_size is not None and model.num_heads is not None
    sizes, length = (model.num_heads, model.hidden_size // model.num_heads), config.data.seq_len
    attend = lambda q, k, v: jnp.sum(jax.nn.dot_product_attention(q, k, v, implementation="cudnn"))  # noqa: E731
    try:
        for rows in (length, num_masked(config.mlm.mask_prob, length)):  # queries of the earlier layers, and of the last one
            q, kv = (jax.ShapeDtypeStruct((2, n, *sizes), compute_dtype(config)) for n in (rows, length))
            jax.jit(jax.grad(attend, (0, 1, 2))).lower(q, kv, kv).compile()
    except Exception as e:  # each version has its own ways to refuse
        if model.attention == "cudnn":
            reason = " ".join(str(e).split())[:200].rstrip(".")
            raise ConfigError(f"config key model.attention='cudnn': accepted here: 'auto' or 'xla' ({reason}).") from e
        return dataclasses.replace(config, model=dataclasses.replace(model, attention="xla"))
    return dataclasses.replace(config, model=dataclasses.replace(model, attention="cudnn"))


def keeps_gelu_gradient_apart() -> bool:
    """Whether GELU's gradient is kept out of its neighbours' fusions.

    On CPU the compiler would compute the erf again for the matmul and for the bias's sum, which made the feed-forward's
    backward pass a third slower.
    """
    return jax.default_backend() == "cpu"


def adds_clients_up_in_one_pass(clients: int) -> bool:
    """Whether a sum over clients is unrolled into one fused pass.

    On one CPU it is three times as fast as a contraction, which is right if clients are spread over devices. A term a client
    takes the longer to compile the more there are: for four arrays, 0.6 to 0.8 s with 8 or 16 clients, 6.8 s with 128; the
    contraction takes 0.4 to 0.8 s with any.
    """
    return jax.default_backend() == "cpu" and len(jax.devices()) == 1 and clients <= UNROLLED_CLIENTS


def masks_by_sorting(mesh: Mesh) -> bool:
    """Whether masked positions are found by sorting a row's draws (`MaskSpec.by_sorting`).

    `top_k` is two to four times as fast on a CPU, but with rows on several devices XLA gathers all of them on each.
    """
    return mesh.size > 1


def saves_from_the_buffers() -> bool:
    """Whether orbax may write from the very buffers that are donated to the next round, as it does on CPU."""
    return jax.default_backend() == "cpu"


def seeds_at_once(asked: int | None, seeds: int) -> int:
    """Returns how many seeds of a fine-tuning are trained side by side.

    By default, all of them on an accelerator, where small models leave room, and one on a CPU, which one fills.
    """
    return asked or (1 if jax.default_backend() == "cpu" else seeds)

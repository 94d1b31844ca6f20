"""Devices: the mesh, and where each array lies on it.

Clients and batches lie on the `data` axis; wide dimensions of the body and the tables may be split over `model`. One table
of rules covers parameters and optimizer states alike, by the end of their path; an array that no rule covers is an error.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fedbert_jax.config import MeshConfig
from fedbert_jax.errors import ConfigError

RULES: tuple[tuple[str, P], ...] = (
    # client segment
    (r"embeddings/word/embedding$", P("model", None)),  # [V, D]
    (r"embeddings/(position|token_type)/embedding$", P(None, None)),
    (r"(embeddings|head)/norm/norm/(scale|bias)$", P(None)),
    (r"head/dense/kernel$", P(None, None)),
    (r"head/dense/bias$", P(None)),
    (r"head/bias$", P("model")),  # [V]
    (r"(pooler|classifier)/kernel$", P(None, None)),
    (r"(pooler|classifier)/bias$", P(None)),
    # layers, stacked: the server's body, and the client's layers
    (r"layers/attention/qkv/kernel$", P(None, None, None, "model")),  # [L, D, 3, D]
    (r"layers/attention/qkv/bias$", P(None, None, "model")),  # [L, 3, D]
    (r"layers/attention/out/kernel$", P(None, "model", None)),  # [L, D, D]
    (r"layers/up/kernel$", P(None, None, "model")),  # [L, D, F]
    (r"layers/up/bias$", P(None, "model")),  # [L, F]
    (r"layers/down/kernel$", P(None, "model", None)),  # [L, F, D]
    (r"layers/(attention/out|down)/bias$", P(None, None)),  # [L, D]
    (r"layers/(attention_norm|output_norm)/norm/(scale|bias)$", P(None, None)),
    (r"ranges/(client|server)$", P(None)),  # of averaging in fixed point, [L]
    (r"count$", P()),  # an optimizer's step counter
)


def make_mesh(config: MeshConfig) -> Mesh:
    """Builds the (data, model) mesh over all devices.

    Raises:
      ConfigError: if the sizes don't divide, or don't use, the devices there are.
    """
    devices = len(jax.devices())
    data = devices // config.model if config.data == -1 else config.data
    if jax.process_count() > 1 and data * config.model != devices:
        raise ConfigError(
            f"config keys mesh.data={config.data}, mesh.model={config.model}: accepted with several processes: sizes whose "
            f"product is all their {devices} devices."
        )
    if data < 1 or data * config.model > devices or (config.data == -1 and data * config.model != devices):
        raise ConfigError(
            f"config keys mesh.data={config.data}, mesh.model={config.model}: accepted: sizes whose product is at most "
            f"the {devices} devices here (and divides them, with -1)."
        )
    # Auto axes: the compiler partitions the body. `jax.make_mesh` would default to Explicit ones.
    chosen = jax.devices()[: data * config.model]
    return jax.make_mesh((data, config.model), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=chosen)


def tree_shardings(tree: Any, mesh: Mesh) -> Any:
    """Returns the sharding of every array of a state.

    Args:
      tree: arrays or their shapes; parameters and optimizer states, with or without a leading client axis.
      mesh: from `make_mesh`.

    Raises:
      ValueError: naming the arrays that no rule covers.
    """
    missing: list[str] = []

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = path_name(path)
        spec = _rule(name, leaf.ndim)
        if spec is not None:
            axes = ("data",) * (leaf.ndim - len(spec)) + tuple(spec)
            return NamedSharding(mesh, P(*_divisible(axes, leaf.shape, mesh)))
        missing.append(f"{name} {tuple(leaf.shape)}")
        return NamedSharding(mesh, P())

    shardings = jax.tree_util.tree_map_with_path(one, tree)
    if missing:
        raise ValueError("no sharding rule covers: " + ", ".join(missing))
    return shardings


def path_name(path: tuple[Any, ...]) -> str:
    """Returns the path of an array in a state, such as "model/client/embeddings/word/embedding"."""
    return "/".join(str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)


def has_client_axis(name: str, ndim: int) -> bool:
    """Tells from the name of an array's path whether each client has its own, that is, whether it has a leading axis [N]."""
    spec = _rule(name, ndim)
    return spec is not None and ndim > len(spec)


def _rule(name: str, ndim: int) -> P | None:
    for pattern, spec in RULES:
        if re.search(pattern, name) and ndim - len(spec) in (0, 1):
            return spec
    return None


def put(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Places an array that every process has on the devices. `device_put` would first compare the processes' arrays."""
    return jax.make_array_from_callback(x.shape, sharding, x.__getitem__)


def place(mesh: Mesh, shape: tuple[int, ...], *axes: str | None) -> NamedSharding:
    """Returns the sharding of leading dimensions over these mesh axes; those that don't divide are replicated."""
    return NamedSharding(mesh, P(*_divisible(axes, shape, mesh)))


def constrain(tree: Any, *axes: str | None) -> Any:
    """Constrains the leading dimensions of every array to mesh axes in a jit under `jax.set_mesh`; else does nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return tree
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, P(*_divisible(axes, x.shape, mesh))), tree)


def constrain_clients(tree: Any) -> Any:
    """Constrains arrays with a leading client axis to `data`, and their other dimensions by the rules."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return tree
    specs = jax.tree.map(lambda s: s.spec, tree_shardings(tree, mesh))  # type: ignore[arg-type]
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, specs)


def _divisible(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Any) -> tuple[str | None, ...]:
    """Drops the axes that don't divide their dimension, which is then replicated."""
    return tuple(a if a is not None and n % mesh.shape[a] == 0 else None for a, n in zip(axes, shape, strict=False))

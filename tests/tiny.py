"""The tiny model that the tests share: its config, its strategies, its random text."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedbert_jax import config as config_lib
from fedbert_jax.data.masking import MaskSpec, mask_blocks, num_masked
from fedbert_jax.federated import setting as setting_lib
from fedbert_jax.federated.rounds import make_strategy as _make
from fedbert_jax.federated.setting import Setting
from fedbert_jax.federated.state import Cohort, State, Strategy
from fedbert_jax.models.bert import make_segments

VOCAB, LENGTH = 61, 12


def tiny_config(**changes: Any) -> config_lib.Config:
    """A config of the tiny test model; `changes` are nested sections, `federated=dict(rounds=2)`."""
    values: dict[str, Any] = dict(
        model=dict(hidden_size=16, num_layers=1, num_heads=2, intermediate_size=32, max_position_embeddings=16),
        data=dict(seq_len=LENGTH),
        federated=dict(num_clients=3, local_steps=2, batch_size=2, rounds=4),
        # The key's bias has no gradient except rounding errors (softmax ignores it). Adam would blow these up to full steps,
        # and so drive two equal programs apart: a large eps keeps zero at zero.
        client_optimizer=dict(warmup_steps=2, learning_rate=0.01, eps=1e-3),
        server_optimizer=dict(warmup_steps=2, learning_rate=0.01, eps=1e-3),
        mlm=dict(mask_prob=0.25),
    )
    if changes.get("task") == "finetune":  # fine-tuning has none of these
        del values["federated"]["rounds"], values["mlm"]
        for optimizer in ("client_optimizer", "server_optimizer"):
            del values[optimizer]["warmup_steps"]
    for section, keys in changes.items():
        values[section] = {**values.get(section, {}), **keys} if isinstance(keys, dict) else keys
    config = config_lib.from_dict(values)
    return dataclasses.replace(config, model=config_lib.resolve_model(config.model, VOCAB))


def mask_spec(config: config_lib.Config) -> MaskSpec:
    return MaskSpec(num_masked(config.mlm.mask_prob, config.data.seq_len), VOCAB, 4, (0, 1, 2, 3, 4), None)


def make_setting(config: config_lib.Config, total_steps: int = 100, dtype: Any = jnp.float32) -> Setting:
    f = config.federated
    assert f.num_clients is not None
    return setting_lib.make_setting(
        config,
        make_segments(config.model, dtype),
        functools.partial(mask_blocks, spec=mask_spec(config)),
        f.num_clients,
        f.clients_per_round or f.num_clients,
        (total_steps, 0),
    )


def make_strategy(config: config_lib.Config) -> tuple[Setting, Strategy, State]:
    """The strategy of a config and its first state."""
    setting = make_setting(config)
    strategy = _make(setting)
    return setting, strategy, strategy.init(setting.fresh())


def random_blocks(seed: int, *shape: int) -> jax.Array:
    """Token blocks [*shape, T] that begin with [CLS] and hold a [SEP]."""
    tokens = np.random.default_rng(seed).integers(5, VOCAB, (*shape, LENGTH))
    tokens[..., 0], tokens[..., 5] = 2, 3
    return jnp.asarray(tokens, jnp.int32)


def cohort(
    config: config_lib.Config, clients: int = 3, weights: Any = (0.5, 0.2, 0.3), round: int = 0, seed: int = 0
) -> Cohort:
    """A round's random data for a config."""
    f = config.federated
    rows = random_blocks(seed, f.local_steps, clients, f.batch_size)
    return Cohort(rows, jnp.arange(clients), jnp.asarray(weights, jnp.float32), jnp.int32(round))


@functools.cache
def program(config: config_lib.Config) -> tuple[Setting, Strategy, State, Any]:
    """A config's setting, strategy, first state and compiled round, made once for all tests that ask for them."""
    setting, strategy, state = make_strategy(config)
    return setting, strategy, state, jax.jit(strategy.round)


def assert_trees_close(actual: Any, expected: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    """Compares two pytrees leaf by leaf; names the leaf that differs."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    pairs = zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True)
    for (path, a), b in pairs:
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=rtol, atol=atol, err_msg=jax.tree_util.keystr(path))


def make_simulation(config: config_lib.Config, clients: int = 3, blocks: int = 7) -> Any:
    """A `Simulation` on random blocks: client n has `blocks` + n % 10 of them, and 3 held out."""
    from fedbert_jax.data.blocks import TokenBlocks
    from fedbert_jax.devices.mesh import make_mesh
    from fedbert_jax.runtime.simulation import Simulation

    def store(sizes: list[int], seed: int) -> TokenBlocks:
        tokens = np.asarray(random_blocks(seed, sum(sizes)), np.uint16)
        return TokenBlocks(tokens, np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))

    train = store([blocks + n % 10 for n in range(clients)], seed=1)
    return Simulation(config, train, store([3] * clients, seed=2), mask_spec(config), make_mesh(config.mesh))

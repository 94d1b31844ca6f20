"""Numbers that no config may hold."""

from __future__ import annotations

import math

import pytest

from fedbert_jax.config import all_keys, default_config, flatten, from_dict
from fedbert_jax.config import to_dict as as_dict
from fedbert_jax.errors import ConfigError

FLOATS = [key for key, value in flatten(as_dict(from_dict({}))).items() if isinstance(value, float)]


def nested(key: str, value: object) -> dict:
    for name in reversed(key.split(".")):
        value = {name: value}
    return value  # type: ignore[return-value]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("key", FLOATS)
def test_every_number_is_finite(key, value):
    with pytest.raises(ConfigError, match=rf"^config key {key}={value!r}: accepted: a finite number\.$"):
        from_dict(nested(key, value))


@pytest.mark.parametrize(
    "key, value",
    [
        ("data.partition.alpha", 0.0),
        ("data.partition.alpha", 1e9),
        ("model.layer_norm_eps", 0.0),
        ("model.initializer_range", 0.0),
        ("client_optimizer.b1", 1.0),
        ("server_optimizer.b2", -0.1),
        ("client_optimizer.weight_decay", -1.0),
        ("client_optimizer.eps", -1e-8),
        ("server_optimizer.momentum", 1.5),
    ],
)
def test_a_number_out_of_range_is_refused_by_its_key(key, value):
    with pytest.raises(ConfigError, match=rf"^config key {key}={value!r}: accepted: "):
        from_dict(nested(key, value))


def test_the_floats_are_those_of_the_schema():
    assert {"data.partition.alpha", "mlm.mask_prob", "client_optimizer.learning_rate"} <= set(FLOATS) <= set(all_keys())
    assert from_dict(default_config()) == from_dict({})


@pytest.mark.parametrize(
    "key, value",
    [
        ("federated.rounds", 999_999_999),
        ("federated.local_steps", 2**30),
        ("data.tokenizer", "train:²"),
        ("data.tokenizer", "train:" + "9" * 23),
        ("aggregator.momentum", 5.0),
        ("aggregator.b1", 1.0),
    ],
)
def test_what_no_counter_or_average_can_hold_is_refused(key, value):
    with pytest.raises(ConfigError, match=r"^config key .*: accepted: "):
        from_dict(nested(key, value))

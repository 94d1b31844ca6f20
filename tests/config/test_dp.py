"""Settings under which no epsilon is reported: each is refused in a sentence that names its key."""

from __future__ import annotations

import re

import pytest

from fedbert_jax.config import from_dict
from fedbert_jax.config.dp import check_clients
from fedbert_jax.errors import ConfigError


def noised(**changes: dict) -> dict:
    """A config that is accepted, changed section by section."""
    values = dict(
        federated=dict(num_clients=100, clients_per_round=8, weighting="uniform", client_optimizer_state="reset"),
        privacy=dict(dp="client"),
    )
    return values | {name: {**values.get(name, {}), **change} for name, change in changes.items()}


ROWS = [
    dict(),
    dict(body="merged"),
    dict(body="private", clients_per_round=None),
    dict(strategy="fedavg"),
    dict(clients_per_round=None, client_optimizer_state="keep"),
    dict(clients_at_once=4),
    dict(num_clients=None, clients_per_round=8),
]


@pytest.mark.parametrize("federated", ROWS, ids=str)
def test_what_averages_parameters_is_accepted(federated):
    assert from_dict(noised(federated=federated)).privacy.dp == "client"


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(federated=dict(weighting="examples")), "federated.weighting='examples'"),
        (dict(federated=dict(client_optimizer_state="average")), "federated.client_optimizer_state='average'"),
        (dict(privacy=dict(averaging="blinded")), "privacy.averaging='blinded'"),
        (dict(privacy=dict(dp_noise=0.0)), "privacy.dp_noise=0.0"),
        (dict(privacy=dict(dp_noise=-1.0)), "privacy.dp_noise=-1.0"),
        (dict(privacy=dict(dp_noise=1e-9)), "privacy.dp_noise=1e-09"),
        (dict(privacy=dict(dp_clip=0.0)), "privacy.dp_clip=0.0"),
        (dict(privacy=dict(dp_delta=0.0)), "privacy.dp_delta=0.0"),
        (dict(privacy=dict(dp_delta=1.0)), "privacy.dp_delta=1.0"),
        (dict(federated=dict(num_clients=99)), "privacy.dp='client': accepted: 'none' with 99 clients"),
        (dict(privacy=dict(dp="none", dp_noise=2.0)), "privacy.dp_noise=2.0"),
        (dict(privacy=dict(dp="none", dp_clip=2.0)), "privacy.dp_clip=2.0"),
        (dict(privacy=dict(dp="none", dp_delta=0.1)), "privacy.dp_delta=0.1"),
        (dict(privacy=dict(dp="block")), "privacy.dp='block'"),
    ],
    ids=str,
)
def test_what_has_no_epsilon_is_refused(changes, said):
    values = noised(**changes)
    with pytest.raises(ConfigError, match="^config key " + re.escape(said)) as refused:
        from_dict(values)
    assert "accepted: " in str(refused.value) and "\n" not in str(refused.value) and refused.value.exit_code == 2


@pytest.mark.parametrize(
    "federated",
    [dict(strategy=name) for name in ("sequential", "centralized", "local")] + [dict(average="gradients")],
    ids=str,
)
def test_what_averages_no_parameters_is_refused(federated):
    values = noised(federated=dict(client_optimizer_state="average", clients_per_round=None) | federated)
    assert from_dict(values | {"privacy": {}})
    with pytest.raises(ConfigError, match=r"^config key privacy.dp='client': accepted: 'none' with .* averages no copies"):
        from_dict(values)


@pytest.mark.parametrize(
    "task, changes",
    [
        ("finetune", dict(data=dict(source="glue:SST-2", tokenizer="x", partition=dict(kind="iid")))),
        ("serve", dict(data=dict(tokenizer="x"))),
        ("join", dict(data=dict(tokenizer="x"))),
    ],
)
def test_only_the_simulation_of_pre_training_has_it(task, changes):
    """Over a network, a client would have to clip its own move, which the server can't check."""
    values = noised(**changes) | {"task": task}
    if task == "finetune":
        values["federated"]["clients_per_round"] = None
    assert from_dict(values | {"privacy": {}}).task == task
    with pytest.raises(ConfigError, match=rf"^config key privacy.dp='client': accepted: 'none' with task='{task}'\.$"):
        from_dict(values)


def test_a_hundred_clients_are_enough_and_ninety_nine_are_not():
    config = from_dict(noised(federated=dict(num_clients=None)))
    check_clients(config, 100)
    for few, said in ((99, "99 clients:"), (1, "1 client:")):
        with pytest.raises(ConfigError, match=f"^config key privacy.dp='client': accepted: 'none' with {said} .*100.$"):
            check_clients(config, few)
    check_clients(from_dict({}), 1)

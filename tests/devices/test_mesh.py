"""Sharding: eight devices give what one device gives (invariant 5), and every array has a rule."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from processes import FLAGS
from tiny import make_setting, tiny_config

from fedbert_jax.config import MeshConfig
from fedbert_jax.devices.mesh import make_mesh, tree_shardings
from fedbert_jax.errors import ConfigError
from fedbert_jax.federated.rounds import make_strategy

HERE = Path(__file__).parent


@pytest.mark.slow
def test_eight_devices_give_what_one_gives():
    """Runs in a process of its own, since XLA takes its number of devices at the start."""
    env = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=8 {FLAGS}",
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE.parent)]),
        "JAX_PLATFORMS": "cpu",
    }
    done = subprocess.run([sys.executable, HERE / "eight_devices.py"], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert done.stdout.count("equal:") == 16


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lion", "lamb", "yogi", "adagrad", "nadamw", "adam"])
@pytest.mark.parametrize(
    "federated, wire",
    [({}, {}), (dict(strategy="local"), {}), (dict(average="gradients"), dict(gradient_codec="int8"))],
    ids=["parallel", "local", "gradients"],
)
def test_every_array_of_a_state_has_a_rule(federated, wire, optimizer):
    """The last case's state holds what a codec has lost of each client's gradients; both sides have layers."""
    opt = dict(name=optimizer, eps=None)
    config = tiny_config(
        model=dict(num_layers=2, client_layers=1), federated=federated, wire=wire, client_optimizer=opt, server_optimizer=opt
    )
    setting = make_setting(config)
    rule = make_strategy(setting)
    state = jax.eval_shape(lambda: rule.init(setting.fresh()))
    shardings = tree_shardings(state, make_mesh(MeshConfig()))
    assert jax.tree.structure(shardings) == jax.tree.structure(state)


def test_an_array_without_a_rule_is_named():
    with pytest.raises(ValueError, match=r"no sharding rule covers: new/gate \(3, 4\)"):
        tree_shardings({"new": {"gate": np.zeros((3, 4))}}, make_mesh(MeshConfig()))


@pytest.mark.parametrize("mesh", [dict(data=64), dict(data=-1, model=3), dict(data=2, model=2)])
def test_a_mesh_that_does_not_fit_is_refused(mesh):
    with pytest.raises(ConfigError, match=r"mesh\.data=.*devices here"):
        make_mesh(MeshConfig(**mesh))

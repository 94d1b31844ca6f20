"""What a backend likes is decided in one module, and each choice follows from the backend alone."""

from __future__ import annotations

from pathlib import Path

import jax
import pytest
from tiny import make_simulation, tiny_config

import fedbert_jax
from fedbert_jax.devices import tuning
from fedbert_jax.errors import ConfigError

PACKAGE = Path(fedbert_jax.__file__).parent


def test_no_other_module_asks_which_backend_it_runs_on():
    asks = {str(p.relative_to(PACKAGE)) for p in PACKAGE.rglob("*.py") if "default_backend(" in p.read_text()}
    assert asks == {"devices/tuning.py"}


@pytest.mark.parametrize(
    "backend, choices", [("cpu", (True, True, 1)), ("gpu", (False, False, 5)), ("tpu", (False, False, 5))]
)
def test_choices_follow_the_backend(backend, choices, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    assert (tuning.keeps_gelu_gradient_apart(), tuning.saves_from_the_buffers(), tuning.seeds_at_once(None, 5)) == choices
    assert tuning.seeds_at_once(3, 5) == 3  # what was asked for is done
    assert tuning.compute_dtype(tiny_config()) == ("float32" if backend == "cpu" else "bfloat16")
    for name in ("float32", "bfloat16"):
        assert tuning.compute_dtype(tiny_config(precision=dict(compute_dtype=name))) == name


@pytest.mark.parametrize(
    "backend, devices, clients, expected",
    [("cpu", 1, 16, True), ("cpu", 1, 17, False), ("cpu", 8, 4, False), ("gpu", 1, 4, False)],
)
def test_clients_are_added_up_in_one_pass_if_they_are_few_on_one_cpu(backend, devices, clients, expected, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "devices", lambda: [None] * devices)
    assert tuning.adds_clients_up_in_one_pass(clients) == expected


def test_attention_is_the_compilers_where_cudnn_is_not():
    assert tuning.resolve_attention(tiny_config()).model.attention == "xla"
    with pytest.raises(ConfigError, match=r"model\.attention='cudnn': accepted here: 'auto' or 'xla' \("):
        make_simulation(tiny_config(model=dict(attention="cudnn")))


def test_where_cudnn_does_not_compile_auto_is_the_compilers(monkeypatch):
    """As on a GPU that is too old; where clients have bodies of their own it isn't even tried."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert tuning.resolve_attention(tiny_config()).model.attention == "xla"
    monkeypatch.setattr(tuning.jax, "jit", lambda *_: pytest.fail("cuDNN's attention under vmap"))
    merged = tiny_config(federated=dict(body="merged"))
    assert tuning.resolve_attention(merged).model.attention == "xla"

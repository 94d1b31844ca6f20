"""JAX's platform is printed, a missing platform gives one sentence, and an idle GPU gives a warning."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from fedbert_jax.devices import platforms

ROOT = Path(__file__).parents[2]
START = "from fedbert_jax import cli; from fedbert_jax.devices import platforms; cli.run(lambda: print(platforms.start()))"


def start(setting: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"JAX_PLATFORMS": setting, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", START], env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("setting", ["cdua", "rocm"])
def test_a_platform_that_is_not_there_is_one_sentence(setting):
    done = start(setting)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"error: JAX_PLATFORMS='{setting}': there is no such platform here")
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(any(Path(f"/dev/{d}").exists() for d in ("nvidia0", "nvidiactl", "dxg")), reason="there may be a GPU")
def test_cuda_without_a_gpu_is_one_sentence_and_beside_cpu_a_warning():
    """JAX itself would end in a bare AssertionError, or say nothing."""
    done = start("cuda")
    assert done.returncode == 2 and done.stderr.startswith("error: JAX_PLATFORMS='cuda': there is no such platform here")
    done = start("cuda,cpu")
    assert done.returncode == 0 and "asks for cuda, which isn't there; this runs on cpu." in done.stdout


def test_devices_in_words(monkeypatch):
    assert platforms.describe() == f"{len(jax.devices())} x cpu"

    class H100:
        platform, device_kind = "gpu", "NVIDIA H100 80GB HBM3"

    monkeypatch.setattr(jax, "devices", lambda: [H100()] * 8)
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert platforms.describe() == platforms.describe(8) == "8 x NVIDIA H100 80GB HBM3 (gpu)"
    assert platforms.describe(2) == "2 of 8 x NVIDIA H100 80GB HBM3 (gpu)"


def test_a_gpu_that_jax_cannot_use_is_told_of_in_one_line(capsys):
    """The parent logger logs errors only, as commands set it."""
    logger, parent = logging.getLogger("jax._src.xla_bridge"), logging.getLogger("jax")
    before = parent.level, logger.level, logger.propagate, list(logger.handlers)
    parent.setLevel(logging.ERROR)
    logger.handlers = []  # drops an earlier command's in this process; a failed one also silenced everything
    logging.disable(logging.NOTSET)
    try:
        platforms.tell_what_is_unused()
        logger.warning("An NVIDIA GPU may be present on this machine, but a CUDA-enabled\n  jaxlib is not installed.")
        logger.info("Unable to initialize backend 'tpu'")
        logging.getLogger("jax._src.compiler").warning("something for programmers")
    finally:
        parent.setLevel(before[0])
        logger.setLevel(before[1])
        logger.propagate, logger.handlers = before[2], before[3]
    said = "warning: An NVIDIA GPU may be present on this machine, but a CUDA-enabled jaxlib is not installed.\n"
    assert capsys.readouterr().err == said

"""A small corpus made by a seeded generator, and the command line of a run on it, for tests of whole runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
from forking import environment, start

ROOT = Path(__file__).parents[1]

CONFIG = '''
"""A run of a few seconds, on the text beside it."""
from pathlib import Path

from fedbert_jax.config import default_config


def get_config():
    config = default_config()
    config.data.source = f"text:{Path(__file__).parent / 'text'}"
    config.data.tokenizer = "train:200"
    config.data.seq_len = 16
    config.data.eval_fraction = 0.1
    config.model.hidden_size = 16
    config.model.max_position_embeddings = 32
    config.model.unroll_layers = False
    config.federated.rounds = 12
    config.federated.local_steps = 2
    config.federated.batch_size = 2
    config.checkpoint.every_rounds = 3
    config.eval.every_rounds = 4
    config.eval.batch_size = 8
    config.eval.max_blocks = 8
    config.client_optimizer.warmup_steps = config.server_optimizer.warmup_steps = 4
    config.fill_mask = ("one [MASK] more",)
    return config
'''


def write_corpus(folder: Path, clients: int = 3, documents: int = 30, seed: int = 0) -> Path:
    """Writes text/client_N/*.txt and config.py; returns the config's path."""
    rng = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnoprstuvw"))
    words = ["".join(rng.choice(letters, rng.integers(2, 8))) for _ in range(300)]
    for c in range(clients):
        place = folder / "text" / f"client_{c}"
        place.mkdir(parents=True)
        likely = rng.dirichlet(np.full(300, 0.2))
        texts = [" ".join(rng.choice(words, rng.integers(20, 60), p=likely)) + "." for _ in range(documents + 5 * c)]
        (place / "all.txt").write_text("\n\n".join(texts))
    path = folder / "config.py"
    path.write_text(CONFIG)
    return path


def command(config: Path, workdir: Path, *overrides: str) -> list[str]:
    """The command line that trains."""
    flags = [f"--config.{o}" for o in overrides]
    return [sys.executable, "-m", "fedbert_jax.main", "--config", str(config), "--workdir", str(workdir), *flags]


def run(*args: str | Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Runs a command of the package to its end."""
    command = [str(a) for a in args]
    process = start(command, environment())
    try:
        out, err = process.communicate(timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(command, process.returncode, out, err)

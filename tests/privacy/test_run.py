"""Whole runs of a hundred clients: what is printed and recorded of epsilon, and which runs never begin."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from fedbert_jax import compare
from fedbert_jax.config import from_dict
from fedbert_jax.errors import ConfigError
from fedbert_jax.privacy.accountant import Accountant
from fedbert_jax.train import train

pytest.importorskip("dp_accounting", reason="needs dp-accounting, the extra [privacy]")


def write_clients(folder: Path, clients: int) -> Path:
    """Writes a small text for each of these clients."""
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abcdefgh"), 4)) for _ in range(60)]
    for c in range(clients):
        place = folder / f"client_{c:03}"
        place.mkdir(parents=True)
        texts = [" ".join(rng.choice(words, 40)) + "." for _ in range(4)]
        (place / "all.txt").write_text("\n\n".join(texts))
    return folder


def config_of(text: Path, rounds: int = 2, **changes):
    values = dict(
        seed=1234,
        data=dict(source=f"text:{text}", tokenizer="train:100", seq_len=16, eval_fraction=0.1, deduplicate=False),
        model=dict(hidden_size=16, num_layers=1, num_heads=2, max_position_embeddings=32, unroll_layers=False),
        federated=dict(
            strategy="fedavg",
            clients_per_round=4,
            rounds=rounds,
            local_steps=1,
            batch_size=2,
            weighting="uniform",
            client_optimizer_state="reset",
        ),
        eval=dict(every_rounds=2, max_clients=4, max_blocks=2, batch_size=4),
        client_optimizer=dict(warmup_steps=0),
        server_optimizer=dict(warmup_steps=0),
        privacy=dict(dp="client", dp_noise=2.0, dp_clip=0.1),
    )
    return from_dict(values | changes)


@pytest.mark.slow
def test_a_run_says_and_records_its_epsilon(tmp_path, capsys):
    text, root = write_clients(tmp_path / "text", 100), tmp_path / "run"
    config = config_of(text)
    console = Console(width=2000, record=True)
    assert train(config, root, console) == 0
    said = console.export_text()
    ledger = Accountant(config, 100, 4)
    assert said.index(ledger.sentence(2, over=False)) < said.index("round 0") < said.index(ledger.sentence(2, over=True))
    records = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    assert [r.get("dp_epsilon") for r in records] == [None, ledger.epsilon(1), ledger.epsilon(2)]
    card = (root / "hf" / "README.md").read_text()
    assert ledger.sentence(2, over=True) in card and "1234" not in card and "| seed |" not in card
    assert f"epsilon {ledger.epsilon(2):.3f} at delta 1e-05" in (root / "report" / "index.html").read_text()
    capsys.readouterr()
    assert compare.main([str(root), "--markdown"]) == 0
    shown = capsys.readouterr().out
    assert "epsilon |" in shown and f" {ledger.epsilon(2):.3f} |" in shown


def test_ninety_nine_clients_are_refused_before_anything_is_trained(tmp_path):
    text, root = write_clients(tmp_path / "text", 99), tmp_path / "run"
    with pytest.raises(ConfigError, match=r"^config key privacy.dp='client': accepted: 'none' with 99 clients: ") as refused:
        train(config_of(text), root, Console(quiet=True))
    assert refused.value.exit_code == 2
    assert not (root / "metrics.jsonl").exists() and not (root / "config.json").exists()

"""Pseudo-perplexity against torch, one [MASK] at a time; and a run that it judges, and ends."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from corpus import write_corpus
from rich.console import Console
from test_main import load
from tiny import mask_spec, tiny_config

import fedbert_jax as fb
from fedbert_jax.errors import ConfigError, UserError
from fedbert_jax.federated.perplexity import perplexity, pseudo_log_likelihood
from fedbert_jax.federated.state import Pair
from fedbert_jax.models.bert import make_segments
from fedbert_jax.train import train

QUIET = Console(quiet=True)


@pytest.mark.parametrize("length", [16, 13, 21])
def test_padding_of_the_places_asks_for_nothing_twice(length):
    """Against a loop over tokens, each masked in a batch of its own."""
    import jax.numpy as jnp

    from fedbert_jax.data.masking import MaskedBatch
    from fedbert_jax.federated.joined import joined_logits

    config = tiny_config(model=dict(max_position_embeddings=32))
    segments, spec = make_segments(config.model), mask_spec(config)
    model = Pair(*segments.init(jax.random.key(0), jax.random.key(1)))
    rng = np.random.default_rng(length)
    tokens = rng.integers(5, spec.vocab_size, (2, length)).astype(np.int32)
    asked = rng.random((2, length)) < 0.7
    found = jax.jit(lambda m: pseudo_log_likelihood(segments, m, jnp.asarray(tokens), jnp.asarray(asked), spec.mask_id))(
        model
    )
    logits = jax.jit(lambda batch: jax.nn.log_softmax(joined_logits(segments, model.client, model.server, batch)[0, 0]))
    for row in range(2):
        loss = 0.0
        for t in np.flatnonzero(asked[row]):
            hidden = tokens[row : row + 1].copy()
            hidden[0, t] = spec.mask_id
            where = jnp.full((1, 1), t, jnp.int32)
            loss -= float(logits(MaskedBatch(jnp.asarray(hidden), where, where, jnp.ones((1, 1))))[tokens[row, t]])
        np.testing.assert_allclose(found[row], [loss, asked[row].sum()], rtol=2e-6)
    assert perplexity(found) == pytest.approx(math.exp(float(found[:, 0].sum() / found[:, 1].sum())), rel=1e-6)
    assert math.isnan(perplexity(np.zeros((1, 2))))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A config, its text, and another text beside it, of the same words."""
    place = tmp_path_factory.mktemp("neutral")
    config = write_corpus(place, clients=2, documents=12)
    (place / "neutral.txt").write_text((place / "text/client_1/all.txt").read_text()[-900:])
    return config


def run_of(place: Path, root: Path, **changes) -> fb.Run:
    small = dict(federated__rounds=4, eval__every_rounds=1, model__num_layers=1, federated__local_steps=1)
    config = load(
        place, **small | {"eval__extra": f"text:{place.parent / 'neutral.txt'}", "eval__extra_blocks": 3} | changes
    )
    return fb.Run(root, config)


def test_a_run_is_judged_by_it_as_torch_judges_its_export(place, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    run = run_of(place, tmp_path / "run")
    run.train(progress=False)
    found = run.metrics()["eval_extra_perplexity"]
    assert len(found) == 5 and np.isfinite(found).all() and found[4] < found[0]
    tokens = np.load(tmp_path / "run/data/extra.npy")
    assert tokens.shape == (3, 16)
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "run/hf").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run/hf")
    losses = []
    for row in tokens:
        for t in range(16):
            if row[t] not in tokenizer.all_special_ids:
                hidden = torch.tensor(row[None].astype(np.int64))
                hidden[0, t] = tokenizer.mask_token_id
                with torch.no_grad():
                    losses.append(-float(torch.log_softmax(model(hidden).logits[0, t], -1)[row[t]]))
    assert found[4] == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
    again = run.perplexity(f"text:{place.parent / 'neutral.txt'}", 3)
    assert again == {"": pytest.approx(found[4], rel=1e-6)}
    own = run.perplexity(blocks=2)
    assert own.keys() == {"client_0", "client_1"} and all(1 < value < 1000 for value in own.values())
    (tmp_path / "short.txt").write_text("one")
    with pytest.raises(UserError, match="less than a block of 16 tokens"):
        run.perplexity(f"text:{tmp_path / 'short.txt'}")


def test_each_client_has_a_model_of_its_own_judged(place, tmp_path):
    run = run_of(place, tmp_path / "run", federated__strategy="local", federated__rounds=1)
    run.train(progress=False)
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    each = [score["perplexity"] for score in last["eval_extra_clients"].values()]
    assert last["eval_extra_clients"].keys() == {"client_0", "client_1"} and each[0] != each[1]
    assert last["eval_extra_perplexity"] == pytest.approx(np.mean(each))
    assert run.perplexity(f"text:{place.parent / 'neutral.txt'}", 3) == pytest.approx(
        {name: score["perplexity"] for name, score in last["eval_extra_clients"].items()}
    )


def test_a_run_that_no_longer_improves_ends_early_and_stays_ended(place, tmp_path, capsys):
    """With a rate of nothing, no evaluation is better than the first: two more, and it is over."""
    still = {
        f"{side}_optimizer__{key}": 0.0 for side in ("client", "server") for key in ("learning_rate", "end_learning_rate")
    }
    still = {key: 1e-30 if key.endswith("__learning_rate") else value for key, value in still.items()}
    run = run_of(place, tmp_path / "run", eval__patience=2, checkpoint__every_rounds=50, **still)
    assert run.train() is True
    said = capsys.readouterr().out
    assert "ended after round 2 of 4: 2 evaluations in a row were no better than the best" in said
    assert re.search(r"pseudo-perplexity of eval\.extra [\d.]+ \(3 blocks\)", said)
    assert run.round == 2 and run.finished
    facts = json.loads((tmp_path / "run/run.json").read_text())
    assert facts["ended_early_after"] == 2 and (tmp_path / "run/hf/model.safetensors").is_file()
    assert fb.Run(tmp_path / "run").train(progress=False) is True and run.round == 2
    longer = run_of(place, tmp_path / "run", eval__patience=None, checkpoint__every_rounds=50, resume="force", **still)
    assert longer.train(progress=False) is True and longer.round == 4
    assert json.loads((tmp_path / "run/run.json").read_text())["ended_early_after"] is None


def test_improving_runs_go_on_and_held_out_loss_judges_without_a_text(place, tmp_path):
    run = run_of(place, tmp_path / "run", eval__extra="", eval__patience=1)
    assert train(run.config, tmp_path / "run", QUIET) == 0
    losses = run.metrics()["eval_loss"].tolist()
    best = [min(losses[:n]) for n in range(1, len(losses))]
    stale = [n for n, (loss, before) in enumerate(zip(losses[1:], best, strict=True), 1) if loss >= before]
    assert run.round == (stale[0] if stale else 4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"eval.extra": "file"}, "eval.extra='file': accepted: '', or 'text:GLOB'"),
        ({"eval.extra_blocks": 0}, "eval.extra_blocks=0: accepted: an integer of at least 1"),
        ({"eval.patience": 0}, "eval.patience=0: accepted: an integer of at least 1"),
    ],
)
def test_what_cannot_be_is_refused(changes, words):
    with pytest.raises(ConfigError) as caught:
        fb.load_config("demo", changes)
    assert words in str(caught.value)


def test_a_federation_over_a_network_has_none():
    with pytest.raises(ConfigError, match=r"eval\.patience=3"):
        fb.load_config("serve", {"eval.patience": 3, "data.tokenizer": "x"})

"""The exported model, loaded by `transformers`, is the run's own; the run's report and facts are there."""

from __future__ import annotations

import json
import sys

import jax
import numpy as np
import pytest
from corpus import run, write_corpus
from rich.console import Console
from test_main import load

from fedbert_jax import errors, export
from fedbert_jax import run as run_lib
from fedbert_jax.checkpoint import Checkpoints
from fedbert_jax.federated.evaluation import eval_batch
from fedbert_jax.train import train
from fedbert_jax.workdir import Workdir

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run with a body of each client's own."""
    folder = tmp_path_factory.mktemp("export")
    config = load(write_corpus(folder), federated__body="private", federated__rounds=4)
    workdir = Workdir(folder / "run")
    assert train(config, workdir.root, Console(quiet=True)) == 0
    return workdir


def test_torch_gives_the_runs_own_loss_on_the_same_masked_text(trained, tmp_path):
    """Invariant 7, end to end: each client's exported model, on its held-out blocks as the run masked them."""
    built = run_lib.build(trained.read_config(), trained)
    simulation, names = built.simulation, built.dataset.client_names
    state, _ = run_lib.restore(built, Checkpoints(trained.checkpoints), 4)
    last = json.loads(trained.metrics.read_text().splitlines()[-1])
    data = jax.device_get(simulation._eval_set)
    for c, name in enumerate(names):
        run_lib.export(built, state, tmp_path / name, {}, name)
        model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / name).eval()
        total = right = count = 0.0
        for n in np.flatnonzero(data.clients == c):
            batch = eval_batch(simulation.config.seed, data.tokens[n], data.batch_ids[n], simulation.setting.mask)
            tokens, positions, labels, weights = (np.array(x) for x in batch[:4])
            weights = torch.tensor(weights * data.real[n][:, None])
            with torch.no_grad():
                logits = model(torch.tensor(tokens).long()).logits
            at = torch.take_along_dim(logits, torch.tensor(positions).long()[..., None], dim=1)
            labels = torch.tensor(labels).long()
            nll = torch.nn.functional.cross_entropy(at.flatten(0, 1), labels.flatten(), reduction="none")
            total += float((nll * weights.flatten()).sum())
            right += float(((at.argmax(-1) == labels) * weights).sum())
            count += float(weights.sum())
        ours = last["eval_clients"][name]
        assert abs(total / count - ours["loss"]) < 1e-4
        assert abs(right / count - ours["accuracy"]) < 1e-6


def test_the_pipeline_fills_in_what_the_run_filled_in(trained):
    facts = json.loads(trained.facts.read_text())
    (filled,) = facts["fill_mask"]
    pipe = transformers.pipeline("fill-mask", model=str(trained.hf), tokenizer=str(trained.hf))
    theirs = pipe(filled["text"], top_k=5)
    assert [p["token_str"].strip() for p in theirs] == [t for t, _ in filled["predictions"]]
    np.testing.assert_allclose([p["score"] for p in theirs], [p for _, p in filled["predictions"]], rtol=1e-4)


def test_a_finished_run_has_everything(trained):
    names = {p.name for p in trained.root.iterdir()}
    assert {"config.json", "metrics.jsonl", "run.json", "checkpoints", "hf", "report", "data"} <= names
    records = [json.loads(line) for line in trained.metrics.read_text().splitlines()]
    keys = {"round", "step", "tokens", "train_loss", "seconds", "tokens_per_second", "uplink_bytes", "downlink_bytes"}
    assert all(keys <= r.keys() for r in records[1:])
    assert [r["round"] for r in records] == list(range(5))
    assert {"eval_loss", "eval_accuracy", "eval_clients"} <= records[-1].keys()
    assert (trained.root / "report" / "index.html").stat().st_size > 10_000
    card = (trained.hf / "README.md").read_text()
    assert "parallel (private body)" in card and "exported client" in card


def test_the_export_command_exports_the_client_named(trained, tmp_path):
    command = [sys.executable, "-m", "fedbert_jax.export", "--workdir", trained.root]
    done = run(*command, "--out", tmp_path / "b", "--client", "client_1")
    assert done.returncode == 0, done.stderr
    assert "client_1" in done.stdout
    a, b = (transformers.AutoModelForMaskedLM.from_pretrained(d).state_dict() for d in (trained.hf, tmp_path / "b"))
    name = "bert.encoder.layer.0.output.dense.weight"
    assert not torch.equal(a[name], b[name])
    shared = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(a[shared], b[shared])
    done = run(*command, "--out", tmp_path / "c", "--client", "nobody")
    assert done.returncode == 2
    assert "no client 'nobody'" in done.stderr and "client_0, client_1" in done.stderr
    done = run(*command, "--out", tmp_path / "c", "--round", "3")  # there are checkpoints of rounds 3 and 4
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("round 3 of client client_0")
    c = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "c").state_dict()
    assert not torch.equal(c[shared], a[shared])
    done = run(sys.executable, "-m", "fedbert_jax.export", "--workdir", tmp_path, "--out", tmp_path / "d")
    assert done.returncode == 2 and "no workdir of a run" in done.stderr


@pytest.mark.parametrize("round", ["2", "0", "-1", "5"])
def test_a_round_without_a_checkpoint_is_refused(trained, tmp_path, monkeypatch, round):
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["export", "--workdir", str(trained.root), "--out", str(out), "--round", round])
    with pytest.raises(errors.UserError, match=rf"no checkpoint of round {round}; it has \[3, 4\]"):
        export.main()
    assert not out.exists()


def test_a_run_may_start_from_an_exported_model(trained, tmp_path):
    """`model.init_from`: sizes and tokenizer are the checkpoint's, and the first evaluation is its last."""
    config = trained.read_config()
    source = config.data.source
    start = load(
        tmp_path_config(tmp_path, source), model__init_from=str(trained.hf), data__tokenizer=str(trained.hf),
        model__hidden_size=None, federated__rounds=1,
    )  # fmt: skip
    workdir = Workdir(tmp_path / "next")
    assert train(start, workdir.root, Console(quiet=True)) == 0
    assert workdir.read_config().model.hidden_size == 16
    first = json.loads(workdir.metrics.read_text().splitlines()[0])
    facts = json.loads((trained.metrics).read_text().splitlines()[-1])
    own = facts["eval_clients"]["client_0"]["loss"]
    assert abs(first["eval_clients"]["client_0"]["loss"] - own) < 0.05  # its own client's text, masked alike


def tmp_path_config(folder, source):
    from corpus import CONFIG

    path = folder / "config.py"
    path.write_text(CONFIG.replace("f\"text:{Path(__file__).parent / 'text'}\"", repr(source)))
    return path

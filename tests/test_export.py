"""The exported model, loaded by `transformers`, is the run's own; the run's report and facts are there."""

from __future__ import annotations

import json
import shutil
import signal
import sys

import jax
import numpy as np
import pytest
from corpus import run, write_corpus
from rich.console import Console
from safetensors.numpy import load_file
from test_main import load

from fedbert_jax import experiment as run_lib
from fedbert_jax import export as export_command
from fedbert_jax.data.streams import secrets
from fedbert_jax.errors import ConfigError, UserError
from fedbert_jax.federated import evaluation
from fedbert_jax.train import train
from fedbert_jax.workdir.checkpoint import Checkpoints
from fedbert_jax.workdir.paths import Workdir
from fedbert_jax.workdir.resume import stamp

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run in which each client has a body of its own."""
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
    data, spec = jax.device_get(simulation._eval_set), simulation.setting.prepare.keywords["spec"]
    for c, name in enumerate(names):
        run_lib.export(built, state, tmp_path / name, {}, name)
        model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / name).eval()
        total = right = count = 0.0
        for n in np.flatnonzero(data.clients == c):
            one = jax.tree.map(lambda x, n=n: x[n], data)
            batch = evaluation.masked(secrets(simulation.feed.seeds), one, spec)
            tokens, positions, labels, weights = (np.array(x) for x in batch[:4])
            at_masked = np.take_along_axis(tokens, positions, axis=1)
            assert (at_masked[weights > 0] == spec.mask_id).all()
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
    assert "parallel (private body)" in card and "whose model" in card


def export(monkeypatch, workdir, out, *more):
    """The command, in this process."""
    monkeypatch.setattr(sys, "argv", ["export", "--workdir", str(workdir), "--out", str(out), *more])
    with monkeypatch.context() as patched:
        patched.setattr(signal, "signal", lambda *_: None)
        export_command.main()


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


def test_the_export_command_takes_the_round_asked_for_and_says_what_is_wrong(trained, tmp_path, monkeypatch, capsys):
    export(monkeypatch, trained.root, tmp_path / "a", "--round", "3")
    assert f"round 3 of client client_0 is in {tmp_path / 'a'}" in capsys.readouterr().out
    name = "bert.embeddings.word_embeddings.weight"
    a, b = (load_file(d / "model.safetensors")[name] for d in (tmp_path / "a", trained.hf))
    assert not np.array_equal(a, b)
    assert "| rounds | 3, each of" in (tmp_path / "a" / "README.md").read_text()
    for workdir, out, more, message in (
        (trained.root, "b", ("--client", "nobody"), "--client 'nobody': there is no client of that name.*client_1"),
        (trained.root, "b", ("--round", "2"), "--round 2: there is no such checkpoint; accepted: 3, 4"),
        (tmp_path, "b", (), "no workdir of a run"),
        (trained.root, trained.hf, (), "--out: .*a run's workdir"),
        (trained.root, "", (), "--out is empty"),
        (trained.root, tmp_path / "b", ("--license", "GPL 3"), r"export\.license='GPL 3': accepted"),
    ):
        with pytest.raises(UserError, match=message):
            export(monkeypatch, workdir, tmp_path / out if out == "b" else out, *more)
    assert not (tmp_path / "b").exists()


def test_an_export_needs_neither_the_runs_devices_nor_what_it_began_with(trained, tmp_path, monkeypatch):
    """Two devices, text in device memory, a starting checkpoint and a tokenizer that are gone: none of it is needed."""
    workdir = Workdir(tmp_path / "copy")
    shutil.copytree(trained.root, workdir.root)
    config = json.loads(workdir.config.read_text())
    config["mesh"] = {"data": 2, "model": 1}
    config["precision"]["compute_dtype"] = "bfloat16"
    config["federated"]["clients_at_once"] = None
    config["data"]["store"] = "device"
    config["model"] |= {"init_from": "models/gone", "attention": "auto"}
    config["export"] |= {"base_model": "", "license": "mit"}
    config["data"]["tokenizer"] = str(tmp_path / "gone")
    workdir.config.write_text(json.dumps(config))
    for saved in workdir.checkpoints.glob("*/meta/metadata"):  # so that it says the same, as if the run had been begun so
        saved.write_text(json.dumps(json.loads(saved.read_text()) | {"config": stamp(workdir.read_config())}))
    meta = workdir.data / "meta.json"
    prepared = json.loads(meta.read_text())
    prepared["origin"]["tokenizer"] = config["data"]["tokenizer"]
    meta.write_text(json.dumps(prepared))

    out = tmp_path / "out"
    assert jax.device_count() == 1
    with pytest.raises(ConfigError, match="mesh"):
        run_lib.build(workdir.read_config(), workdir, begun=True)
    export(monkeypatch, workdir.root, out)
    mine, theirs = (load_file(d / "model.safetensors") for d in (out, trained.hf))
    assert mine.keys() == theirs.keys() and all(np.array_equal(mine[k], theirs[k]) for k in mine)
    card = (out / "README.md").read_text()
    assert "license: mit" in card and "models/gone" not in card and str(tmp_path) not in card
    scores = json.loads(workdir.metrics.read_text().splitlines()[-1])["eval_clients"]
    assert f"| this client's own held-out text | {scores['client_0']['loss']:.3f} |" in card
    export(monkeypatch, workdir.root, out, "--client", "client_2", "--license", "apache-2.0", "--language", "en")
    card = (out / "README.md").read_text()
    assert "license: apache-2.0" in card and f"{scores['client_2']['loss']:.3f} |" in card
    shutil.rmtree(workdir.data)
    with pytest.raises(UserError, match="no prepared text"):  # and none is prepared in a workdir that others may use
        export(monkeypatch, workdir.root, out)
    assert not workdir.data.exists() and (out / "README.md").read_text() == card


def test_a_run_with_something_of_somebodys_in_its_hf_is_refused_before_it_begins(trained, tmp_path):
    (tmp_path / "w" / "hf").mkdir(parents=True)
    (tmp_path / "w" / "hf" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="hf is not empty, and no earlier export"):
        train(trained.read_config(), tmp_path / "w", Console(quiet=True))
    assert not (tmp_path / "w" / "config.json").exists()


@pytest.mark.parametrize("round", ["2", "0", "-1", "5"])
def test_a_round_without_a_checkpoint_is_refused(trained, tmp_path, monkeypatch, round):
    with pytest.raises(UserError, match=rf"^--round {round}: there is no such checkpoint; accepted: 3, 4\.$"):
        export(monkeypatch, trained.root, tmp_path / "out", "--round", round)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_run_may_start_from_an_exported_model(trained, tmp_path):
    """`model.init_from`: sizes and tokenizer are the checkpoint's, and the first evaluation is its last."""
    config = trained.read_config()
    source = config.data.source
    start = load(
        tmp_path_config(tmp_path, source),
        model__init_from=str(trained.hf),
        data__tokenizer=str(trained.hf),
        model__hidden_size=None,
        federated__rounds=1,
    )
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


def test_the_model_of_an_edited_config_is_not_exported(trained, tmp_path, monkeypatch):
    """It would compute something other than the model that was trained."""
    shutil.copytree(trained.root, tmp_path / "run")
    config = tmp_path / "run" / "config.json"
    config.write_text(config.read_text().replace('"layer_norm_eps": 1e-12', '"layer_norm_eps": 0.001'))
    monkeypatch.setattr(sys, "argv", ["export", "--workdir", str(tmp_path / "run"), "--out", str(tmp_path / "out")])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with pytest.raises(ConfigError, match=r"round 4 was made with: model\.layer_norm_eps \(was 1e-12, now 0\.001\)"):
        export_command.main()
    assert not (tmp_path / "out").exists()

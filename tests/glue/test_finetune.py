"""Fine-tuning: its logits and steps are torch's, seeds train side by side as they do one by one, and a run goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import corpus
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from forking import environment, start
from rich.console import Console
from sentences import make_config, write_glue, write_tokenizer
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel, BertTokenizerFast, pipeline

from fedbert_jax import config as config_lib
from fedbert_jax.data.streams import Seeds
from fedbert_jax.devices.interrupts import Interrupts
from fedbert_jax.errors import ConfigError, DivergedError, UserError
from fedbert_jax.federated.finite import NotFiniteError
from fedbert_jax.federated.metrics import RoundMetrics
from fedbert_jax.federated.state import State
from fedbert_jax.glue import command as command
from fedbert_jax.glue import finetune as ft
from fedbert_jax.glue import job, sequences
from fedbert_jax.glue.sequences import ExampleStream, encode, take
from fedbert_jax.report.runs import load_run
from fedbert_jax.workdir.paths import Workdir

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> BertTokenizerFast:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_glue(tmp_path_factory.mktemp("glue"))


def make(config: config_lib.Config, tokenizer: BertTokenizerFast, seeds: tuple[int, ...] = (0,)) -> ft.Finetuning:
    config, start = ft.resolve(config, tokenizer)
    return ft.Finetuning(config, ft.read_task(config, tokenizer), start, seeds)


@pytest.mark.parametrize("task", ["SST-2", "STS-B"])
def test_logits_and_steps_are_those_of_torch(task: str, tokenizer: BertTokenizerFast, glue: Path, tmp_path: Path) -> None:
    tuning = make(make_config(tokenizer, glue, task, model=dict(num_layers=2)), tokenizer)
    state, _ = tuning.init_state()
    ft.export(tuning, state, tokenizer, tmp_path / "before")
    batches = tuning.batches(0)
    state, metrics = tuning.step(state, 0)

    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "before", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    ).train()  # an export's dropout is for further training: the run has none
    plain = [p for p in model.parameters() if p.ndim < 2]
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    groups = [dict(params=decayed), dict(params=plain, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.01, eps=1e-3)
    losses = []
    for k in range(2):
        b = jax.tree.map(lambda x, k=k: torch.from_numpy(np.asarray(x[0, k, 0])), batches)
        mask = (torch.arange(b.tokens.shape[1])[None] < b.lengths[:, None]).long()
        labels = b.labels[:, 0] if task == "STS-B" else b.labels[:, 0].long()
        loss = model(b.tokens.long(), attention_mask=mask, token_type_ids=b.token_types.long(), labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    np.testing.assert_allclose(float(metrics.loss[0]), np.mean(losses), rtol=1e-5)

    ft.export(tuning, state, tokenizer, tmp_path / "after")
    ours = AutoModelForSequenceClassification.from_pretrained(tmp_path / "after").eval()
    for (name, a), b in zip(ours.named_parameters(), model.parameters(), strict=True):
        np.testing.assert_allclose(a.detach(), b.detach(), rtol=1e-5, atol=2e-6, err_msg=name)
    dev = tuning.data.dev["dev"]
    mask = torch.arange(dev.tokens.shape[1])[None] < torch.from_numpy(dev.lengths)[:, None]
    types = torch.from_numpy(dev.token_types).long()
    with torch.no_grad():
        theirs = ours(torch.from_numpy(dev.tokens).long(), attention_mask=mask.long(), token_type_ids=types).logits
    np.testing.assert_allclose(tuning.logits(state.model, dev)[0], theirs, atol=1e-4)


@pytest.mark.slow
def test_seeds_side_by_side_are_seeds_one_by_one(
    tokenizer: BertTokenizerFast, glue: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This also holds if a round is padded further for another seed's sake."""
    monkeypatch.setattr(sequences, "BUCKETS", (11, 13))
    dropout = dict(hidden_dropout=0.1, attention_dropout=0.1)
    config = make_config(tokenizer, glue, model=dropout)
    padded: dict[tuple[int, ...], list[int]] = {}

    one = make(config, tokenizer, (0,))

    def losses(seeds: tuple[int, ...]) -> np.ndarray:
        tuning = one.for_seeds(seeds)  # two seeds have a program of their own
        (state, _), found = tuning.init_state(), []
        for n in range(2):
            state, metrics = tuning.step(state, n)
            found.append(metrics.loss)
            padded.setdefault(seeds, []).append(tuning.batches(n).tokens.shape[-1])
        return np.stack([*found, tuning.logits(state.model, tuning.data.dev["dev"]).sum((1, 2))], axis=1)

    together = losses((0, 1))
    np.testing.assert_allclose(together[0], losses((0,))[0], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(together[1], losses((1,))[0], rtol=1e-5, atol=1e-4)
    assert padded[0,] != padded[0, 1] or padded[1,] != padded[0, 1]
    assert abs(together[0] - together[1]).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["parallel", "sequential"])
def test_one_client_across_the_cut_is_centralized(strategy: str, tokenizer: BertTokenizerFast, glue: Path) -> None:
    """Padding, token types and all three dropouts cross the cut: STS-B has pairs of different lengths."""

    def trained(name: str) -> tuple[float, object]:
        config = make_config(
            tokenizer,
            glue,
            "STS-B",
            federated=dict(strategy=name, num_clients=1),
            data=dict(partition=dict(kind="iid")),
            model=dict(hidden_dropout=0.1, attention_dropout=0.1),
        )
        tuning = make(config, tokenizer)
        (state, _), batches = tuning.init_state(), tuning.batches(0)
        assert len(set(np.ravel(batches.lengths))) > 1 and np.any(batches.token_types)
        state, metrics = tuning.step(state, 0)
        return float(metrics.loss[0]), state.model

    (loss, model), (expected, reference) = trained(strategy), trained("centralized")
    assert loss == pytest.approx(expected, rel=1e-6)
    for a, b in zip(jax.tree.leaves(model), jax.tree.leaves(reference), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "kind", [dict(), dict(average="gradients"), dict(strategy="sequential"), dict(strategy="fedavg")], ids=str
)
def test_a_classifier_is_trained_across_clients(kind: dict, tokenizer: BertTokenizerFast, glue: Path) -> None:
    """What it learns holds for sentences that no client has, a third of which say "good" and so are positive."""
    adamw = dict(learning_rate=5e-3, eps=1e-6)
    config = make_config(
        tokenizer,
        glue,
        federated=dict(num_clients=3, **{"strategy": "parallel", **kind}),
        finetune=dict(epochs=36.0),
        data=dict(partition=dict(kind="dirichlet", alpha=1.0)),
        client_optimizer=adamw,
        server_optimizer=adamw,
    )
    tuning = make(config, tokenizer)
    assert sorted(np.concatenate(tuning.clients)) == list(range(72))
    state, _ = tuning.init_state()
    for n in range(tuning.rounds):
        state, _ = tuning.step(state, n)
    dev = tuning.data.dev["dev"]
    always_one_label = max(dev.labels.mean(), 1 - dev.labels.mean())
    right = (tuning.logits(state.model, dev)[0].argmax(-1) == dev.labels).mean()
    assert always_one_label < 0.7 and right > 0.9


def test_a_run_ends_in_a_classifier_and_goes_on(tokenizer: BertTokenizerFast, glue: Path, tmp_path: Path) -> None:
    (tmp_path / "glue" / "SST-2").mkdir(parents=True)
    for path in (glue / "SST-2").iterdir():
        (tmp_path / "glue" / "SST-2" / path.name).write_bytes(path.read_bytes())
    glue, tmp_path = tmp_path / "glue", tmp_path / "workdir"
    assert ft.finetune(make_config(tokenizer, glue), tmp_path, QUIET) == 0  # one seed; then another, and predictions
    assert not (tmp_path / "predictions").exists()
    first = (tmp_path / "metrics-seed-0.jsonl").read_bytes(), (tmp_path / "hf" / "model.safetensors").read_bytes()
    config = make_config(tokenizer, glue, finetune=dict(seeds=2, predict=True))
    assert ft.finetune(config, tmp_path, QUIET) == 0
    assert first == ((tmp_path / "metrics-seed-0.jsonl").read_bytes(), (tmp_path / "hf" / "model.safetensors").read_bytes())
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results["values"]) == 2 and results["median"] == pytest.approx(np.median(results["values"]))
    found = pipeline("text-classification", model=str(tmp_path / "hf"), device="cpu")("a good film")
    assert found[0]["label"] in ("negative", "positive")
    assert json.loads((tmp_path / "hf" / "tokenizer.json").read_text())["truncation"] is None
    card = (tmp_path / "hf" / "README.md").read_text()
    own = results["seeds"]["0"]["dev"]["accuracy"]
    assert f"| accuracy on the dev set | {100 * own:.1f} |" in card and f"median {100 * results['median']:.1f}," in card
    assert {p.name for p in (tmp_path / "hf").iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())["model_max_length"] == 32
    lines = (tmp_path / "predictions" / "SST-2.tsv").read_text().splitlines()
    assert lines[0] == "index\tprediction" and len(lines) == 3

    # As if it had been killed in the second seed, after its first epoch's checkpoint.
    log = (tmp_path / "metrics-seed-1.jsonl").read_bytes()
    (tmp_path / "results.json").write_text(json.dumps({"seeds": {"0": results["seeds"]["0"]}}))
    assert ft.finetune(config, tmp_path, QUIET) == 0
    again = json.loads((tmp_path / "results.json").read_text())
    assert again["seeds"] == results["seeds"] and (tmp_path / "metrics-seed-1.jsonl").read_bytes() == log
    with pytest.raises(ConfigError, match="batch_size"):
        ft.finetune(make_config(tokenizer, glue, federated=dict(batch_size=4)), tmp_path, QUIET)
    (tmp_path / "config.json").unlink()  # run.json knows it too
    with pytest.raises(ConfigError, match=r"run\.json was made with another config: federated\.batch_size \(was 8, now 4\)"):
        ft.finetune(make_config(tokenizer, glue, federated=dict(batch_size=4)), tmp_path, QUIET)
    (tmp_path / "config.json").write_text(json.dumps(dict(task="finetune")))
    with pytest.raises(UserError, match="is a run of fine-tuning"):
        load_run(tmp_path)  # as report and compare do
    with (glue / "SST-2" / "dev.tsv").open("a") as file:
        file.write("a good song\t1\n")
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"data\.source names, or the tokenizer, has changed"):
        ft.finetune(config, tmp_path, QUIET)


def test_a_folder_of_somebodys_is_noticed_before_training(tokenizer: BertTokenizerFast, glue: Path, tmp_path: Path) -> None:
    (tmp_path / "w" / "hf" / "mine").mkdir(parents=True)
    with pytest.raises(UserError, match=r"w/hf is not empty, and no earlier export of this program: it holds 'mine'"):
        ft.finetune(make_config(tokenizer, glue), tmp_path / "w", QUIET)
    assert not (tmp_path / "w" / "config.json").exists()


def test_what_became_of_a_checkpoints_classifier_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    class Tuning:
        """A fine-tuning with nothing to train."""

        seeds, rounds, state_shape, state_sharding = (0,), 0, None, None
        data = SimpleNamespace(task=SimpleNamespace(name="RTE"))

        def __init__(self, said: str):
            self.start = ft.Checkpoint({}, said)

        def init_state(self) -> tuple[None, list[str]]:
            return None, ["bert.pooler.dense.weight", "classifier.weight", "classifier.bias"]

    for said in ("it is not used [bold]here", ""):
        job.SeedGroup(Tuning(said), Console(width=200)).begin()
        printed = capsys.readouterr().out
        assert "the pooler (1 tensor: bert.pooler.dense.weight)" in printed
        assert ("it is not used [bold]here" in printed) == bool(said) and ("the classifier (2" in printed) == (not said)


def test_a_seed_that_is_not_finite_is_named_and_nothing_is_written(
    tokenizer: BertTokenizerFast, glue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is one of two seeds side by side, and its loss doesn't show it yet."""

    def step(self: ft.Finetuning, state: State, n: int) -> tuple[State, RoundMetrics]:
        bias = state.model.server["layers"]["up"]["bias"]
        state.model.server["layers"]["up"]["bias"] = bias.at[1].set(jnp.nan)
        return state, RoundMetrics(*jnp.ones((3, 2)), jnp.zeros((2, 1), jnp.int32))

    monkeypatch.setattr(ft.Finetuning, "step", step)
    config = make_config(tokenizer, glue, finetune=dict(seeds=2, seeds_at_once=2, epochs=0.2))
    with pytest.raises(
        DivergedError,
        match=r"SST-2, round 1: .*finite of model/server/layers/up/bias, of seed 1; there was no checkpoint yet",
    ):
        ft.finetune(config, tmp_path / "w", QUIET)
    assert not (tmp_path / "w" / "hf").exists() and not (tmp_path / "w" / "results.json").exists()
    assert not any(path.name.isdigit() for path in (tmp_path / "w" / "checkpoints").rglob("*"))


def test_a_round_that_is_not_finite_names_its_seed_and_the_client(tokenizer: BertTokenizerFast, glue: Path) -> None:
    federated = dict(strategy="sequential", num_clients=3)
    config = make_config(tokenizer, glue, federated=federated, data=dict(partition=dict(kind="iid")))
    tuning = make(config, tokenizer, (4, 5))
    failed = np.array([[0, 0, 0], [0, 1, 2]], np.int32)
    metrics = RoundMetrics(np.array([0.5, np.inf]), np.ones(2), np.ones(2), failed)
    words = rf"^of seed 5, the loss .*loss inf.*, first with client {tuning.order(3)[1]}$"
    with pytest.raises(NotFiniteError, match=words):
        tuning.check_round(3, metrics)
    tuning.check_round(3, RoundMetrics(np.ones(2), np.ones(2), np.ones(2), failed * 0))


def test_a_group_that_was_begun_is_gone_on_with(tmp_path: Path) -> None:
    """This holds however many seeds this machine would train at once, or the command now asks for."""
    workdir = Workdir(tmp_path)
    assert ft._next_group([2, 3, 4], 1, workdir) == (2,) and ft._next_group([2, 3, 4], 8, workdir) == (2, 3, 4)
    (workdir.checkpoints / "seeds-2-3").mkdir(parents=True)  # it never got as far as a checkpoint, being out of memory, say
    assert ft._next_group([2, 3, 4], 1, workdir) == (2,)
    (workdir.checkpoints / "seeds-2-3" / "8").mkdir()
    assert ft._next_group([2, 3, 4], 1, workdir) == (2, 3) == ft._next_group([2, 3, 4], 8, workdir)
    assert ft._next_group([4], 8, workdir) == (4,)


@pytest.mark.parametrize("strategy", ["centralized", "parallel", "sequential"])
def test_epochs_are_trained_to_the_step(strategy: str, tokenizer: BertTokenizerFast, glue: Path) -> None:
    federated = dict(strategy=strategy, num_clients=2, batch_size=4, local_steps=4)
    config = make_config(
        tokenizer,
        glue,
        federated=federated,
        data=dict(partition=dict(kind="iid")),
        finetune=dict(epochs=1.5),
        client_optimizer=dict(schedule="linear"),
        server_optimizer=dict(schedule="linear"),
    )
    tuning = make(config, tokenizer)
    examples = 4 if strategy == "centralized" else 8  # a step
    steps = -(-108 // examples)
    assert (tuning.steps, tuning.rounds) == (steps, -(-steps // 4))
    assert tuning.epochs(tuning.rounds) == pytest.approx(steps * examples / 72)
    assert tuning.batches(0).tokens.shape[1] == 4 and tuning.batches(tuning.rounds - 1).tokens.shape[1] == steps % 4
    all_steps = steps * (2 if strategy == "sequential" else 1)
    assert float(tuning.setting.client_tx.schedule(all_steps - 1)) > float(tuning.setting.client_tx.schedule(all_steps)) == 0
    state, _ = tuning.init_state()
    state, metrics = tuning.step(state, tuning.rounds - 1)
    assert np.isfinite(metrics.loss).all()


@pytest.mark.slow
def test_ctrl_c_loses_no_round(
    tokenizer: BertTokenizerFast, glue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupted(Interrupts):
        """Ctrl-C before the fourth round, within an epoch of five."""

        asked = 0

        @property
        def received(self) -> int | None:
            self.asked += 1
            return signal.SIGINT if self.asked > 3 else None

        @received.setter
        def received(self, value: int) -> None:
            pass

    class AtTheEnd(Interrupted):
        """Ctrl-C in the last round: not yet there when asked before each of nine rounds, but there after them."""

        asked = -6

    config = make_config(tokenizer, glue, model=dict(hidden_dropout=0.1))
    assert ft.finetune(config, tmp_path / "whole", QUIET) == 0
    with monkeypatch.context() as patched:
        patched.setattr(ft, "Interrupts", AtTheEnd)
        assert ft.finetune(config, tmp_path / "late", QUIET) == 130  # so that the next task isn't begun
    assert (tmp_path / "late" / "results.json").exists() and not (tmp_path / "late" / "checkpoints" / "seed-0").exists()
    with monkeypatch.context() as patched:
        patched.setattr(ft, "Interrupts", Interrupted)
        assert ft.finetune(config, tmp_path / "cut", QUIET) == 130
    assert [p.name for p in (tmp_path / "cut" / "checkpoints" / "seed-0").iterdir()] == ["3"]
    assert ft.finetune(config, tmp_path / "cut", QUIET) == 0
    for name in ("metrics-seed-0.jsonl", "results.json", "hf/model.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    (tmp_path / "cut" / "results.json").write_text("{")
    with pytest.raises(UserError, match=r"results\.json is damaged"):
        ft.finetune(config, tmp_path / "cut", QUIET)


def seeds_finished(root: Path) -> int:
    """Returns how many epochs of all seeds are in the logs; a run that begins again replaces its logs."""
    found = 0
    for path in root.glob("metrics-seed-*.jsonl"):
        with contextlib.suppress(FileNotFoundError):
            found += path.read_text().count("\n")
    return found


@pytest.mark.slow
def test_killed_and_started_again(tokenizer: BertTokenizerFast, glue: Path, tmp_path: Path) -> None:
    """SIGKILL of the command's process, within the second seed: it ends bit for bit like a run never stopped."""
    model = dict(num_layers=2, hidden_dropout=0.1, unroll_layers=False)
    values = config_lib.to_dict(make_config(tokenizer, glue, finetune=dict(seeds=2, epochs=6.0), model=model))
    path = tmp_path / "config.py"
    path.write_text(f"import ml_collections\n\ndef get_config():\n    return ml_collections.ConfigDict({values!r})\n")
    done = corpus.run(*corpus.command(path, tmp_path / "whole"))
    assert done.returncode == 0, done.stderr

    args = corpus.command(path, tmp_path / "killed")
    process = start(args, environment())
    until = time.monotonic() + 240
    while seeds_finished(tmp_path / "killed") < 8 and process.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.002)
    process.kill()
    assert process.wait(60) == -signal.SIGKILL  # it had not ended by itself
    done = corpus.run(*args)
    assert done.returncode == 0, done.stderr
    for name in ("metrics-seed-0.jsonl", "metrics-seed-1.jsonl", "results.json", "hf/model.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_rate_is_chosen_without_the_dev_set(
    tokenizer: BertTokenizerFast, glue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def finetune(config: config_lib.Config, root: Path, console: Console) -> int:
        tried.append(config)
        root.mkdir(parents=True)
        median = {1e-4: 0.5, 1e-3: 0.8, 1e-2: 0.7}[config.server_optimizer.learning_rate]
        (root / "results.json").write_text(json.dumps({"median": median, "seeds": {}}))
        return 0

    config = make_config(tokenizer, glue, finetune=dict(seeds=3, predict=True))
    monkeypatch.setattr(ft, "finetune", finetune)
    assert ft.choose_rate(config, (1e-4, 1e-3, 1e-2), tmp_path, QUIET) == (1e-3, 0)
    assert [c.client_optimizer.learning_rate for c in tried] == [1e-4, 1e-3, 1e-2]
    for c in tried:  # the seed is not 0, 1 or 2, which are to be reported
        assert c.seed not in (0, 1, 2)
        assert (c.finetune.seeds, c.finetune.holdout, c.finetune.predict) == (1, 0.1, False)
    assert ft.choose_rate(config, (1e-4,), tmp_path, QUIET) == (1e-4, 0) and len(tried) == 3

    def diverging(config: config_lib.Config, root: Path, console: Console) -> int:
        if config.server_optimizer.learning_rate == 1e-3:
            raise DivergedError("the loss is not finite")
        return finetune(config, root / "again", console)

    monkeypatch.setattr(ft, "finetune", diverging)
    monkeypatch.setattr(ft, "read_results", lambda root: {"median": 0.5})
    assert ft.choose_rate(config, (1e-3, 1e-2), tmp_path, QUIET) == (1e-2, 0)
    with pytest.raises(DivergedError, match="lower ones"):
        ft.choose_rate(config, (1e-3, 1e-3), tmp_path, QUIET)


def test_a_holdout_is_taken_from_the_training_examples(tokenizer: BertTokenizerFast, glue: Path, tmp_path: Path) -> None:
    (tmp_path / "SST-2").mkdir()  # there is no dev.tsv to look at
    (tmp_path / "SST-2" / "train.tsv").write_bytes((glue / "SST-2" / "train.tsv").read_bytes())
    data = ft.read_task(make_config(tokenizer, tmp_path, finetune=dict(holdout=0.25)), tokenizer)
    whole = ft.read_task(make_config(tokenizer, glue), tokenizer).train
    assert (len(data.train), [*data.dev], len(data.dev["holdout"])) == (54, ["holdout"], 18)
    rows = lambda s: [(tuple(t[t > 0]), label) for t, label in zip(s.tokens, s.labels, strict=True)]  # noqa: E731
    assert sorted(rows(data.train) + rows(data.dev["holdout"])) == sorted(rows(whole))


def test_pairs_need_two_token_types(tokenizer: BertTokenizerFast, glue: Path) -> None:
    with pytest.raises(ConfigError, match="type_vocab_size"):
        make(make_config(tokenizer, glue, "STS-B", model=dict(type_vocab_size=1)), tokenizer)


@pytest.mark.slow
def test_the_glue_command_prints_a_table(
    tokenizer: BertTokenizerFast,
    glue: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = BertModel(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
        )
    )
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    words = f"glue --model {tmp_path / 'model'} --glue {glue} --seeds 1 --epochs 1 --max-length 16 "
    words += f"--workdir {tmp_path / 'w'}"
    words += f" --tasks sst2,stsb --learning-rate 1e-4,1e-3 --json {tmp_path / 'out.json'}"
    monkeypatch.setattr("sys.argv", words.split())
    command.main()
    printed = capsys.readouterr().out
    assert "SST-2" in printed and "average" in printed and "the pooler" not in printed and "the classifier" in printed
    monkeypatch.setattr("sys.argv", f"glue --model {tmp_path / 'model'} --glue {tmp_path}".split())
    with pytest.raises(UserError, match="no folder of a GLUE task"):
        command.main()
    model.pooler.dense.weight.data += 1.0
    model.save_pretrained(tmp_path / "model")
    for change, message in (
        ("", "--model names, or the tokenizer, has changed since"),
        ("--max-length 17", "--max-length=17: accepted: at most"),
        ("--batch 0", "--batch=0: accepted"),
        (f"--tasks all --glue {glue / 'SST-2'} --seeds 0", "--seeds=0"),
        (f"--tasks sst2,rte --workdir {tmp_path / 'other'}", "has neither a folder RTE"),
    ):
        monkeypatch.setattr("sys.argv", words.split() + change.split())
        with pytest.raises(UserError, match=message):
            command.main()
    assert not (tmp_path / "other").exists()
    found = json.loads((tmp_path / "out.json").read_text())
    assert all(t["learning_rate"] in (1e-4, 1e-3) for t in found["tasks"].values())
    assert found["average"] == pytest.approx(np.mean([t["median"] for t in found["tasks"].values()]))


def test_another_seed_compiles_nothing_anew(tokenizer: BertTokenizerFast, glue: Path) -> None:
    config = make_config(tokenizer, glue)
    first = make(config, tokenizer)
    second, fresh = first.for_seeds((1,)), make(dataclasses.replace(config, seed=1), tokenizer, (1,))
    losses = []
    for tuning in (first, second, fresh):
        _, metrics = tuning.step(tuning.init_state()[0], 0)
        losses.append(float(metrics.loss[0]))
    assert first._round._cache_size() == 1
    assert losses[1] == losses[2] != losses[0]


def test_a_stream_has_every_example_once_an_epoch() -> None:
    lengths = np.random.default_rng(0).integers(3, 60, 100)
    stream = ExampleStream(Seeds(0, 0), 0, lengths, steps=2, batch=5)
    first = np.concatenate([stream.round(n).ravel() for n in range(10)])
    assert sorted(first) == list(range(100))
    again = ExampleStream(Seeds(0, 0), 0, lengths, steps=2, batch=5)
    assert np.array_equal(again.round(13), stream.round(13))
    spread = np.mean([np.ptp(lengths[stream.round(n)]) for n in range(10)])
    assert spread < 0.5 * np.ptp(lengths)


@pytest.mark.parametrize("count", [3, 10, 103, 1000])
def test_later_epochs_are_sorted_by_length_like_the_first(count: int) -> None:
    """An epoch that is no whole number of rounds costs one round of mixed lengths; no example is lost or doubled."""
    lengths = np.random.default_rng(0).integers(3, 60, count)
    stream = ExampleStream(Seeds(0, 0), 0, lengths, steps=2, batch=5)
    rounds = [stream.round(n) for n in range(-(-3 * count // 10))]
    examples = np.concatenate([r.ravel() for r in rounds])
    for epoch in range(3):
        assert sorted(examples[epoch * count : (epoch + 1) * count]) == list(range(count))
    # For rounds within one epoch after the first. If epochs were cut without regard to their ends, it would be 0.4.
    spreads = [np.ptp(lengths[r]) for n, r in enumerate(rounds) if 0 < n * 10 // count == (n * 10 + 9) // count]
    assert count < 100 or np.mean(spreads) < 0.15 * np.ptp(lengths)


def test_pairs_are_padded_and_cut(tokenizer: BertTokenizerFast) -> None:
    data = encode(tokenizer, ["the film", "a"], ["was good " * 20, "play"], np.array([0, 1], np.int32), 12)
    assert data.tokens.shape == (2, 12) and list(data.lengths) == [12, 5]
    batch = take(data, np.array([[1, 0]]), 16)
    assert batch.tokens.shape == (1, 2, 16) and int(jnp.sum(batch.tokens[0, 0] != tokenizer.pad_token_id)) == 5
    assert list(batch.token_types[0, 0][:6]) == [0, 0, 0, 1, 1, 0]


@pytest.mark.parametrize(
    "section, message",
    [
        (dict(data=dict(source="text:x")), "glue:TASK"),
        (dict(federated=dict(strategy="local", num_clients=2)), "federated.strategy"),
        (dict(federated=dict(strategy="parallel")), "federated.num_clients"),
        (dict(finetune=dict(epochs=0.0)), "finetune.epochs"),
        (dict(finetune=dict(seeds=0)), "finetune.seeds"),
        (dict(finetune=dict(epochs=float("inf"))), "finetune.epochs"),
        (
            dict(
                federated=dict(strategy="parallel", num_clients=2, client_optimizer_state="keep"),
                data=dict(partition=dict(kind="iid")),
            ),
            "client_optimizer_state",
        ),
        (dict(data=dict(tokenizer="train:1000")), "data.tokenizer"),
        (dict(federated=dict(rounds=3)), r"federated\.rounds=3: accepted: its default, 140, with task='finetune'"),
        (dict(checkpoint=dict(keep=5)), "checkpoint.keep"),
        (dict(mlm=dict(mask_prob=0.2)), r"mlm\.mask_prob=0.2: accepted: its default, 0.15, .* masks nothing"),
        (dict(model=dict(logits_at_once=4)), "model.logits_at_once"),
        (dict(client_optimizer=dict(warmup_steps=3)), "client_optimizer.warmup_steps"),
    ],
)
def test_what_cannot_be_finetuned(section: dict, message: str, tokenizer: BertTokenizerFast, glue: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(tokenizer, glue, **section)


def test_a_misspelt_task_is_answered_with_the_nearest(tokenizer: BertTokenizerFast, glue: Path) -> None:
    config = make_config(tokenizer, glue, task="SST2x")
    with pytest.raises(UserError, match="SST-2"):
        ft.read_task(config, tokenizer)

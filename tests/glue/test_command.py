"""`python -m fedbert_jax.glue`: what it passes over, and that each error is one sentence that names its flags."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.numpy import load_file, save_file
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

import fedbert_jax as fb
from fedbert_jax import config as config_lib
from fedbert_jax.data.tokenizer import load_tokenizer
from fedbert_jax.errors import DivergedError, UserError
from fedbert_jax.glue import command as command
from fedbert_jax.glue import finetune as ft
from fedbert_jax.workdir.paths import Workdir

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"a film is good bad".split()]
SST2 = "sentence\tlabel\na good film\t1\na bad film\t0\n"
MRPC = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\ta film\tthe film\n0\t9\t10\tgood\tbad\n"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A classifier of positive and negative, in a different order from SST-2's."""
    settings = dict(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        id2label={0: "Positive", 1: "NEGATIVE"},
    )
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(**settings)).save_pretrained(tmp_path / "model")
    BertTokenizer(vocab={w: n for n, w in enumerate(WORDS)}).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def glue(tmp_path: Path) -> Path:
    for name, text in (("train", SST2), ("dev", SST2)):
        (tmp_path / "glue" / "SST-2").mkdir(parents=True, exist_ok=True)
        (tmp_path / "glue" / "SST-2" / f"{name}.tsv").write_text(text)
    return tmp_path / "glue"


@pytest.fixture
def refused(model: Path, glue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Runs the command with more flags, which must be refused; returns the sentence."""
    monkeypatch.setattr("fedbert_jax.disk.lock", lambda *_: None)  # an error's frames keep the lock

    def call(more: str, words: str = "--max-length 16 --epochs 1") -> str:
        line = f"glue --model {model} --glue {glue} --workdir {tmp_path / 'w'} {words} {more}"
        monkeypatch.setattr("sys.argv", line.split())
        with pytest.raises(UserError) as caught:
            command.main()
        said = str(caught.value)
        assert "\n" not in said and "config key" not in said and "--config" not in said
        assert [key for key in config_lib.all_keys() if "." in key and key in said] == []
        return said

    return call


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--seeds 0", "--seeds=0: accepted: an integer from 1 to"),
        ("--seeds 4000000000", "--seeds=4000000000: accepted: an integer from 1 to"),
        ("--epochs 0", "--epochs=0.0: accepted: a number above 0"),
        ("--epochs nan", "--epochs=nan: accepted"),
        ("--batch -1", "--batch=-1: accepted: an integer of at least 1"),
        ("--dropout 1.5", "--dropout=1.5: accepted: a number from 0 to below 1"),
        ("--max-length 4", "--max-length=4: accepted: from 8 to 65535"),
        ("--max-length 17", "--max-length=17: accepted: at most --model's max_position_embeddings=16"),
        ("--tasks sst", "--tasks: 'sst' is no GLUE task (the nearest is SST-2)"),
        ("--tasks sst2,", "--tasks: '' is no GLUE task"),
        ("--tasks rte", "--glue: RTE: {glue} has neither a folder RTE nor a train.tsv of its own."),
        ("--tasks sst2 --predict", "--glue: SST-2: {glue}/SST-2 holds train.tsv and dev.tsv, but no test.tsv."),
        ("--glue {tmp}/nowhere", "--glue: {tmp}/nowhere is no directory that can be read (No such file or directory)."),
        ("--glue {tmp}", "--glue: {tmp} has no folder of a GLUE task; accepted: CoLA"),
        ("--model {tmp}/nowhere", "--model='{tmp}/nowhere': no such directory, and the hub says"),
        ("--model {glue}/SST-2/dev.tsv", "--model='{glue}/SST-2/dev.tsv' is a file; accepted: its directory"),
        ("--model {tmp}", "--model"),
        ("--random-start --model {tmp}", "--model: {tmp} holds no config.json"),
        ("--json {tmp}/no/out.json", "--json {tmp}/no/out.json can't be written (No such file or directory)."),
        ("--workdir {glue}/SST-2/dev.tsv", "workdir {glue}/SST-2/dev.tsv/SST-2 can't be written (Not a directory)"),
    ],
)
def test_a_mistake_is_told_by_its_flag(more: str, said: str, refused: Any, glue: Path, tmp_path: Path) -> None:
    fill = lambda text: text.replace("{tmp}", str(tmp_path)).replace("{glue}", str(glue))  # noqa: E731
    assert fill(said) in refused(fill(more))
    assert not (tmp_path / "w").exists()


def test_what_is_wrong_in_a_file_is_told_by_its_flag(refused: Any, model: Path, glue: Path, tmp_path: Path) -> None:
    (glue / "SST-2" / "dev.tsv").write_text(SST2 + "no label\n")
    assert refused("").startswith(f"--glue: {glue}/SST-2/dev.tsv line 4 has 1 columns")
    (glue / "SST-2" / "dev.tsv").write_text(SST2)
    hf = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(hf | {"model_type": "roberta"}))
    assert refused("").startswith(f"--model: {model} is a RoBERTa checkpoint")
    (model / "config.json").write_text(json.dumps(hf | {"vocab_size": 5}))
    assert f"--model's vocab_size=5 (of --model='{model}'): accepted: at least 10" in refused("")
    (model / "config.json").write_text(json.dumps(hf | {"type_vocab_size": 1}))
    (glue / "MRPC").mkdir()
    for name in ("train", "test"):
        (glue / "MRPC" / f"msr_paraphrase_{name}.txt").write_text(MRPC)
    assert "--model's type_vocab_size=1: accepted: at least 2, since MRPC" in refused("--tasks mrpc")
    (model / "config.json").write_text(json.dumps(hf))
    file = model / "model.safetensors"
    weights = load_file(file)
    save_file(weights | {"classifier.bias": np.full(2, np.nan, np.float32)}, file, {"format": "pt"})
    assert refused("").startswith("--model: the checkpoint has numbers that are not finite")
    save_file(weights | {"bert.pooler.dense.bias": np.zeros(9, np.float32)}, file, {"format": "pt"})
    assert refused("").startswith("--model: the checkpoint's bert.pooler.dense.bias has shape")
    file.unlink()
    assert refused("").startswith(f"--model: {model} holds no model.safetensors")
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()
    assert refused("").startswith("--model='") and "has no vocabulary" in refused("")


def test_a_workdir_of_other_flags_is_told_by_them(
    refused: Any, model: Path, glue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The workdir is as a run leaves it that was begun with other settings, data or weights."""
    held = ["--max-length", "16", "--epochs", "1", "--tasks", "sst2"]

    def begin(*more: str) -> config_lib.Config:
        seen: list[config_lib.Config] = []

        def finetune(config: config_lib.Config, root: Path, console: Console) -> int:
            config, _ = ft.resolve(config, load_tokenizer(str(model)))
            shutil.rmtree(root, ignore_errors=True)
            root.mkdir(parents=True)
            Workdir(root).write_config(config)
            seen.append(config)
            return 130

        line = ["glue", "--model", str(model), "--glue", str(glue), "--workdir", str(tmp_path / "w"), *held, *more]
        with monkeypatch.context() as patched:
            patched.setattr("sys.argv", line)
            patched.setattr(ft, "finetune", finetune)
            with pytest.raises(SystemExit):
                command.main()
        return seen[0]

    begin()
    flags = " ".join(held)
    said = refused("--epochs 2 --batch 8 --dropout 0.2 --learning-rate 1e-3", flags)
    for change in (
        "--epochs (was 1.0, now 2.0)",
        "--batch (was 32, now 8)",
        "--dropout (was 0.1, now 0.2)",
        "--learning-rate (was 0.0001, now 0.001)",
        "give another --workdir",
    ):
        assert change in said
    assert "another config: --random-start (wasn't given, and is now); give another" in refused("--random-start", flags)
    begin("--random-start")
    assert "another config: --random-start (was given, and isn't now); give another" in refused("", flags)
    shutil.copytree(model, tmp_path / "copy")
    assert f"--model (was '{model}', now '{tmp_path}/copy')" in refused(f"--random-start --model {tmp_path}/copy", flags)
    config = begin()
    Workdir(tmp_path / "w" / "SST-2").write_config(dataclasses.replace(config, eval=config_lib.EvalConfig(batch_size=8)))
    assert "another config: batch_size (was 8, now 32)" in refused("", flags)  # no flag sets it
    begin()
    Workdir(tmp_path / "w" / "SST-2").write_facts({"inputs": {"data.source": "other"}})
    assert "what --glue names, or the tokenizer, has changed since" in refused("", flags)
    Workdir(tmp_path / "w" / "SST-2").write_facts({"inputs": {"model.init_from": "other"}})
    assert "what --model names, or the tokenizer, has changed since" in refused("", flags)
    (tmp_path / "w" / "SST-2" / "config.json").write_text("{")
    assert "is not valid JSON" in refused("", flags)


def test_a_rate_too_many_and_a_rate_too_high(refused: Any, model: Path, glue: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (glue / "SST-2" / "train.tsv").write_text("sentence\tlabel\na film\t1\n")
    assert "--learning-rate with several rates needs at least 2" in refused("--learning-rate 1e-3,1e-4")

    def diverging(*args: Any) -> int:
        raise DivergedError("SST-2: the loss is not finite; lower the learning rates and begin in another workdir.")

    monkeypatch.setattr(ft, "finetune", diverging)
    assert "lower --learning-rate and" in refused("")
    monkeypatch.setattr("sys.argv", f"glue --model {model} --glue {glue} --max-length 16 --learning-rate 1e-3,1e-4".split())
    with pytest.raises(DivergedError, match=r"none of --learning-rate 0\.001, 0\.0001 trains"):  # and exit code 3
        command.main()


def test_words_that_only_look_like_keys_stay() -> None:
    text = "/home/data.source/x and data.source.bak: finetune.seedsman, config key finetune.seeds=3."
    assert command.in_flags(text) == "/home/data.source/x and data.source.bak: finetune.seedsman, --seeds=3."


def test_tasks_without_the_files_they_need_are_passed_over_or_refused_by_name(
    refused: Any,
    model: Path,
    glue: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """QQP without its 48 MB of training examples, as on some mirrors; an empty folder; one without a dev file."""
    for name, files in (("QQP", ["dev"]), ("MNLI", ["train", "dev_matched"]), ("CoLA", []), ("MRPC", [])):
        (glue / name).mkdir()
        for file in files:
            (glue / name / f"{file}.tsv").write_text("x")
    for name in ("train", "test"):
        (glue / "MRPC" / f"msr_paraphrase_{name}.txt").write_text(MRPC)
    qqp = f"QQP: {glue}/QQP holds dev.tsv, but no train.tsv, so there is nothing to train on"
    assert refused("--tasks sst2,qqp") == f"--glue: {qqp}."
    assert refused(f"--tasks qqp --glue {glue}/QQP") == f"--glue: {qqp}."
    assert refused(f"--glue {glue}/QQP") == f"--glue: {qqp}."
    trained = []

    def finetune(config: config_lib.Config, root: Path, console: Console) -> int:
        trained.append(config.data.source)
        root.mkdir(parents=True)
        scores = {"task": "", "median": 0.5, "mean": 0.5, "std": 0.0, "values": [0.5]}
        (root / "results.json").write_text(json.dumps(scores))
        return 0

    monkeypatch.setattr(ft, "finetune", finetune)
    words = f"glue --model {model} --glue {glue} --workdir {tmp_path / 'all'} --max-length 16"
    monkeypatch.setattr("sys.argv", words.split())
    command.main()
    assert trained == [f"glue:{name}@{glue}" for name in ("SST-2", "MRPC")]
    printed = " ".join(capsys.readouterr().out.split())
    assert f"passed over: {qqp}" in printed
    assert f"passed over: CoLA: {glue}/CoLA holds no train.tsv and no dev.tsv" in printed
    assert f"passed over: MNLI: {glue}/MNLI holds train.tsv and dev_matched.tsv, but no dev_mismatched.tsv, so" in printed
    assert "dev sets; MRPC: msr_paraphrase_test, since GLUE's dev set isn't there" in printed
    assert "| MRPC | f1, accuracy | 50.0 | 50.0 | – | 0.0001 |" in printed  # one seed has no spread
    shutil.rmtree(glue / "SST-2")
    shutil.rmtree(glue / "MRPC")
    said = refused("")
    assert said.startswith("--glue: CoLA: ") and qqp in said and said.count(".tsv") > 3


def test_a_kept_classifier_is_in_the_tasks_order_and_that_is_said(model: Path, glue: Path, tmp_path: Path) -> None:
    weights = load_file(model / "model.safetensors")
    values = dict(
        task="finetune",
        data=dict(source=f"glue:SST-2@{glue}", tokenizer="", seq_len=16),
        model=dict(init_from=str(model)),
        federated=dict(strategy="centralized"),
    )
    _, start = ft.resolve(config_lib.from_dict(values), load_tokenizer(str(model)))
    assert start is not None and "are put into the task's order (negative, positive)" in start.classifier
    for name in ("classifier.weight", "classifier.bias"):
        np.testing.assert_array_equal(start.tensors[name], weights[name][::-1])
    values["data"] |= {"source": f"glue:RTE@{glue}"}
    _, start = ft.resolve(config_lib.from_dict(values), load_tokenizer(str(model)))
    assert start is not None and "classifier.weight" not in start.tensors and "bert.pooler.dense.bias" in start.tensors
    assert "RTE begins with a new one: its labels are Positive, NEGATIVE, not entailment, not_entailment" in start.classifier


def test_a_script_gets_the_scores_that_are_written_down(model: Path, glue: Path, tmp_path: Path) -> None:
    (glue / "SST-2" / "dev.tsv").write_text(SST2 + "a good good film\t1\nbad\t0\nfilm\t1\n")
    flags = ["--seeds=2", "--epochs=1", "--max-length=16", "--batch=2"]
    table = fb.finetune_on_glue(model, glue, tmp_path / "w", *flags)
    assert list(table.columns) == ["task", "seed", "split", "metric", "score"]
    written = json.loads((tmp_path / "w" / "SST-2" / "results.json").read_text())
    found = {(row.task, str(row.seed), row.split, row.metric): row.score for row in table.itertuples()}
    assert found == {("SST-2", seed, "dev", "accuracy"): written["seeds"][seed]["dev"]["accuracy"] for seed in ("0", "1")}
    assert [round(5 * score, 6) for score in found.values()] == [round(5 * value) for value in written["values"]]
    again = fb.finetune_on_glue(model, glue, tmp_path / "w", *flags)  # finished, so nothing is trained
    assert again.equals(table)
    with pytest.raises(UserError, match=r"^unrecognized arguments: --batches=2; `.*glue --help` lists the arguments\.$"):
        fb.finetune_on_glue(model, glue, tmp_path / "w", "--batches=2")

"""The model card: metadata that the hub reads, every figure with its meaning, and nothing about the machine that made it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard
from tiny import tiny_config

from fedbert_jax import experiment
from fedbert_jax.config import FREE, Config, all_keys, from_dict
from fedbert_jax.errors import ConfigError
from fedbert_jax.glue.card import classifier_card
from fedbert_jax.glue.tasks import MSR_TEST, TASKS
from fedbert_jax.models import huggingface
from fedbert_jax.workdir import resume
from fedbert_jax.workdir.paths import check_same

FACTS: dict[str, Any] = dict(
    round=140,
    tokens=4587520,
    num_clients=706,
    clients_per_round=8,
    eval_clients_scored=64,
    eval_round=120,
    eval_loss=5.12345678,
    eval_accuracy=0.1234567,
    eval_loss_by_text=5.12345678,
    eval_accuracy_by_text=0.1234567,
    eval_loss_over_clients=5.3,
    eval_accuracy_over_clients=0.11,
    unigram_loss=5.9,
    commonest_accuracy=0.065,
    unigram_loss_by_text=5.9,
    commonest_accuracy_by_text=0.065,
    unigram_loss_over_clients=6.0,
    commonest_accuracy_over_clients=0.07,
)
ODD = [
    "a|b",
    "two\nlines",
    "---\nlicense: mit\n---",
    "`code` <b>",
    "[link](http://x)",
    "emoji 🏥",
    "\u202eright",
    "\udc80",
]


def resolved(**sections: Any) -> Config:
    """The config of a pre-training run once its model's sizes are known."""
    return experiment.resolve(from_dict({"model": dict(hidden_size=32, num_layers=1, num_heads=2)} | sections), 100)


def metadata(card: str) -> dict[str, Any]:
    """The metadata that the hub reads, by an ordinary YAML parser."""
    _, head, body = card.split("---\n", 2)
    assert body.startswith("\n# A BERT")
    return yaml.safe_load(head)


def results(card: str) -> list[EvalResult]:
    return ModelCard(card).data.eval_results


def test_the_hub_reads_what_is_known_and_nothing_is_claimed_beyond() -> None:
    card = huggingface.model_card(resolved(), FACTS)
    data = metadata(card)
    assert data.keys() == {"library_name", "pipeline_tag", "tags", "metrics", "model-index"}
    assert (data["library_name"], data["pipeline_tag"], data["metrics"]) == ("transformers", "fill-mask", ["accuracy"])
    assert data["tags"] == ["bert", "federated-learning", "split-learning"]
    said = dict(license="apache-2.0", language="en, de", datasets="a/b,imdb", base_model="google-bert/bert-base-uncased")
    data = metadata(huggingface.model_card(resolved(export=said), FACTS))
    assert (data["license"], data["language"], data["datasets"]) == ("apache-2.0", ["en", "de"], ["a/b", "imdb"])
    assert data["base_model"] == "google-bert/bert-base-uncased"


@pytest.mark.parametrize(
    ("strategy", "tags", "title"),
    [
        ("fedavg", ["federated-learning"], "by federated learning"),
        ("centralized", [], "the text of all clients together"),
        ("local", [], "by one client alone"),
    ],
)
def test_what_was_not_federated_or_cut_is_not_called_so(strategy: str, tags: list[str], title: str) -> None:
    card = huggingface.model_card(resolved(federated=dict(strategy=strategy)), FACTS)
    assert metadata(card)["tags"] == ["bert", *tags] and title in card.split("\n# ")[1].split("\n")[0]


@pytest.mark.parametrize(
    ("federated", "row"),
    [
        ({}, "parallel (pooled body)"),
        (dict(body="merged"), "parallel (merged body)"),
        (dict(average="gradients"), "parallel (gradients averaged)"),
        (dict(strategy="sequential"), "sequential"),
    ],
)
def test_the_strategy_is_told_by_its_row_and_a_cut_is_called_one(federated: dict[str, str], row: str) -> None:
    card = huggingface.model_card(resolved(federated=federated), FACTS)
    assert f"| strategy | {row} |" in card and metadata(card)["tags"] == ["bert", "federated-learning", "split-learning"]
    assert card.split("\n# ")[1].split("\n")[0].endswith("by federated split learning")


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_every_figure_says_which_mean_over_how_many_clients_it_is(weighting: str) -> None:
    card = huggingface.model_card(resolved(federated=dict(weighting=weighting)), FACTS)
    found = [(r.metric_type, r.metric_value, r.metric_name) for r in results(card)]
    by_text = "mean weighted by the clients' training text, 64 of 706 clients"
    alike = "mean over clients, all weighted alike, 64 of 706 clients"
    weighted = [
        ("accuracy", 0.1235, f"accuracy at masked held-out positions, {by_text}"),
        ("loss", 5.1235, f"cross-entropy in nats at masked held-out positions, {by_text}"),
    ]
    plain = [
        ("accuracy", 0.11, f"accuracy at masked held-out positions, {alike}"),
        ("loss", 5.3, f"cross-entropy in nats at masked held-out positions, {alike}"),
    ]
    assert found == (weighted + plain if weighting == "examples" else plain + weighted)  # the headline first
    assert f"| {by_text} | 5.123 | 12.3% |" in card and f"| {alike} | 5.300 | 11.0% |" in card
    assert "| guessing by frequency, mean over clients, all weighted alike | 6.000 | 7.0% |" in card
    assert "every one of them becomes `[MASK]`" in card and "are of round 120" in card and "5.12345678" not in card


def test_a_model_of_one_clients_own_shows_that_clients_scores_alone() -> None:
    config = resolved(federated=dict(strategy="local"))
    own = FACTS | {"client": "north", "client_scores": {"loss": 6.5, "accuracy": 0.04}}
    card = huggingface.model_card(config, own)
    assert [(r.metric_value, "this client's own held-out text" in r.metric_name) for r in results(card)] == [
        (0.04, True),
        (6.5, True),
    ]
    assert "5.123" not in card and "12.3%" not in card
    card = huggingface.model_card(config, own | {"client_scores": None})
    assert "model-index" not in metadata(card) and "This client's held-out text was not scored" in card


def test_a_card_without_facts_is_a_card() -> None:
    card = huggingface.model_card(resolved(), {})
    assert "model-index" not in metadata(card) and "is not known" in card and "None" not in card
    some = huggingface.model_card(resolved(), {"eval_loss": 2.0, "eval_accuracy": 0.5, "round": 0})
    assert [r.metric_value for r in results(some)] == [0.5, 2.0] and "| held-out text | 2.000 | 50.0% |" in some
    none = huggingface.model_card(resolved(), FACTS | {k: None for k in FACTS if "eval_" in k})
    assert "model-index" not in metadata(none) and "None" not in none


@pytest.mark.parametrize("name", ODD)
def test_a_clients_name_is_shown_and_is_no_markup(name: str) -> None:
    facts = {"client": name, "client_scores": {"loss": 1.0, "accuracy": 0.5}, "num_clients": 3}
    card = huggingface.model_card(resolved(federated=dict(strategy="local")), facts)
    data = metadata(card)
    assert "license" not in data and data["pipeline_tag"] == "fill-mask"
    (row,) = [line for line in card.split("\n") if line.startswith("| whose model |")]
    assert row.replace(r"\|", "").count("|") == 3 and "<b>" not in row and "\u202e" not in row
    card.encode()  # what can't be written as UTF-8 is escaped


@pytest.mark.parametrize("source", ["text:/home/anna/letters/**/*.txt", "text:secret/plans.txt", "hf:/home/anna/corpus"])
def test_no_place_on_the_machine_is_told(source: str) -> None:
    config = resolved()
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, source=source, tokenizer="/home/anna/t"),
        model=dataclasses.replace(config.model, init_from="/home/anna/bert"),
    )
    card = huggingface.model_card(config, FACTS)
    assert not any(word in card for word in ("/home", "anna", "secret", "plans"))
    assert "| text | own " in card and "| started from | another checkpoint |" in card
    assert not {"base_model", "datasets"} & metadata(card).keys()


def test_what_is_a_hub_name_is_settled_when_the_run_begins(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder may look like a hub name, and be gone by the time of a later export."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpora" / "mine").mkdir(parents=True)
    for source, datasets in (
        ("hf:corpora/mine", ""),
        ("hf:corpora", ""),
        ("hf:stanfordnlp/imdb", "stanfordnlp/imdb"),
        ("hf:imdb", "imdb"),
        ("hf:owner/name/config", "owner/name"),
        (f"hf:{tmp_path}/corpora", ""),
        ("hf:./there", ""),
        ("text:imdb", ""),
        ("docs:", ""),
    ):
        config = resolved(data=dict(source=source))
        assert config.export.datasets == datasets, source
        again = dataclasses.replace(config, data=dataclasses.replace(config.data, source="hf:now/there"))
        assert experiment.resolve(again, 100).export.datasets == datasets
    assert resolved(data=dict(source="hf:imdb"), export=dict(datasets="")).export.datasets == ""
    for name in ("bert-base-uncased", "google/bert"):
        assert experiment._hub_name(name) == name
    for name in ("corpora/mine", "corpora/gone", "../x", "/x/y", "a/b/c", ""):
        assert experiment._hub_name(name) == ""


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("license", "/home/anna/LICENSE"),
        ("language", "English"),
        ("datasets", "/data/x"),
        ("datasets", "a/b,~/c"),
        ("base_model", "./bert"),
        ("base_model", "a/b/c"),
        ("hidden_dropout", 1.0),
    ],
)
def test_what_the_hub_would_not_take_is_refused(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"export\.{key}=.*accepted"):
        from_dict({"export": {key: value}})


def test_what_a_card_says_may_change_at_any_time() -> None:
    keys = {key for key in all_keys() if key.startswith("export.")}
    assert len(keys) == 6 and keys <= FREE
    check_same(resolved(), resolved(export=dict(license="mit", language="en", datasets="a/b", hidden_dropout=0.0)))
    with pytest.raises(ConfigError, match=r"federated\.rounds.*resume=force"):
        check_same(resolved(), resolved(export=dict(license="mit"), federated=dict(rounds=3)))
    begun = resolved()
    free = resume.harmless(begun, resume.Made(1, None))
    resume.check_stamp("the checkpoint", resume.stamp(begun), resolved(export=dict(license="mit")), free)


def tuned(**sections: Any) -> Config:
    return tiny_config(
        task="finetune",
        data=dict(source="glue:MRPC@/home/anna/glue", tokenizer="/home/anna/t", seq_len=12),
        federated=dict(strategy="centralized"),
        **sections,
    )


def test_a_classifiers_card_has_its_own_metrics_and_all_seeds() -> None:
    config = tuned(finetune=dict(seeds=3))
    scores = {"dev": {"f1": 0.81234, "accuracy": 0.7}}
    card = classifier_card(config, TASKS["MRPC"], scores)
    (f1, accuracy) = results(card)
    assert (f1.metric_type, f1.metric_value, accuracy.metric_value) == ("f1", 0.8123, 0.7)
    assert (f1.dataset_type, f1.dataset_config, f1.dataset_split) == ("nyu-mll/glue", "mrpc", "validation")
    assert "of seed 0, after the last epoch" in f1.metric_name and "| F1 on the dev set | 81.2 |" in card
    assert "/home" not in card and "median" not in card
    seeds = {"values": [0.75, 0.7, 0.8], "median": 0.75, "mean": 0.75, "std": 0.05}
    card = classifier_card(config, TASKS["MRPC"], scores, seeds)
    assert "Over 3 seeds" in card and "75.0, 70.0, 80.0: median 75.0, mean 75.0, standard deviation 5.0" in card
    assert [r.metric_value for r in results(card)] == [0.8123, 0.7]  # this model's, not the best seed's


def test_what_a_classifier_was_judged_by_is_said() -> None:
    of_microsoft = classifier_card(tuned(), TASKS["MRPC"], {MSR_TEST: {"f1": 0.8, "accuracy": 0.7}})
    assert "F1 on Microsoft's test set (msr_paraphrase_test)" in of_microsoft
    assert [r.dataset_split for r in results(of_microsoft)] == ["test", "test"]
    kept = classifier_card(tuned(), TASKS["STS-B"], {"holdout": {"pearson": 0.5, "spearman": 0.4}})
    assert "Pearson correlation on training examples that were kept back" in kept
    assert [(r.metric_type, r.dataset_split) for r in results(kept)] == [("pearsonr", None), ("spearmanr", None)]
    both = {"dev_matched": {"accuracy": 0.6}, "dev_mismatched": {"accuracy": 0.5}}
    found = results(classifier_card(tuned(), TASKS["MNLI"], both))
    expected = [("validation_matched", 0.6), ("validation_mismatched", 0.5)]
    assert [(r.dataset_split, r.metric_value) for r in found] == expected

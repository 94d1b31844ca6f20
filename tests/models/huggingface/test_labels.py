"""A checkpoint's classifier is kept only for the task whose labels, by name, it has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_experiment import forward, inputs, torch_model
from tiny import tiny_config

from fedbert_jax.glue.tasks import TASKS
from fedbert_jax.models import huggingface

MNLI = ("entailment", "neutral", "contradiction")  # GLUE's order, which is the hub's


def fit(names: Any, labels: tuple[str, ...] = MNLI, outputs: int = 3, **settings: Any) -> tuple[list[int] | None, str]:
    """Returns which of a classifier's outputs are the task's, or None if it is left out, and the sentence about it."""
    tensors = {
        "classifier.weight": np.arange(outputs, dtype=np.float32)[:, None] * np.ones(4, np.float32),
        "classifier.bias": np.arange(outputs, dtype=np.float32),
        "bert.pooler.dense.bias": np.ones(4, np.float32),
    }
    hf = settings if names is None else settings | {"id2label": names}
    fitted, said = huggingface.fit_classifier(tensors, hf, "MNLI", labels)
    assert "bert.pooler.dense.bias" in fitted and said.startswith("the checkpoint's own classifier is ")
    if "classifier.weight" not in fitted:
        assert "classifier.bias" not in fitted and "is not used, and MNLI begins with a new one: " in said
        return None, said
    np.testing.assert_array_equal(fitted["classifier.weight"][:, 0], fitted["classifier.bias"])
    return fitted["classifier.bias"].astype(int).tolist(), said


def named(*names: str) -> dict[str, str]:
    return {str(n): name for n, name in enumerate(names)}


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (named("entailment", "neutral", "contradiction"), [0, 1, 2]),
        (named("contradiction", "entailment", "neutral"), [1, 2, 0]),  # as in many published checkpoints
        (named("CONTRADICTION", "Neutral", "ENTAILMENT"), [2, 1, 0]),
        ({"2": "entailment", "0": "neutral", "1": "contradiction"}, [2, 0, 1]),  # whatever order the file has
        (["neutral", "entailment", "contradiction"], [1, 0, 2]),
    ],
)
def test_outputs_are_put_into_the_tasks_order(names: Any, order: list[int]) -> None:
    found, said = fit(names)
    assert found == order and "is kept: its labels are the task's" in said
    assert ("put into the task's order (entailment, neutral, contradiction)" in said) == (order != [0, 1, 2])


@pytest.mark.parametrize("name", ["not_entailment", "not-entailment", "NOT ENTAILMENT", "notEntailment"])
def test_case_and_what_is_between_words_don_t_matter(name: str) -> None:
    for task, order in (("RTE", [1, 0]), ("WNLI", [0, 1])):  # whose orders differ
        assert fit(named(name, "Entailment"), TASKS[task].labels, 2)[0] == order


def test_label2id_alone_says_as_much() -> None:
    assert fit(None, label2id={"neutral": 0, "contradiction": 1, "entailment": 2})[0] == [2, 0, 1]


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (None, [0, 1, 2]),
        (named("LABEL_0", "LABEL_1", "LABEL_2"), [0, 1, 2]),
        (named("0", "1", "2"), [0, 1, 2]),
        (named("LABEL_2", "LABEL_0", "LABEL_1"), [1, 2, 0]),
        (named("label-1", "label-2", "label-3"), [0, 1, 2]),
    ],
)
def test_labels_that_only_count_are_taken_by_number_and_that_is_said(names: Any, order: list[int]) -> None:
    found, said = fit(names, num_labels=3)
    assert found == order and "are taken to be entailment, neutral, contradiction" in said


@pytest.mark.parametrize(
    ("names", "outputs", "settings", "why"),
    [
        (named("positive", "negative", "mixed"), 3, {}, "its labels are positive, negative, mixed, not entailment, neutral"),
        (named("entailment", "neutral", "neutral"), 3, {}, "its labels are entailment, neutral, neutral, not"),
        (named("LABEL_0", "LABEL_0", "LABEL_1"), 3, {}, "its labels are LABEL_0"),
        (named("entailment", "neutral"), 3, {}, "2 usable entries in id2label for 3 outputs"),
        (named("entailment", "neutral", "contradiction", "hidden"), 3, {}, "4 usable entries in id2label for 3 outputs"),
        ({"1": "entailment", "2": "neutral", "3": "contradiction"}, 3, {}, "for 3 outputs"),
        ({"x": "entailment"}, 3, {}, "0 usable entries"),
        ("entailment", 3, {}, "0 usable entries"),
        (named("entailment", "not_entailment"), 2, {}, r"it has 2 outputs (entailment, not_entailment), not 3"),
        (None, 1, {}, "it has 1 output, not 3"),
        (named("entailment", "neutral", "contradiction"), 3, {"problem_type": "regression"}, "problem_type 'regression'"),
        (named(*(f"topic {n}" for n in range(900))), 900, {}, "topic 4 and 895 more), not 3"),
    ],
)
def test_labels_of_something_else_leave_the_classifier_out(names: Any, outputs: int, settings: Any, why: str) -> None:
    found, said = fit(names, MNLI, outputs, **settings)
    assert found is None and why in said and len(said) < 300


@pytest.mark.parametrize(
    ("names", "outputs", "problem", "kept"),
    [
        (None, 1, None, True),
        (named("LABEL_0"), 1, "regression", True),
        (named("score"), 1, "regression", True),
        (named("toxicity"), 1, None, False),
        (named("LABEL_0"), 1, "single_label_classification", False),
        (None, 2, None, False),
        (None, 3, "regression", False),
    ],
)
def test_a_regressions_one_output(names: Any, outputs: int, problem: str | None, kept: bool) -> None:
    settings = {} if problem is None else {"problem_type": problem}
    assert (fit(names, (), outputs, **settings)[0] is not None) == kept


def test_no_classifier_and_half_of_one() -> None:
    tensors = {"bert.pooler.dense.bias": np.ones(4, np.float32)}
    assert huggingface.fit_classifier(tensors, {}, "MNLI", MNLI) == (tensors, "")
    half = tensors | {"classifier.weight": np.ones((3, 4), np.float32)}
    fitted, said = huggingface.fit_classifier(half, {}, "MNLI", MNLI)
    assert fitted.keys() == tensors.keys() and "don't fit together" in said


def test_predictions_by_label_name_are_torchs_before_any_training(tmp_path: Path) -> None:
    theirs = named("Contradiction", "ENTAILMENT", "neutral")
    model = torch_model("BertForSequenceClassification", num_labels=3, id2label={int(k): v for k, v in theirs.items()})
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["id2label"] == theirs
    tensors, hf = huggingface.load_tensors(tmp_path)
    tensors, _ = huggingface.fit_classifier(tensors, hf, "MNLI", TASKS["MNLI"].labels)
    empty, apply = forward(tiny_config(model=dict(num_layers=2)).model, 3)
    client, server, missing = huggingface.from_tensors(tensors, *empty, huggingface.CLASSIFIER_CLIENT)
    assert missing == []
    tokens, types, mask = inputs()
    ours = np.asarray(apply(client, server, tokens, types, mask)[2])[:, 0]
    with torch.no_grad():
        logits = model(torch.tensor(tokens), attention_mask=torch.tensor(mask), token_type_ids=torch.tensor(types)).logits
    by_name = {theirs[str(n)].lower(): logits[:, n].numpy() for n in range(3)}
    for n, label in enumerate(("entailment", "neutral", "contradiction")):
        np.testing.assert_allclose(ours[:, n], by_name[label], atol=1e-4)

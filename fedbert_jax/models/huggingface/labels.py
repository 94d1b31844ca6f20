"""A checkpoint's own classifier: kept, with its labels in the task's order, or left out because it is for another task."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedbert_jax.models.huggingface.names import CLASSIFIER, Tensors

WEIGHT, BIAS = CLASSIFIER
_NUMBERED = re.compile(r"(?:label|class)?[\s_-]*(\d+)")  # names that only count: LABEL_0, as `transformers` fills in
SCORE = "score"  # the name given here to the one output of a regression


class Fitted(NamedTuple):
    """A checkpoint's tensors, fitted to a task."""

    tensors: Tensors  # without a classifier, unless the checkpoint has one for this very task
    said: str  # what became of its classifier, in a sentence without a full stop; "" if it has none


def fit_classifier(tensors: Tensors, hf: Mapping[str, Any], task: str, labels: Sequence[str]) -> Fitted:
    """Puts a checkpoint's classifier into a task's order of labels, by the names in its config.json, or leaves it out.

    Names match in any case, and with hyphens, underscores, spaces or nothing between their words. Names that only count
    (LABEL_0, LABEL_1) are taken to be in the task's order, and so are outputs without names, since nothing says otherwise.

    Args:
      tensors: the checkpoint's.
      hf: its config.json.
      task: the task's name, for `said`.
      labels: the task's labels, in its own order; none for a regression.
    """
    if WEIGHT not in tensors and BIAS not in tensors:
        return Fitted(tensors, "")
    try:
        order, said = _order(tensors, hf, labels)
    except ValueError as error:
        others = {name: value for name, value in tensors.items() if name not in CLASSIFIER}
        return Fitted(others, f"the checkpoint's own classifier is not used, and {task} begins with a new one: {error}")
    return Fitted(tensors | {name: tensors[name][order] for name in CLASSIFIER}, said)


def _order(tensors: Tensors, hf: Mapping[str, Any], labels: Sequence[str]) -> tuple[np.ndarray, str]:
    """Returns the numbers of the checkpoint's outputs in the task's order, and a sentence about the match.

    Raises:
      ValueError: if the outputs are not the task's; the message says why.
    """
    wanted = len(labels) or 1
    weight, bias = (tensors[name].shape if name in tensors else () for name in CLASSIFIER)
    if len(weight) != 2 or bias != weight[:1]:
        raise ValueError(f"its tensors don't fit together ({WEIGHT} {weight}, {BIAS} {bias})")
    names = _names(hf, weight[0])
    outputs = f"{weight[0]} output{'s' * (weight[0] != 1)}" + (f" ({_listed(names)})" if names else "")
    if weight[0] != wanted:
        raise ValueError(f"it has {outputs}, not {wanted}")
    problem = hf.get("problem_type")
    if problem is not None and (problem == "regression") == bool(labels):
        here = "labels to tell apart" if labels else "a score to predict"
        raise ValueError(f"it was trained for another kind of task (problem_type {problem!r}), and this one has {here}")
    ours = ", ".join(labels) if labels else SCORE
    numbers = [int(found[1]) for found in map(_NUMBERED.fullmatch, map(str.casefold, names)) if found]
    if not names or sorted(numbers) in (list(range(wanted)), list(range(1, wanted + 1))):
        how = f"are only numbered ({_listed(names)}), and by number" if names else "have no names, and in order"
        said = f"the checkpoint's own classifier is kept: its labels {how} are taken to be {ours}"
        return np.argsort(numbers) if names else np.arange(wanted), said
    theirs = [_key(name) for name in names]
    order = [theirs.index(_key(name)) if _key(name) in theirs else -1 for name in labels or [SCORE]]
    if sorted(order) != list(range(wanted)):
        raise ValueError(f"its labels are {_listed(names)}, not {ours}")
    said = "the checkpoint's own classifier is kept: its labels are the task's"
    if order != list(range(wanted)):
        said += f", and its outputs ({_listed(names)}) are put into the task's order ({ours})"
    return np.array(order), said


def _names(hf: Mapping[str, Any], outputs: int) -> list[str]:
    """Returns the label of each output, in the outputs' order; [] if config.json gives none."""
    found = hf.get("id2label")
    if found is None and isinstance(hf.get("label2id"), dict):
        found = {number: name for name, number in hf["label2id"].items()}
    if found is None:
        return []
    pairs = found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list) else ()
    try:
        names = {int(number): str(name) for number, name in pairs}
    except (TypeError, ValueError):
        names = {}
    if sorted(names) != list(range(outputs)):
        raise ValueError(f"its config.json has {len(names)} usable entries in id2label for {outputs} outputs")
    return [names[n] for n in range(outputs)]


def _key(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name.casefold())


def _listed(names: Sequence[str]) -> str:
    shown = [name if name.isprintable() else ascii(name) for name in names[:5]]
    return ", ".join(shown) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")

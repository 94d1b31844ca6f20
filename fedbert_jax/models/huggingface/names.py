"""Tensors by Hugging Face's names: the three segments as the tensors of a `BertForMaskedLM`, and back.

With a classifier for a head, they become those of a `BertForSequenceClassification`. The mapping is exact: linear kernels
are transposed, the fused q, k, v projection is split, stacked layers are unstacked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from fedbert_jax.errors import UserError
from fedbert_jax.models.bert import Params

Tensors = dict[str, np.ndarray]

# HF name -> path in the client segment; `T` marks a matrix that is transposed.
EMBEDDINGS = {
    "bert.embeddings.word_embeddings.weight": "embeddings/word/embedding",
    "bert.embeddings.position_embeddings.weight": "embeddings/position/embedding",
    "bert.embeddings.token_type_embeddings.weight": "embeddings/token_type/embedding",
    "bert.embeddings.LayerNorm.weight": "embeddings/norm/norm/scale",
    "bert.embeddings.LayerNorm.bias": "embeddings/norm/norm/bias",
}
MLM_HEAD = {
    "cls.predictions.transform.dense.weight": "head/dense/kernel T",
    "cls.predictions.transform.dense.bias": "head/dense/bias",
    "cls.predictions.transform.LayerNorm.weight": "head/norm/norm/scale",
    "cls.predictions.transform.LayerNorm.bias": "head/norm/norm/bias",
    "cls.predictions.bias": "head/bias",
}
POOLER = {
    "bert.pooler.dense.weight": "pooler/kernel T",
    "bert.pooler.dense.bias": "pooler/bias",
}
CLASSIFIER = {
    "classifier.weight": "classifier/kernel T",
    "classifier.bias": "classifier/bias",
}
CLIENT = EMBEDDINGS | MLM_HEAD
CLASSIFIER_CLIENT = EMBEDDINGS | POOLER | CLASSIFIER
# The same for one layer of the body, after "bert.encoder.layer.N."; q, k and v are three slices of one array.
LAYER = {
    "attention.self.query.weight": "attention/qkv/kernel T 0",
    "attention.self.key.weight": "attention/qkv/kernel T 1",
    "attention.self.value.weight": "attention/qkv/kernel T 2",
    "attention.self.query.bias": "attention/qkv/bias 0",
    "attention.self.key.bias": "attention/qkv/bias 1",
    "attention.self.value.bias": "attention/qkv/bias 2",
    "attention.output.dense.weight": "attention/out/kernel T",
    "attention.output.dense.bias": "attention/out/bias",
    "attention.output.LayerNorm.weight": "attention_norm/norm/scale",
    "attention.output.LayerNorm.bias": "attention_norm/norm/bias",
    "intermediate.dense.weight": "up/kernel T",
    "intermediate.dense.bias": "up/bias",
    "output.dense.weight": "down/kernel T",
    "output.dense.bias": "down/bias",
    "output.LayerNorm.weight": "output_norm/norm/scale",
    "output.LayerNorm.bias": "output_norm/norm/bias",
}


# What a warning calls the tensors whose names begin like this.
PARTS = {
    "bert.embeddings.": "the embeddings",
    "bert.encoder.": "the body",
    "bert.pooler.": "the pooler",
    "cls.predictions.": "the MLM head",
    "classifier.": "the classifier",
}
DECODER = "cls.predictions.decoder"
WORDS = "bert.embeddings.word_embeddings.weight"


def all_layers(client_params: Params, server_params: Params) -> Params:
    """Returns the stack of all layers, the client's first: float32 arrays [L, ...]."""
    stacks = [params["layers"] for params in (client_params, server_params) if "layers" in params]
    return _map_all(lambda *parts: np.concatenate([np.asarray(x, np.float32) for x in parts]), *stacks)


def to_tensors(client_params: Params, server_params: Params, names: Mapping[str, str] = CLIENT) -> Tensors:
    """Returns the tensors of a `BertForMaskedLM`, float32, by their Hugging Face names.

    The decoder is tied to the word embeddings, so it is left out, as in `save_pretrained`.

    Args:
      client_params: of the client segment, including the client's own layers.
      server_params: of the body.
      names: those of the client segment; `CLASSIFIER_CLIENT` gives the tensors of a `BertForSequenceClassification`.
    """

    def take(params: Params, rule: str, layer: int | None = None) -> np.ndarray:
        path, *how = rule.split()
        leaf: Any = params
        for part in path.split("/"):
            leaf = leaf[part]
        array = np.asarray(leaf if layer is None else leaf[layer], np.float32)
        if how and how[-1].isdigit():
            array = array[..., int(how[-1]), :]
        return np.ascontiguousarray(array.T if "T" in how else array)

    tensors = {name: take(client_params, rule) for name, rule in names.items()}
    layers = all_layers(client_params, server_params)
    for n in range(_depth(layers)):
        for name, rule in LAYER.items():
            tensors[f"bert.encoder.layer.{n}.{name}"] = take(layers, rule, n)
    return tensors


def from_tensors(
    tensors: Tensors, client_params: Params, server_params: Params, names: Mapping[str, str] = CLIENT
) -> tuple[Params, Params, list[str]]:
    """Fills parameters from the tensors of a BERT checkpoint.

    Args:
      tensors: by Hugging Face names, with or without the `bert.` prefix, LayerNorm as weight/bias or gamma/beta.
      client_params: the values to keep where the checkpoint has none (a bare `BertModel` has no MLM head).
      server_params: likewise.
      names: the client segment's, `CLIENT` or `CLASSIFIER_CLIENT`.

    Returns:
      (client_params, server_params, names that the checkpoint lacks). A classifier for another number of labels is lacking.

    Raises:
      UserError: if a tensor isn't finite or differs in shape from the model's, or if the checkpoint has more layers, no
        tensor of a BERT, or a decoder that is not its word table.
    """
    layers = all_layers(client_params, server_params)
    num_layers = _depth(layers)
    own = num_layers - _depth(server_params["layers"])  # the client's
    check_finite(tensors, names)
    found = {_canonical(name): value for name, value in tensors.items()}
    _check_layers(found, num_layers)
    if not names.keys().isdisjoint(MLM_HEAD):
        found = _tied(found)
    missing: list[str] = []

    def fill(params: Params, rules: Mapping[str, str], layers: int | None) -> Params:
        params = _copy(params)
        for name, rule in rules.items():
            path, *how = rule.split()
            *parents, last = path.split("/")
            node = params
            for part in parents:
                node = node[part]
            for n in range(layers or 1):
                full = name if layers is None else f"bert.encoder.layer.{n}.{name}"
                place = node[last] if layers is None else node[last][n]
                place = place[..., int(how[-1]), :] if how and how[-1].isdigit() else place
                place = place.T if "T" in how else place  # a view, laid out as the checkpoint's
                if full not in found or (name in CLASSIFIER and found[full].shape != place.shape):
                    missing.append(full)
                    continue
                if found[full].shape != place.shape:
                    raise UserError(
                        f"the checkpoint's {full} has shape {found[full].shape}, the model's has {place.shape}; "
                        "give the model the checkpoint's sizes."
                    )
                place[...] = found[full]
        return params

    client = fill(client_params, names, None)
    layers = fill(layers, LAYER, num_layers)
    if len(missing) == len(names) + num_layers * len(LAYER):
        some = ", ".join(sorted(tensors)[:3]) or "no tensor"
        raise UserError(f"the checkpoint holds no tensor of a BERT's names; it has {some}, ...")
    if own:
        client["layers"] = _map_all(lambda x: x[:own], layers)
    as_jax = lambda tree: _map_all(jnp.asarray, tree)  # noqa: E731
    return as_jax(client), {"layers": as_jax(_map_all(lambda x: x[own:], layers))}, missing


def check_finite(tensors: Tensors, names: Mapping[str, str] = CLIENT) -> None:
    """Raises UserError, naming the tensors, if a number that a model would start from is not finite.

    Args:
      tensors: of a checkpoint. Those that the model doesn't take, such as next-sentence prediction's, may hold anything.
      names: the client segment's.
    """
    taken = {*names, *((f"{DECODER}.weight", f"{DECODER}.bias") if MLM_HEAD.keys() <= names.keys() else ())}
    bad = [
        (name, int(value.size - np.isfinite(value).sum()))
        for name, value in tensors.items()
        if (_canonical(name) in taken or _canonical(name).startswith("bert.encoder.")) and not np.isfinite(value).all()
    ]
    if bad:
        listed = ", ".join(f"{name} ({count:,} of {tensors[name].size:,})" for name, count in bad[:5])
        more = f" and {len(bad) - 5:,} more tensors" if len(bad) > 5 else ""
        raise UserError(
            f"the checkpoint has numbers that are not finite (NaN, infinite, or too large for float32) in {listed}{more}; "
            "accepted: finite weights."
        )


def describe_missing(missing: Sequence[str]) -> list[str]:
    """Groups the names that `from_tensors` found missing: ["the MLM head (5 tensors: cls.predictions.bias, ...)"]."""
    parts: dict[str, list[str]] = {}
    for name in missing:
        title = next((title for start, title in PARTS.items() if name.startswith(start)), "others")
        parts.setdefault(title, []).append(name)
    return [
        f"{title} ({len(names)} tensor{'s' * (len(names) > 1)}: {', '.join(names[:5])}{', ...' * (len(names) > 5)})"
        for title, names in parts.items()
    ]


def _check_layers(tensors: Tensors, num_layers: int) -> None:
    found = {int(m[1]) for m in map(re.compile(r"bert\.encoder\.layer\.(\d+)\.").match, tensors) if m}
    if found and max(found) >= num_layers:
        raise UserError(
            f"the checkpoint has {max(found) + 1} layers, the model has {num_layers} (num_hidden_layers in config.json)."
        )


def _tied(tensors: Tensors) -> Tensors:
    """Returns the tensors with the decoder folded into the word table and the head's bias, to which it is tied."""
    for name, twin in ((f"{DECODER}.weight", WORDS), (f"{DECODER}.bias", "cls.predictions.bias")):
        if name not in tensors:
            continue
        tensors = tensors if twin in tensors else tensors | {twin: tensors[name]}
        if not np.array_equal(tensors[name], tensors[twin]):
            raise UserError(f"the checkpoint's {name} differs from its {twin}, to which the model here ties it.")
    return tensors


def _canonical(name: str) -> str:
    """Maps the spellings of a tensor's name in old and new checkpoints to one."""
    name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
    if name.startswith(("embeddings.", "encoder.", "pooler.")):
        name = "bert." + name
    return name


def _copy(tree: Any) -> Any:
    return _map_all(lambda x: np.array(x, np.float32), tree)


def _map_all(fn: Any, *trees: Any) -> Any:
    """Applies a function to the arrays of nested dicts with the same keys."""
    if not isinstance(trees[0], dict):
        return fn(*trees)
    return {key: _map_all(fn, *(tree[key] for tree in trees)) for key in trees[0]}


def _depth(layers: Params) -> int:
    return int(np.shape(layers["up"]["bias"])[0])

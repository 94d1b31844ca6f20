"""Hugging Face in and out: the three segments as a `BertForMaskedLM` directory, and back.

With a classifier for a head they are a `BertForSequenceClassification`. The mapping is exact: linear kernels are transposed,
the fused q, k, v projection is split, stacked layers are unstacked.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from fedbert_jax import __version__
from fedbert_jax.config import ModelConfig
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


# What a reader of a warning calls the tensors whose names begin so.
PARTS = {
    "bert.embeddings.": "the embeddings", "bert.encoder.": "the body", "bert.pooler.": "the pooler",
    "cls.predictions.": "the MLM head", "classifier.": "the classifier",
}  # fmt: skip
# Names of the architectures that are most often taken for BERT, by their model_type.
OTHERS = {
    "albert": "ALBERT", "big_bird": "BigBird", "camembert": "CamemBERT", "deberta": "DeBERTa", "deberta-v2": "DeBERTa-v2",
    "distilbert": "DistilBERT", "electra": "ELECTRA", "gpt2": "GPT-2", "mobilebert": "MobileBERT",
    "modernbert": "ModernBERT", "mpnet": "MPNet", "roberta": "RoBERTa", "roformer": "RoFormer", "xlm-roberta": "XLM-RoBERTa",
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors calls them
DECODER = "cls.predictions.decoder"
WORDS = "bert.embeddings.word_embeddings.weight"


def to_tensors(
    client_params: Params, server_params: Params, num_layers: int, names: Mapping[str, str] = CLIENT
) -> Tensors:
    """Returns the tensors of a `BertForMaskedLM`, float32, by their Hugging Face names.

    The decoder is tied to the word embeddings, so it is left out, as `save_pretrained` does.

    Args:
      client_params: of the client segment.
      server_params: of the body.
      num_layers: of the body.
      names: the client segment's; with `CLASSIFIER_CLIENT` they are a `BertForSequenceClassification`'s.
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
    for n in range(num_layers):
        for name, rule in LAYER.items():
            tensors[f"bert.encoder.layer.{n}.{name}"] = take(server_params["layers"], rule, n)
    return tensors


def from_tensors(
    tensors: Tensors, client_params: Params, server_params: Params, names: Mapping[str, str] = CLIENT
) -> tuple[Params, Params, list[str]]:
    """Fills parameters from the tensors of a BERT checkpoint.

    Args:
      tensors: by Hugging Face names, with or without the `bert.` prefix, LayerNorm as weight/bias or gamma/beta.
      client_params: what to keep where the checkpoint has nothing (a bare `BertModel` has no MLM head).
      server_params: likewise.
      names: the client segment's, `CLIENT` or `CLASSIFIER_CLIENT`.

    Returns:
      (client_params, server_params, names that the checkpoint lacks). It lacks a classifier for another number of labels.

    Raises:
      UserError: if a tensor has another shape than the model's, the checkpoint has more layers, it has nothing of BERT's,
        or its decoder is not its word table.
    """
    num_layers = np.shape(server_params["layers"]["up"]["bias"])[0]
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
    layers = fill(server_params["layers"], LAYER, num_layers)
    if len(missing) == len(names) + num_layers * len(LAYER):
        some = ", ".join(sorted(tensors)[:3]) or "no tensor"
        raise UserError(f"the checkpoint holds no tensor of a BERT's names; it has {some}, ...")
    as_jax = lambda tree: _map(jnp.asarray, tree)  # noqa: E731
    return as_jax(client), {"layers": as_jax(layers)}, missing


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
    """Returns tensors whose decoder was folded into what it is tied to, the word table and the head's bias."""
    for name, twin in ((f"{DECODER}.weight", WORDS), (f"{DECODER}.bias", "cls.predictions.bias")):
        if name not in tensors:
            continue
        tensors = tensors if twin in tensors else tensors | {twin: tensors[name]}
        if not np.array_equal(tensors[name], tensors[twin]):
            raise UserError(f"the checkpoint's {name} differs from its {twin}, to which the model here ties it.")
    return tensors


def save(
    directory: Path, client_params: Params, server_params: Params, model: ModelConfig, tokenizer: Any, card: str,
    labels: Sequence[str] = (), regression: bool = False,
) -> None:  # fmt: skip
    """Writes a directory that `AutoModelForMaskedLM.from_pretrained` and `pipeline("fill-mask")` load.

    It appears at once or not at all; one that is there is replaced. With `labels` the client segment is a classifier, and
    `AutoModelForSequenceClassification` loads it.
    """
    from safetensors.numpy import save_file

    assert model.num_layers is not None
    new = directory.with_name(directory.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    tensors = to_tensors(client_params, server_params, model.num_layers, CLASSIFIER_CLIENT if labels else CLIENT)
    save_file(tensors, new / "model.safetensors", {"format": "pt"})
    (new / "config.json").write_text(json.dumps(hf_config(model, tokenizer, labels, regression), indent=2) + "\n")
    tokenizer.save_pretrained(new)
    (new / "README.md").write_text(card)
    old = directory.with_name(directory.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        os.replace(directory, old)
    os.replace(new, directory)
    shutil.rmtree(old, ignore_errors=True)


def hf_config(
    model: ModelConfig, tokenizer: Any, labels: Sequence[str] = (), regression: bool = False
) -> dict[str, Any]:
    """Returns the config.json of a `BertForMaskedLM` of this shape; with labels, a `BertForSequenceClassification`'s."""
    classifier = {
        "id2label": {str(n): label for n, label in enumerate(labels)},
        "label2id": {label: n for n, label in enumerate(labels)},
        "problem_type": "regression" if regression else "single_label_classification",
    }
    return {
        "architectures": ["BertForSequenceClassification" if labels else "BertForMaskedLM"],
        "model_type": "bert",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "intermediate_size": model.intermediate_size,
        "hidden_act": "gelu",
        "hidden_dropout_prob": model.hidden_dropout,
        "attention_probs_dropout_prob": model.attention_dropout,
        "max_position_embeddings": model.max_position_embeddings,
        "type_vocab_size": model.type_vocab_size,
        "initializer_range": model.initializer_range,
        "layer_norm_eps": model.layer_norm_eps,
        "pad_token_id": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
        "tie_word_embeddings": True,
        "dtype": "float32",
    } | (classifier if labels else {})


def model_card(config: Any, facts: dict[str, Any]) -> str:
    """Returns the README.md of an exported model: what it is and how it came to be."""
    f, d = config.federated, config.data
    rows = {
        "strategy": f.strategy + (f" ({f.body} body)" if f.strategy == "parallel" else ""),
        "clients": f"{facts.get('num_clients')}, {facts.get('clients_per_round')} a round",
        "local steps x rounds": f"{f.local_steps} x {facts.get('round')}",
        "sequences a client a step": f"{f.batch_size} of {d.seq_len} tokens",
        "training tokens": facts.get("tokens"),
        "started from": f"`{config.model.init_from}`" if config.model.init_from else None,
        "text": f"`{d.source}`, partition `{d.partition.kind}`",
        "held-out MLM loss": facts.get("eval_loss"),
        "held-out MLM accuracy": facts.get("eval_accuracy"),
        "seed": config.seed,
        "exported client": facts.get("client"),
    }
    table = "\n".join(f"| {k} | {v} |" for k, v in rows.items() if v is not None)
    return (
        "---\nlibrary_name: transformers\npipeline_tag: fill-mask\ntags: [bert, federated-learning, split-learning]\n"
        f"---\n\n# A BERT pre-trained by federated split learning\n\nTrained by fedbert_jax {__version__}, which implements "
        "FedBERT (Tian et al., ACM TIST 2022).\n\n| | |\n| --- | --- |\n" + table + "\n\n"
        "A cut (strategies `parallel` and `sequential`) keeps raw text and labels at the clients during training. It does "
        "not by itself stop a server from inverting activations, whoever also holds the client segment can read tokens "
        "and labels off what crosses, and the model may repeat what it was trained on.\n"
    )


def classifier_card(config: Any, task: str) -> str:
    """Returns the README.md of an exported classifier: what it is and how it came to be."""
    rows = {
        "task": task,
        "started from": f"`{config.model.init_from}`" if config.model.init_from else "random weights",
        "strategy": config.federated.strategy,
        "clients": None if config.federated.strategy == "centralized" else config.federated.num_clients,
        "epochs": config.finetune.epochs,
        "seed": config.seed,
    }
    table = "\n".join(f"| {k} | {v} |" for k, v in rows.items() if v is not None)
    return (
        "---\nlibrary_name: transformers\npipeline_tag: text-classification\n"
        f"tags: [bert, federated-learning, split-learning]\n---\n\n# A BERT fine-tuned on {task}\n\n"
        f"Trained by fedbert_jax {__version__}.\n\n| | |\n| --- | --- |\n{table}\n"
    )


def load_tensors(directory: Path) -> tuple[Tensors, dict[str, Any]]:
    """Reads a checkpoint directory's safetensors (one file, or shards by their index) and its config.json.

    Returns:
      (tensors, config.json). Tensors of any floating type become float32; others, which BERT doesn't need, are left out.

    Raises:
      UserError: if there are none, or they can't be read. Nothing is ever unpickled.
    """
    hf, tensors = read_config(directory), {}
    for file in _weight_files(directory, hf):
        tensors.update(_read_safetensors(file))
    return tensors, hf


def read_config(directory: Path) -> dict[str, Any]:
    """Reads a checkpoint directory's config.json; raises UserError if there is none or it is none."""
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory} holds no config.json; accepted: a Hugging Face BERT directory.")
    return _read_json(directory / "config.json")


def conversion(source: str, target: str, hf: Mapping[str, Any], tokenizer: bool = False) -> str:
    """Returns the command that converts pickled weights, a model's directory or hub name, to safetensors."""
    named = [a for a in hf.get("architectures") or () if re.fullmatch(r"Bert\w+", str(a))]
    kinds = [named[0] if named else "BertForPreTraining"] + ["AutoTokenizer"] * tokenizer
    code = "; ".join(f"t.{kind}.from_pretrained({source!r}).save_pretrained({target!r})" for kind in kinds)
    return f'python -c "import transformers as t; {code}"'  # transformers 5 always writes safetensors, 4.35 by default


def _weight_files(directory: Path, hf: Mapping[str, Any]) -> list[Path]:
    """Returns the files that hold the weights, looked for as `transformers` does: one file before an index."""
    one, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if one.is_file():
        return [one]
    if index.is_file():
        shards = _read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(f, str) for f in shards.values()):
            raise UserError(f"{index} has no weight_map from tensors to files; download it again.")
        files = [directory / file for file in sorted(set(shards.values()))]
        lost = [file.name for file in files if not file.is_file()]
        if lost:
            raise UserError(f"{directory} lacks {', '.join(lost)}, which {index.name} names; download it again.")
        return files
    others = sorted(directory.glob("*.safetensors"))
    if len(others) == 1:
        return others
    if others:
        names = ", ".join(file.name for file in others)
        raise UserError(f"{directory} holds {names}; accepted: model.safetensors, or shards and their {index.name}.")
    if any(directory.glob("pytorch_model*.bin")):
        command = conversion(str(directory), str(directory), hf)
        raise UserError(f"{directory} holds pickled weights only, which are never read; convert them, with torch: {command}")
    raise UserError(f"{directory} holds no {one.name} and no {index.name}.")


def _read_safetensors(file: Path) -> Tensors:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as opened:  # bfloat16 through ml_dtypes, which jax has imported
            kinds = {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
            floats = [name for name, kind in kinds.items() if kind in FLOATS]
            odd = [name for name in kinds.keys() - floats if name.endswith((".weight", ".bias", ".gamma", ".beta"))]
            if odd:
                raise UserError(f"{file} has weights of type {kinds[odd[0]]}; accepted: {', '.join(FLOATS)}.")
            return {name: np.asarray(opened.get_tensor(name), np.float32) for name in floats}
    except (SafetensorError, OSError) as e:
        reason = " ".join(str(e).split()).rstrip(".")
        raise UserError(f"{file} can't be read: it is damaged or not all there ({reason}).") from e


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as e:
        raise UserError(f"{file} can't be read as JSON ({e}).") from e
    if not isinstance(value, dict):
        raise UserError(f"{file} holds a {type(value).__name__}; accepted: a JSON object.")
    return value


def sizes_of(hf: dict[str, Any], where: str) -> dict[str, Any]:
    """Returns the `ModelConfig` sizes that a checkpoint's config.json gives.

    Raises:
      UserError: for another architecture, activation or position type, a decoder, or a size that is none.
    """
    kind = hf.get("model_type")
    if kind is None:
        raise UserError(f"{where}'s config.json has no model_type; accepted: 'bert' (add it if this is a BERT).")
    if not isinstance(kind, str):
        raise UserError(f"{where} has model_type={kind!r}; accepted: 'bert'.")
    if kind != "bert":
        name = OTHERS.get(kind, kind)
        article = "an" if name[:1] in "AEIOUaeiou" else "a"
        raise UserError(f"{where} is {article} {name} checkpoint (model_type {kind!r}); accepted: BERT (model_type 'bert').")
    for key, accepted in (("hidden_act", "gelu"), ("position_embedding_type", "absolute")):
        if hf.get(key) not in (None, accepted):
            raise UserError(f"{where} has {key}={hf[key]!r}; accepted: {accepted!r}.")
    for key in ("is_decoder", "add_cross_attention"):
        if hf.get(key):
            raise UserError(f"{where} has {key}={hf[key]!r}; accepted: false, an encoder that attends to both sides.")
    names = {
        "vocab_size": "vocab_size", "hidden_size": "hidden_size", "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads", "intermediate_size": "intermediate_size",
        "max_position_embeddings": "max_position_embeddings", "type_vocab_size": "type_vocab_size",
    }  # fmt: skip
    missing = [theirs for theirs in names.values() if theirs not in hf]
    if missing:
        raise UserError(f"{where}'s config.json lacks {', '.join(missing)}.")
    for theirs in names.values():
        if type(hf[theirs]) is not int or hf[theirs] < 1:
            raise UserError(f"{where} has {theirs}={hf[theirs]!r}; accepted: an integer of at least 1.")
    eps = hf.get("layer_norm_eps", 1e-12)
    if type(eps) not in (int, float) or not 0 < eps < 1:
        raise UserError(f"{where} has layer_norm_eps={eps!r}; accepted: a number between 0 and 1.")
    return {ours: hf[theirs] for ours, theirs in names.items()} | {"layer_norm_eps": float(eps)}


def _canonical(name: str) -> str:
    """Maps the spellings of a tensor's name in old and new checkpoints to one."""
    name = name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
    if name.startswith(("embeddings.", "encoder.", "pooler.")):
        name = "bert." + name
    return name


def _copy(tree: Any) -> Any:
    return _map(lambda x: np.array(x, np.float32), tree)


def _map(fn: Any, tree: Any) -> Any:
    return {k: _map(fn, v) for k, v in tree.items()} if isinstance(tree, dict) else fn(tree)

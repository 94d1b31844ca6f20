"""Hugging Face in and out: the three segments as a `BertForMaskedLM` directory, and back.

The mapping is exact: linear kernels are transposed, the fused q, k, v projection is split, stacked layers are unstacked.
"""

from __future__ import annotations

import json
import os
import shutil
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
CLIENT = {
    "bert.embeddings.word_embeddings.weight": "embeddings/word/embedding",
    "bert.embeddings.position_embeddings.weight": "embeddings/position/embedding",
    "bert.embeddings.token_type_embeddings.weight": "embeddings/token_type/embedding",
    "bert.embeddings.LayerNorm.weight": "embeddings/norm/norm/scale",
    "bert.embeddings.LayerNorm.bias": "embeddings/norm/norm/bias",
    "cls.predictions.transform.dense.weight": "head/dense/kernel T",
    "cls.predictions.transform.dense.bias": "head/dense/bias",
    "cls.predictions.transform.LayerNorm.weight": "head/norm/norm/scale",
    "cls.predictions.transform.LayerNorm.bias": "head/norm/norm/bias",
    "cls.predictions.bias": "head/bias",
}
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


def to_tensors(client_params: Params, server_params: Params, num_layers: int) -> Tensors:
    """Returns the tensors of a `BertForMaskedLM`, float32, by their Hugging Face names.

    The decoder is tied to the word embeddings, so it is left out, as `save_pretrained` does.
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

    tensors = {name: take(client_params, rule) for name, rule in CLIENT.items()}
    for n in range(num_layers):
        for name, rule in LAYER.items():
            tensors[f"bert.encoder.layer.{n}.{name}"] = take(server_params["layers"], rule, n)
    return tensors


def from_tensors(tensors: Tensors, client_params: Params, server_params: Params) -> tuple[Params, Params, list[str]]:
    """Fills parameters from the tensors of a BERT checkpoint.

    Args:
      tensors: by Hugging Face names, with or without the `bert.` prefix, LayerNorm as weight/bias or gamma/beta.
      client_params: what to keep where the checkpoint has nothing (a bare `BertModel` has no MLM head).
      server_params: likewise.

    Returns:
      (client_params, server_params, names that the checkpoint lacks).

    Raises:
      UserError: if a tensor has another shape than the model's.
    """
    tensors = {_canonical(name): value for name, value in tensors.items()}
    missing: list[str] = []

    def fill(params: Params, names: dict[str, str], layers: int | None) -> Params:
        params = _copy(params)
        for name, rule in names.items():
            path, *how = rule.split()
            *parents, last = path.split("/")
            node = params
            for part in parents:
                node = node[part]
            for n in range(layers or 1):
                full = name if layers is None else f"bert.encoder.layer.{n}.{name}"
                if full not in tensors:
                    missing.append(full)
                    continue
                value = np.asarray(tensors[full], np.float32)
                value = value.T if "T" in how else value
                place = node[last] if layers is None else node[last][n]
                place = place[..., int(how[-1]), :] if how and how[-1].isdigit() else place
                if place.shape != value.shape:
                    raise UserError(
                        f"the checkpoint's {full} has shape {value.shape}, the model's has {place.shape} "
                        f"(as used here); give the model the checkpoint's sizes."
                    )
                place[...] = value
        return params

    client = fill(client_params, CLIENT, None)
    num_layers = np.shape(server_params["layers"]["up"]["bias"])[0]
    layers = fill(server_params["layers"], LAYER, num_layers)
    as_jax = lambda tree: _map(jnp.asarray, tree)  # noqa: E731
    return as_jax(client), {"layers": as_jax(layers)}, missing


def save(
    directory: Path, client_params: Params, server_params: Params, model: ModelConfig, tokenizer: Any, card: str
) -> None:
    """Writes a directory that `AutoModelForMaskedLM.from_pretrained` and `pipeline("fill-mask")` load.

    It appears at once or not at all; one that is there is replaced.
    """
    from safetensors.numpy import save_file

    assert model.num_layers is not None
    new = directory.with_name(directory.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    save_file(to_tensors(client_params, server_params, model.num_layers), new / "model.safetensors", {"format": "pt"})
    (new / "config.json").write_text(json.dumps(hf_config(model, tokenizer), indent=2) + "\n")
    tokenizer.save_pretrained(new)
    (new / "README.md").write_text(card)
    old = directory.with_name(directory.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        os.replace(directory, old)
    os.replace(new, directory)
    shutil.rmtree(old, ignore_errors=True)


def hf_config(model: ModelConfig, tokenizer: Any) -> dict[str, Any]:
    """Returns the config.json of a `BertForMaskedLM` of this shape."""
    return {
        "architectures": ["BertForMaskedLM"],
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
    }


def model_card(config: Any, facts: dict[str, Any]) -> str:
    """Returns the README.md of an exported model: what it is and how it came to be."""
    f, d = config.federated, config.data
    rows = {
        "strategy": f.strategy + (f" ({f.body} body)" if f.strategy == "parallel" else ""),
        "clients": f"{facts.get('num_clients')}, {facts.get('clients_per_round')} a round",
        "local steps x rounds": f"{f.local_steps} x {facts.get('round')}",
        "sequences a client a step": f"{f.batch_size} of {d.seq_len} tokens",
        "training tokens": facts.get("tokens"),
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


def load_tensors(directory: Path) -> tuple[Tensors, dict[str, Any]]:
    """Reads a checkpoint directory's safetensors (one file, or sharded with an index) and its config.json.

    Raises:
      UserError: if there are none, or they can't be read. Nothing is ever unpickled.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not (directory / "config.json").is_file():
        raise UserError(f"{directory} holds no config.json; accepted: a Hugging Face BERT directory.")
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        hint = "convert pytorch_model.bin with `save_pretrained(DIR, safe_serialization=True)`"
        raise UserError(f"{directory} holds no *.safetensors; {hint} (pickled weights are never read).")
    tensors: Tensors = {}
    try:
        for file in files:
            tensors.update(load_file(file))
    except (SafetensorError, OSError) as e:
        raise UserError(f"{file} can't be read ({e}).") from e
    return tensors, json.loads((directory / "config.json").read_text())


def sizes_of(hf: dict[str, Any], where: str) -> dict[str, Any]:
    """Returns the `ModelConfig` sizes that a checkpoint's config.json gives.

    Raises:
      UserError: for another architecture, activation or position type.
    """
    if hf.get("model_type") != "bert":
        raise UserError(f"{where} is a {hf.get('model_type')!r} checkpoint; accepted: 'bert'.")
    for key, accepted in (("hidden_act", "gelu"), ("position_embedding_type", "absolute")):
        if hf.get(key, accepted) != accepted:
            raise UserError(f"{where} has {key}={hf[key]!r}; accepted: {accepted!r}.")
    names = {
        "vocab_size": "vocab_size", "hidden_size": "hidden_size", "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads", "intermediate_size": "intermediate_size",
        "max_position_embeddings": "max_position_embeddings", "type_vocab_size": "type_vocab_size",
    }  # fmt: skip
    missing = [theirs for theirs in names.values() if theirs not in hf]
    if missing:
        raise UserError(f"{where}'s config.json lacks {', '.join(missing)}.")
    return {ours: hf[theirs] for ours, theirs in names.items()} | {"layer_norm_eps": hf.get("layer_norm_eps", 1e-12)}


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

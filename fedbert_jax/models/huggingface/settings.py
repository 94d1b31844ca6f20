"""A model's config.json: written for a model of ours, and read for the sizes of a given checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedbert_jax.config import ExportConfig, ModelConfig
from fedbert_jax.errors import UserError

USUAL_DROPOUT = 0.1  # BERT's (Devlin et al. 2019, appendix A.2)
# Names of the architectures that are most often taken for BERT, by their model_type.
OTHERS = {
    "albert": "ALBERT",
    "big_bird": "BigBird",
    "camembert": "CamemBERT",
    "deberta": "DeBERTa",
    "deberta-v2": "DeBERTa-v2",
    "distilbert": "DistilBERT",
    "electra": "ELECTRA",
    "gpt2": "GPT-2",
    "mobilebert": "MobileBERT",
    "modernbert": "ModernBERT",
    "mpnet": "MPNet",
    "roberta": "RoBERTa",
    "roformer": "RoFormer",
    "xlm-roberta": "XLM-RoBERTa",
}


def hf_config(
    model: ModelConfig,
    tokenizer: Any,
    labels: Sequence[str] = (),
    regression: bool = False,
    export: ExportConfig | None = None,
) -> dict[str, Any]:
    """Returns the config.json of a `BertForMaskedLM` of this shape, or, with labels, of a `BertForSequenceClassification`.

    Its dropout is meant for further training: `export`'s, else the run's own, else BERT's. Most runs here train without
    dropout, which nobody who fine-tunes their model would expect.
    """
    export = export or ExportConfig()
    dropout = lambda asked, own: asked if asked is not None else own or USUAL_DROPOUT  # noqa: E731
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
        "hidden_dropout_prob": dropout(export.hidden_dropout, model.hidden_dropout),
        "attention_probs_dropout_prob": dropout(export.attention_dropout, model.attention_dropout),
        "max_position_embeddings": model.max_position_embeddings,
        "type_vocab_size": model.type_vocab_size,
        "initializer_range": model.initializer_range,
        "layer_norm_eps": model.layer_norm_eps,
        "pad_token_id": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
        "tie_word_embeddings": True,
        "dtype": "float32",
    } | (classifier if labels else {})


def dropout_of(hf: dict[str, Any], key: str) -> float | None:
    """Returns a dropout that a checkpoint's config.json gives under `key`; None if it gives none, or 0."""
    value = hf.get(key)
    return float(value) if isinstance(value, (int, float)) and 0 < value < 1 else None


def sizes_of(hf: dict[str, Any], where: str) -> dict[str, Any]:
    """Returns the `ModelConfig` sizes that a checkpoint's config.json gives.

    Raises:
      UserError: for another architecture, activation or position type, a decoder, or an invalid size.
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
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "intermediate_size": "intermediate_size",
        "max_position_embeddings": "max_position_embeddings",
        "type_vocab_size": "type_vocab_size",
    }
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

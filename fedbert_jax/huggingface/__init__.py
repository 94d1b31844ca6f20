"""Hugging Face in and out: a BERT's directory read, and a model of ours written as one."""

from fedbert_jax.huggingface.card import classifier_card, model_card
from fedbert_jax.huggingface.labels import SCORE, fit_classifier
from fedbert_jax.huggingface.names import (
    CLASSIFIER,
    CLASSIFIER_CLIENT,
    CLIENT,
    MLM_HEAD,
    Tensors,
    check_finite,
    describe_missing,
    from_tensors,
    to_tensors,
)
from fedbert_jax.huggingface.reading import conversion, load_tensors, read_config
from fedbert_jax.huggingface.settings import dropout_of, hf_config, sizes_of
from fedbert_jax.huggingface.writing import check_target, remove, save

__all__ = [
    "CLASSIFIER", "CLASSIFIER_CLIENT", "CLIENT", "MLM_HEAD", "SCORE", "Tensors", "check_finite", "check_target",
    "classifier_card", "conversion", "describe_missing", "dropout_of", "fit_classifier", "from_tensors", "hf_config",
    "load_tensors", "model_card", "read_config", "remove", "save", "sizes_of", "to_tensors",
]  # fmt: skip

"""Hugging Face directories: reads a BERT's, and writes a model of ours as one."""

from fedbert_jax.models.huggingface.card import model_card
from fedbert_jax.models.huggingface.labels import SCORE, fit_classifier
from fedbert_jax.models.huggingface.names import (
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
from fedbert_jax.models.huggingface.reading import conversion, load_tensors, local, read_config
from fedbert_jax.models.huggingface.settings import dropout_of, hf_config, sizes_of
from fedbert_jax.models.huggingface.writing import check_target, remove, save

__all__ = [
    "CLASSIFIER",
    "CLASSIFIER_CLIENT",
    "CLIENT",
    "MLM_HEAD",
    "SCORE",
    "Tensors",
    "check_finite",
    "check_target",
    "conversion",
    "describe_missing",
    "dropout_of",
    "fit_classifier",
    "from_tensors",
    "hf_config",
    "load_tensors",
    "local",
    "model_card",
    "read_config",
    "remove",
    "save",
    "sizes_of",
    "to_tensors",
]

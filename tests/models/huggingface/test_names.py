"""Export to Hugging Face and import: the same tensors, the same logits (invariant 7)."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
from tiny import tiny_config

from fedbert_jax.errors import UserError
from fedbert_jax.models import huggingface


def params(segments, seed=0):
    client, server = jax.jit(segments.init)(*jax.random.split(jax.random.key(seed)))
    shake = lambda x: x + 0.1 * np.random.default_rng(seed).standard_normal(x.shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(shake, (client, server))


def test_export_then_import_is_bit_for_bit(segments, config):
    client, server = params(segments)
    tensors = huggingface.to_tensors(client, server)
    fresh = jax.jit(segments.init)(*jax.random.split(jax.random.key(9)))
    back = huggingface.from_tensors(tensors, *fresh)
    assert back[2] == []
    for a, b in zip(jax.tree.leaves((client, server)), jax.tree.leaves(back[:2]), strict=True):
        assert np.array_equal(a, b)
    again = huggingface.to_tensors(*back[:2])
    assert again.keys() == tensors.keys()
    assert all(np.array_equal(again[k], tensors[k]) for k in tensors)


def test_old_names_and_missing_parts(segments, config):
    """gamma/beta, no `bert.` prefix, no MLM head: tensors that are there are taken, the others are named and stay fresh."""
    client, server = params(segments)
    tensors = huggingface.to_tensors(client, server)
    old = {
        k.removeprefix("bert.").replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
        for k, v in tensors.items()
        if not k.startswith("cls.")
    }
    fresh = jax.jit(segments.init)(*jax.random.split(jax.random.key(9)))
    new_client, new_server, missing = huggingface.from_tensors(old, *fresh)
    assert sorted(missing) == sorted(k for k in tensors if k.startswith("cls."))
    for a, b in zip(
        jax.tree.leaves((client["embeddings"], server)), jax.tree.leaves((new_client["embeddings"], new_server)), strict=True
    ):
        assert np.array_equal(a, b)
    assert np.array_equal(new_client["head"]["dense"]["kernel"], fresh[0]["head"]["dense"]["kernel"])


def test_another_size_is_refused_with_both(segments):
    tensors = huggingface.to_tensors(*params(segments))
    tensors["bert.embeddings.word_embeddings.weight"] = np.zeros((99, 16), np.float32)
    with pytest.raises(UserError, match=r"word_embeddings.*\(99, 16\).*\(61, 16\)"):
        huggingface.from_tensors(tensors, *params(segments))


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(model_type="roberta"), r"somewhere is a RoBERTa checkpoint \(model_type 'roberta'\); accepted: BERT"),
        (dict(model_type="electra"), "is an ELECTRA checkpoint"),
        (dict(model_type="my-own"), "is a my-own checkpoint"),
        (dict(model_type=None), "no model_type"),
        (dict(model_type=["bert"]), r"has model_type=\['bert'\]; accepted: 'bert'"),
        (dict(layer_norm_eps=0), "has layer_norm_eps=0; accepted: a number between 0 and 1"),
        (dict(layer_norm_eps="1e-12"), "has layer_norm_eps='1e-12'"),
        (dict(is_decoder=True), "is_decoder=True; accepted: false"),
        (dict(add_cross_attention=True), "add_cross_attention=True; accepted: false"),
        (dict(hidden_act="gelu_new"), "hidden_act='gelu_new'; accepted: 'gelu'"),
        (dict(hidden_act="relu"), "hidden_act='relu'; accepted: 'gelu'"),
        (dict(position_embedding_type="relative_key"), "relative_key"),
        (dict(hidden_size=None), "lacks hidden_size"),
        (dict(hidden_size="768"), "hidden_size='768'; accepted: an integer"),
    ],
)
def test_another_architecture_is_refused(change, words):
    class Tokenizer:
        pad_token_id = 0

    hf = huggingface.hf_config(tiny_config(model=dict(num_layers=2)).model, Tokenizer) | change
    hf = {k: v for k, v in hf.items() if v is not None}
    with pytest.raises(UserError, match=words):
        huggingface.sizes_of(hf, "somewhere")


def test_pickled_and_broken_weights_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(UserError, match="never read"):
        huggingface.load_tensors(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10\x00\x00\x00")
    with pytest.raises(UserError, match=r"model\.safetensors can't be read"):
        huggingface.load_tensors(tmp_path)

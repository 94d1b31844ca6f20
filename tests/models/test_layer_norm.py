"""LayerNorm's epsilon is the config's: in every LayerNorm, in exports, and in imports."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import VOCAB, tiny_config

from fedbert_jax import config as config_lib
from fedbert_jax import experiment
from fedbert_jax.data.masking import MaskedBatch
from fedbert_jax.models import huggingface
from fedbert_jax.models.bert import make_segments
from fedbert_jax.models.layers import ClassifierSegment, ClientSegment, Layer, LayerNorm

EPS = 0.3  # so large that another would show
MODEL = tiny_config(model=dict(num_layers=2, layer_norm_eps=EPS)).model


class Tokenizer:
    pad_token_id = 0


def test_the_formula():
    x = np.random.default_rng(0).normal(2.0, 3.0, (5, 16)).astype(np.float32)
    expected = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + EPS)
    np.testing.assert_allclose(LayerNorm(MODEL, rngs=nnx.Rngs(0))(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "make, count", [(ClientSegment, 2), (lambda *args, **kw: ClassifierSegment(args[0], 3, **kw), 1), (Layer, 2)]
)
def test_every_layer_norm_has_the_configs_epsilon(make, count):
    module = nnx.eval_shape(lambda: make(MODEL, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    norms = [m for _, m in nnx.iter_modules(module) if isinstance(m, nnx.LayerNorm)]
    assert [m.epsilon for m in norms] == [EPS] * count


def test_an_exported_models_epsilon_is_torchs_and_comes_back(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    from safetensors.numpy import save_file

    segments = make_segments(MODEL)
    rng = np.random.default_rng(0)
    shake = lambda x: x + 0.3 * rng.standard_normal(x.shape).astype(np.float32)  # noqa: E731
    client, server = jax.tree.map(shake, jax.jit(segments.init)(*jax.random.split(jax.random.key(0))))
    save_file(huggingface.to_tensors(client, server), tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(huggingface.hf_config(MODEL, Tokenizer)))

    tokens = rng.integers(5, VOCAB, (2, 9))
    batch = MaskedBatch(tokens, None, None, None)
    ours = jax.jit(lambda c, s: segments.predict(c, segments.transform(s, segments.embed(c, batch))))(client, server)
    model = transformers.BertForMaskedLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        np.testing.assert_allclose(ours, model(torch.tensor(tokens)).logits.numpy(), atol=1e-4)
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                assert module.eps == EPS
                module.eps = 1e-12
        assert not np.allclose(ours, model(torch.tensor(tokens)).logits.numpy(), atol=1e-2)

    sizes = dict(max_position_embeddings=16)
    started = config_lib.from_dict(dict(model=sizes | dict(init_from=str(tmp_path)), data=dict(tokenizer="", seq_len=12)))
    assert experiment.resolve(started, VOCAB).model.layer_norm_eps == EPS


def test_a_checkpoint_that_doesnt_say_has_berts():
    hf = huggingface.hf_config(MODEL, Tokenizer)
    assert hf["layer_norm_eps"] == EPS and huggingface.sizes_of(hf, "somewhere")["layer_norm_eps"] == EPS
    del hf["layer_norm_eps"]
    assert huggingface.sizes_of(hf, "somewhere")["layer_norm_eps"] == 1e-12 == config_lib.ModelConfig().layer_norm_eps

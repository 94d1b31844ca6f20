"""The three segments against torch's `BertForMaskedLM` with the same weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import assert_trees_close, tiny_config

from fedbert_jax.config import PRESETS, ModelConfig, resolve_model
from fedbert_jax.data.masking import MaskedBatch
from fedbert_jax.models import huggingface
from fedbert_jax.models.bert import count_parameters, make_segments
from fedbert_jax.models.layers import dropout
from fedbert_jax.models.losses import cross_entropy

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LOOP = dict(num_layers=2, unroll_layers=False)  # layers in one loop, like those of the fixture


def torch_model(config: ModelConfig, seed: int = 0):
    class Tokenizer:
        pad_token_id = 0

    settings = {k: v for k, v in huggingface.hf_config(config, Tokenizer).items() if k not in ("architectures", "dtype")}
    torch.manual_seed(seed)
    model = transformers.BertForMaskedLM(transformers.BertConfig(**settings)).eval()
    with torch.no_grad():  # biases and LayerNorms start as 0 and 1, where a mix-up would not show
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def sequences(tokens, types=None, lengths=None) -> MaskedBatch:
    """A batch in which no positions are asked for."""
    return MaskedBatch(tokens, None, None, None, types, lengths)


def tensors_of(model):
    return {k: v.detach().numpy() for k, v in model.state_dict().items() if "decoder" not in k}


@pytest.fixture(scope="module")
def pair():
    config = tiny_config(model=LOOP).model
    model = torch_model(config)
    segments = make_segments(config)
    client, server = jax.jit(segments.init)(*jax.random.split(jax.random.key(0)))
    client, server, missing = huggingface.from_tensors(tensors_of(model), client, server)
    assert missing == []
    return config, model, segments, client, server


def test_hidden_states_and_logits_equal_torchs_with_padding_and_two_segments(pair):
    config, model, segments, client, server = pair
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, config.vocab_size, (3, 14))
    types = (np.arange(14)[None] >= np.array([[5], [7], [3]])).astype(np.int64)
    lengths = np.array([14, 9, 4])
    mask = (np.arange(14)[None] < lengths[:, None]).astype(np.int64)

    @jax.jit
    def run(client, server):
        h = segments.embed(client, sequences(tokens, types, lengths))
        z = segments.transform(server, h, lengths=lengths)
        return h, z, segments.predict(client, z), segments.transform(server, h, asked, lengths)

    asked = np.array([[0, 3, 9], [0, 1, 8], [3, 2, 0]])
    h, z, logits, z_asked = run(client, server)
    with torch.no_grad():
        out = model(
            torch.tensor(tokens),
            attention_mask=torch.tensor(mask),
            token_type_ids=torch.tensor(types),
            output_hidden_states=True,
        )
    real = mask.astype(bool)
    np.testing.assert_allclose(np.asarray(h)[real], out.hidden_states[0].numpy()[real], atol=1e-5)
    np.testing.assert_allclose(np.asarray(z)[real], out.hidden_states[-1].numpy()[real], atol=1e-5)
    theirs = np.take_along_axis(out.hidden_states[-1].numpy(), asked[..., None], 1)
    np.testing.assert_allclose(z_asked, theirs, atol=1e-5)
    np.testing.assert_allclose(np.asarray(logits)[real], out.logits.numpy()[real], atol=2e-5)


@pytest.mark.parametrize("asked", [True, False])
def test_gradients_equal_torchs(pair, asked):
    """Loss and every gradient of the joined segments, against torch's autograd; the last layer computed in part or whole."""
    config, model, segments, client, server = pair
    rng = np.random.default_rng(1)
    tokens, positions = rng.integers(5, config.vocab_size, (2, 12)), np.array([[1, 4, 7], [2, 3, 11]])
    labels = np.take_along_axis(tokens, positions, 1)

    def loss(client, server):
        h = segments.embed(client, sequences(tokens))
        if asked:
            at = segments.transform(server, h, positions)
        else:
            at = jnp.take_along_axis(segments.transform(server, h), positions[..., None], axis=1)
        return cross_entropy(segments.predict(client, at), labels, jnp.ones((2, 3)))

    value, grads = jax.jit(jax.value_and_grad(loss, (0, 1)))(client, server)
    everywhere = np.full(tokens.shape, -100)
    np.put_along_axis(everywhere, positions, labels, 1)
    model.zero_grad()
    out = model(torch.tensor(tokens), labels=torch.tensor(everywhere))
    out.loss.backward()
    np.testing.assert_allclose(value, out.loss.item(), rtol=1e-6)
    names = dict(model.named_parameters())
    ours = huggingface.to_tensors(*grads)
    assert ours.keys() == names.keys()
    for name, grad in ours.items():
        np.testing.assert_allclose(grad, names[name].grad.numpy(), rtol=1e-4, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("change", [dict(unroll_layers=True), dict(remat="full"), dict(remat="dots")])
def test_scanning_unrolling_and_remat_are_one_function(segments, change):
    _, server = jax.jit(segments.init)(*jax.random.split(jax.random.key(0)))
    other = make_segments(tiny_config(model=LOOP | change).model)
    h, at = jax.random.normal(jax.random.key(1), (2, 12, 16)), jnp.array([[1, 5, 9], [0, 2, 11]])

    def loss(fn):
        return jax.jit(jax.value_and_grad(lambda s: jnp.sum(jnp.sin(fn.transform(s, h, at)))))(server)

    assert_trees_close(loss(other), loss(segments), rtol=1e-5, atol=2e-5)


def test_explicit_attention_equals_the_fused(segments):
    """A vanishing attention dropout takes the explicit path and must give the fused path's numbers."""
    explicit = make_segments(tiny_config(model=LOOP | dict(attention_dropout=1e-7)).model)
    _, server = jax.jit(segments.init)(*jax.random.split(jax.random.key(0)))
    h = jax.random.normal(jax.random.key(1), (2, 12, 16))
    lengths = jnp.array([12, 7])
    keys = jax.random.split(jax.random.key(0), 2)
    one = jax.jit(segments.transform)(server, h, None, lengths)
    other = jax.jit(explicit.transform)(server, h, None, lengths, keys)
    np.testing.assert_allclose(one[0], other[0], atol=1e-5)
    np.testing.assert_allclose(one[1, :7], other[1, :7], atol=1e-5)


def test_dropout_keeps_the_mean_and_its_groups_apart():
    x = jnp.ones((4, 25, 200))
    keys = jax.random.split(jax.random.key(0), 2)
    y = dropout(x, 0.25, keys)
    assert abs(float(y.mean()) - 1) < 0.02
    np.testing.assert_allclose(np.unique(y), [0, 4 / 3], rtol=1e-6)
    assert jnp.array_equal(dropout(x[2:], 0.25, keys[1:]), y[2:])
    zeros = np.asarray(y == 0).reshape(100, 200)
    np.testing.assert_allclose(np.corrcoef(zeros), np.eye(100), atol=0.35)  # no two (row, position) draw alike


def test_dropout_does_not_depend_on_padding():
    """The body's output at real positions is the same however far a batch is padded, with all dropouts."""
    segments = make_segments(tiny_config(model=LOOP | dict(hidden_dropout=0.3, attention_dropout=0.3)).model)
    _, server = jax.jit(segments.init)(*jax.random.split(jax.random.key(0)))
    h = jax.random.normal(jax.random.key(1), (4, 12, 16))
    keys, lengths = jax.random.split(jax.random.key(2), 2), np.array([7, 5, 3, 7])

    def at_real(length: int, positions: jax.Array | None) -> np.ndarray:
        return jax.jit(segments.transform)(server, h[:, :length], positions, lengths, keys)

    for n, asked in enumerate((None, jnp.array([[0], [4], [2], [6]]))):
        short, long = at_real(7, asked), at_real(12, asked)
        for row, length in enumerate(lengths):
            np.testing.assert_allclose(short[row, :length], long[row, : short.shape[1]][:length], atol=1e-5, err_msg=str(n))


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_logits():
    segments = make_segments(tiny_config(model=LOOP).model, jnp.bfloat16)
    client, server = jax.jit(segments.init)(*jax.random.split(jax.random.key(0)))
    assert {x.dtype for x in jax.tree.leaves((client, server))} == {jnp.dtype("float32")}
    h = segments.embed(client, sequences(jnp.zeros((1, 12), jnp.int32)))
    assert h.dtype == jnp.bfloat16
    assert segments.predict(client, h).dtype == jnp.float32


@pytest.mark.parametrize("preset", list(PRESETS))
def test_preset_sizes_are_the_published_ones(preset):
    """Parameter counts with the 30,522-token vocabulary, as `transformers` counts them for the same sizes."""
    config = resolve_model(ModelConfig(preset=preset), 30522)
    shapes = jax.eval_shape(make_segments(config).init, *[jax.eval_shape(lambda: jax.random.key(0))] * 2)
    with torch.device("meta"):
        settings = dict(
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            intermediate_size=config.intermediate_size,
            num_attention_heads=config.num_heads,
        )
        theirs = transformers.BertForMaskedLM(transformers.BertConfig(**settings)).num_parameters()
    assert count_parameters(shapes) == theirs

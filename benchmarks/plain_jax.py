"""A centralised BERT in JAX and optax only, as one writes it without a library, to compare fedbert_jax's own form with.

One jitted step with donated state, called in a loop; [B, T, D] throughout, a scan over stacked layers, logits at the masked
positions. Only the drawing of masks is fedbert_jax's, so that the work is the same.
"""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks import flops
from benchmarks.jax_sides import mask_spec
from benchmarks.pairs import Side, guess_loss
from benchmarks.sizes import WEIGHT_DECAY, Size, random_blocks
from fedbert_jax.data.masking import mask_blocks

Params = dict[str, Any]


def init_params(key: jax.Array, size: Size) -> Params:
    """Draws parameters; those of the layers are stacked [L, ...]."""
    keys = iter(jax.random.split(key, 16))
    d, v, n = size.hidden, size.vocab, size.layers
    normal = lambda *shape: 0.02 * jax.random.normal(next(keys), shape)  # noqa: E731
    norm = lambda *stack: {"scale": jnp.ones((*stack, d)), "bias": jnp.zeros((*stack, d))}  # noqa: E731
    dense = lambda i, o, *stack: {"kernel": normal(*stack, i, o), "bias": jnp.zeros((*stack, o))}  # noqa: E731
    return {
        "word": normal(v, d),
        "position": normal(size.length, d),
        "type": normal(1, d),
        "norm": norm(),
        "layers": {
            "query": dense(d, d, n),
            "key": dense(d, d, n),
            "value": dense(d, d, n),
            "out": dense(d, d, n),
            "norm1": norm(n),
            "up": dense(d, 4 * d, n),
            "down": dense(4 * d, d, n),
            "norm2": norm(n),
        },
        "head": {"dense": dense(d, d), "norm": norm(), "bias": jnp.zeros(v)},
    }


def layer_norm(p: Params, x: jax.Array) -> jax.Array:
    """Normalises x [..., D] in float32."""
    y = x.astype(jnp.float32)
    y = (y - y.mean(-1, keepdims=True)) * jax.lax.rsqrt(y.var(-1, keepdims=True) + 1e-12)
    return (y * p["scale"] + p["bias"]).astype(x.dtype)


def linear(p: Params, x: jax.Array) -> jax.Array:
    """Applies a dense layer in x's dtype."""
    return x @ p["kernel"].astype(x.dtype) + p["bias"].astype(x.dtype)


def loss_fn(params: Params, batch: Any, size: Size) -> jax.Array:
    """Returns the mean loss over the masked positions of a batch [B, T]."""
    x = params["word"][batch.tokens] + params["position"] + params["type"]
    x = layer_norm(params["norm"], x).astype(size.dtype)

    def layer(x: jax.Array, p: Params) -> tuple[jax.Array, None]:
        heads = lambda y: y.reshape(*y.shape[:2], size.heads, -1)  # noqa: E731
        q, k, v = (heads(linear(p[name], x)) for name in ("query", "key", "value"))
        attended = jax.nn.dot_product_attention(q, k, v).reshape(x.shape)
        x = layer_norm(p["norm1"], x + linear(p["out"], attended))
        wide = jax.nn.gelu(linear(p["up"], x), approximate=False)
        return layer_norm(p["norm2"], x + linear(p["down"], wide)), None

    x, _ = jax.lax.scan(layer, x, params["layers"])
    z = jnp.take_along_axis(x, batch.positions[..., None], axis=1)  # [B, M, D]
    z = layer_norm(params["head"]["norm"], jax.nn.gelu(linear(params["head"]["dense"], z), approximate=False))
    logits = (z @ params["word"].T.astype(z.dtype)).astype(jnp.float32) + params["head"]["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()


def plain_side(size: Size, steps: int) -> Side:
    """Makes a side from the plain step, `steps` of them per call."""
    decays = lambda params: jax.tree_util.tree_map_with_path(  # noqa: E731
        lambda path, _: path[-1].key not in ("bias", "scale"), params
    )
    tx = optax.adamw(size.learning_rate, weight_decay=WEIGHT_DECAY, mask=decays)
    spec = mask_spec(size)

    def init() -> Any:
        params = init_params(jax.random.key(0), size)
        return params, tx.init(params), jax.random.key(1)

    def step(state: Any, blocks: jax.Array) -> Any:
        params, opt_state, key = state
        key, mask_key = jax.random.split(key)
        loss, grads = jax.value_and_grad(loss_fn)(params, mask_blocks(mask_key, blocks, spec), size)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state, key), loss

    blocks = [jnp.asarray(b.reshape(size.rows, size.length)) for b in random_blocks(size, steps)]
    state = jax.jit(init)()
    start = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=0).lower(state, blocks[0]).compile()
    compile_seconds = time.perf_counter() - start
    initial = float(jax.jit(lambda s, b: loss_fn(s[0], mask_blocks(s[2], b, spec), size))(state, blocks[0]))

    def run() -> float:
        nonlocal state
        losses = []
        with jax.transfer_guard("disallow"):
            for b in blocks:
                state, loss = compiled(state, b)
                losses.append(loss)
            jax.block_until_ready((state, losses))
        return float(sum(jax.device_get(losses)) / len(losses))

    return Side(
        "plain JAX",
        size.tokens * steps,
        run,
        guess_loss(size.vocab, size.hidden),
        initial,
        compile_seconds,
        flops=flops.per_token(size),
    )

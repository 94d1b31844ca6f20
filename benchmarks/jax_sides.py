"""fedbert_jax's sides: a strategy's real round, compiled as the simulation compiles it."""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import flops
from benchmarks.pairs import Side, guess_loss
from benchmarks.sizes import CLS, MASK, MASK_PROB, PAD, SEP, UNK, WEIGHT_DECAY, Size, random_blocks
from fedbert_jax import config as config_lib
from fedbert_jax.data.masking import MaskSpec, mask_blocks, num_masked
from fedbert_jax.devices.tuning import resolve_attention
from fedbert_jax.federated import setting as setting_lib
from fedbert_jax.federated.joined import joined_loss
from fedbert_jax.federated.rounds import make_strategy
from fedbert_jax.federated.setting import Setting
from fedbert_jax.federated.state import Cohort, Pair, State, pick
from fedbert_jax.models.bert import make_segments

# The settings of sides that are not named after a strategy.
NAMED = {
    "merged": dict(strategy="parallel", body="merged"),
    "parallel-gradients": dict(strategy="parallel", average="gradients"),
}


class Started(NamedTuple):
    """A compiled round and its first inputs."""

    compiled: Any  # (state, cohort) -> (state, metrics); its state is donated
    state: State
    cohort: Cohort
    compile_seconds: float  # tracing, lowering and compiling


def start_round(size: Size, strategy: str, local_steps: int, chunks: int = 1) -> Started:
    """Compiles a strategy's round of `local_steps` steps: masking, both optimizers and averaging, with donated state.

    `centralized` trains on the same C * B sequences per step as one batch. `merged` is `parallel` with one body per client,
    and `parallel-gradients` averages the clients' gradients in each step. With `chunks`, a client's logits are computed in
    that many parts, one at a time.
    """
    chosen = make_strategy(make_setting(size, strategy, local_steps, chunks))
    tokens = random_blocks(size, local_steps)
    if strategy == "centralized":
        tokens = tokens.reshape(local_steps, 1, size.rows, size.length)
    clients = tokens.shape[1]
    cohort = Cohort(
        jnp.asarray(tokens), jnp.arange(clients, dtype=jnp.int32), jnp.full(clients, 1 / clients, jnp.float32), jnp.int32(0)
    )
    state = jax.jit(chosen.init)(fresh_model(size))
    start = time.perf_counter()
    compiled = jax.jit(chosen.round, donate_argnums=0).lower(state, cohort).compile()
    return Started(compiled, state, cohort, time.perf_counter() - start)


def round_side(size: Size, strategy: str, local_steps: int, chunks: int = 1) -> Side:
    """Makes a side from `start_round`."""
    compiled, state, cohort, compile_seconds = start_round(size, strategy, local_steps, chunks)
    initial = float(_loss_of(size)(fresh_model(size), cohort.rows[0].reshape(size.rows, size.length)))
    rounds = 0

    def run() -> float:
        nonlocal state, rounds
        now = cohort._replace(round=jax.device_put(np.int32(rounds)))
        with jax.transfer_guard("disallow"):  # a round never leaves the device
            state, metrics = compiled(state, now)
            jax.block_until_ready((state, metrics))
        rounds += 1
        return float(jax.device_get(metrics.loss))

    title = strategy.replace("-gradients", ", gradients averaged")
    return Side(
        f"fedbert_jax {title}, {local_steps} local step{'s' * (local_steps > 1)}" + ", logits in chunks" * (chunks > 1),
        size.tokens * local_steps,
        run,
        guess_loss(size.vocab, size.hidden),
        initial,
        compile_seconds,
        flops=flops.per_token(size, last_layer_pruned=True),
    )


def make_setting(size: Size, strategy: str, local_steps: int, chunks: int = 1) -> Setting:
    """Builds the setting of a strategy, with AdamW at a constant rate and no clipping in both segments."""
    adamw = dict(
        name="adamw",
        learning_rate=size.learning_rate,
        schedule="constant",
        warmup_steps=0,
        clip_norm=None,
        weight_decay=WEIGHT_DECAY,
    )
    named = NAMED.get(strategy, dict(strategy=strategy))
    pooled = strategy in ("centralized", "parallel-gradients")  # whose rows go through the head as one client's
    positions = (size.rows if pooled else size.batch) * size.masked
    config = config_lib.from_dict(
        dict(
            model=dict(
                hidden_size=size.hidden,
                num_layers=size.layers,
                num_heads=size.heads,
                unroll_layers=size.unroll,
                logits_at_once=-(-positions // chunks) if chunks > 1 else None,
            ),
            data=dict(seq_len=size.length),
            federated=dict(num_clients=size.clients, local_steps=local_steps, batch_size=size.batch, **named),
            client_optimizer=adamw,
            server_optimizer=adamw,
            mlm=dict(mask_prob=MASK_PROB),
            precision=dict(compute_dtype=size.dtype),
        )
    )
    config = dataclasses.replace(config, model=config_lib.resolve_model(config.model, size.vocab))
    config = resolve_attention(config)  # on a GPU, cuDNN's
    prepare = functools.partial(mask_blocks, spec=mask_spec(size))
    segments = make_segments(config.model, jnp.dtype(size.dtype))
    return setting_lib.make_setting(config, segments, prepare, size.clients, size.clients, span=(1, 0))


def mask_spec(size: Size) -> MaskSpec:
    """Returns what masking needs to know: M positions, of any tokens except the special ones."""
    return MaskSpec(num_masked(MASK_PROB, size.length), size.vocab, MASK, (PAD, UNK, CLS, SEP, MASK), None)


def fresh_model(size: Size) -> Pair:
    """Returns the untrained model that every strategy starts from."""
    return _init_of(size)()


# One program for all strategies of a size.


@functools.cache
def _init_of(size: Size) -> Any:
    return jax.jit(make_setting(size, "centralized", 1).fresh)


@functools.cache
def _loss_of(size: Size) -> Any:
    setting = make_setting(size, "centralized", 1)

    def loss(model: Pair, blocks: jax.Array) -> jax.Array:
        batch, _ = setting.draw(blocks[None], jnp.int32(0), jnp.int32(0), jnp.zeros(1, jnp.int32))
        return joined_loss(setting.segments, model.client, model.server, pick(batch, 0))

    return jax.jit(loss)

"""Bytes that cross per client and step, by what is averaged and in which codec, computed from shapes without a run.

python -m benchmarks.traffic
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from fedbert_jax import config as config_lib
from fedbert_jax.data.masking import MaskSpec, mask_blocks, num_masked
from fedbert_jax.federated.setting import make_setting
from fedbert_jax.federated.traffic import round_traffic
from fedbert_jax.models.bert import make_segments

CLIENTS, STEPS = 8, 8
MODELS = {  # preset, vocabulary, sequences per step and client, tokens
    "tiny, 4 x 128 tokens": ("tiny", 4096, 4, 128),
    "base, 8 x 128 tokens": ("base", 30522, 8, 128),
    "base, 32 x 128 tokens": ("base", 30522, 32, 128),
    "base, 32 x 512 tokens": ("base", 30522, 32, 512),
}
WAYS = {  # what is averaged -> settings
    f"parameters every {STEPS} steps, with moments": {},
    f"parameters every {STEPS} steps, without": {"federated.client_optimizer_state": "reset"},
    "gradients, float32": {"federated.average": "gradients"},
    "gradients, bfloat16": {"federated.average": "gradients", "wire.gradient_codec": "bfloat16"},
    "gradients, int8 up": {"federated.average": "gradients", "wire.gradient_codec": "int8"},
}
CODECS = ("float32", "bfloat16", "int8")
STEP = ("activations", "positions", "lengths", "hidden_states", "head_gradient", "input_gradient")


def bytes_of(preset: str, vocabulary: int, rows: int, tokens: int, settings: dict[str, str]) -> tuple[float, float]:
    """Returns megabytes per step and client, in both directions: of the step's own messages, and of averaging."""
    base = config_lib.from_dict(
        dict(
            model=dict(preset=preset),
            data=dict(seq_len=tokens),
            federated=dict(num_clients=CLIENTS, local_steps=STEPS, batch_size=rows),
        )
    )
    config = config_lib.replace(base, settings)
    config = dataclasses.replace(config, model=config_lib.resolve_model(config.model, vocabulary))
    spec = MaskSpec(num_masked(config.mlm.mask_prob, tokens), vocabulary, 4, (0, 1, 2, 3, 4), None)
    prepare = functools.partial(mask_blocks, spec=spec)
    setting = make_setting(config, make_segments(config.model), prepare, CLIENTS, CLIENTS, span=(1, 0))
    sizes = round_traffic(setting, jax.ShapeDtypeStruct((rows, tokens), jnp.int32))
    each = lambda names: sum(sizes.get(name, 0) for name in names) / (CLIENTS * STEPS * 1e6)  # noqa: E731
    return each(STEP), each(sizes.keys() - set(STEP))


def kilobytes_a_token(name: str, codec: str, downlink: str) -> float:
    """Returns what a step's four messages take for each token of a model's batch, both ways."""
    preset, vocabulary, rows, tokens = MODELS[name]
    return (
        1e3
        * bytes_of(preset, vocabulary, rows, tokens, {"wire.codec": codec, "wire.downlink": downlink})[0]
        / (rows * tokens)
    )


def main() -> None:
    print("Megabytes a step and client, both ways.\n")
    print("| | " + " | ".join(MODELS) + " |\n| --- |" + " ---: |" * len(MODELS))
    step = [bytes_of(*model, {})[0] for model in MODELS.values()]
    print("| the step's four messages | " + " | ".join(f"{n:.2f}" for n in step) + " |")
    for way, settings in WAYS.items():
        cells = [bytes_of(*model, settings)[1] for model in MODELS.values()]
        print(f"| averaging {way} | " + " | ".join(f"{n:.2f}" for n in cells) + " |")
    print("\nKilobytes a token, both ways, of the step's four messages.\n")
    print("| wire.codec, wire.downlink | " + " | ".join(MODELS) + " |\n| --- |" + " ---: |" * len(MODELS))
    for codec in CODECS:
        for downlink in ("all", "masked"):
            cells = [kilobytes_a_token(name, codec, downlink) for name in MODELS]
            print(f"| {codec}, {downlink} | " + " | ".join(f"{n:.3f}" for n in cells) + " |")


if __name__ == "__main__":
    main()

"""What a measured party is made of: its setting, payloads without a meaning, and the frames that hold them."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

# JAX and the package are imported when the process has been given its cores.

ROUNDS = 1 << 20  # of a federation that ends when its parent does


class Built(NamedTuple):
    """What both kinds of party are made of."""

    config: Any
    setting: Any
    rows: Any  # shapes of what a client trains on in one step
    shapes: Any  # of what crosses
    mask: Any
    names: tuple[str, ...]


def settings_of(model: dict[str, Any], clients: int, steps: int, settings: dict[str, Any]) -> Any:
    """Returns the resolved config of a federation.

    Args:
      model: preset, vocabulary, rows (B), tokens (T), and what differs from the preset.
      clients, steps: C and K.
      settings: other keys.
    """
    from fedbert_jax import config as config_lib

    base = config_lib.from_dict(
        dict(
            model=dict(preset=model["preset"], **model.get("changes", {})),
            data=dict(seq_len=model["tokens"]),
            federated=dict(
                strategy="parallel", client_optimizer_state="reset", num_clients=clients, local_steps=steps,
                batch_size=model["rows"], rounds=ROUNDS,
            ),
        )
    )  # fmt: skip
    config = config_lib.replace(base, settings)
    return dataclasses.replace(config, model=config_lib.resolve_model(config.model, model["vocabulary"]))


def built(spec: dict[str, Any]) -> Built:
    """Builds a party's setting from its parent's description."""
    import jax

    from fedbert_jax import experiment
    from fedbert_jax.data.masking import MaskSpec, num_masked
    from fedbert_jax.runtime.shapes import shapes_of

    model, clients = spec["model"], spec["clients"]
    config = settings_of(model, clients, spec["steps"], spec["settings"])
    mask = MaskSpec(num_masked(config.mlm.mask_prob, model["tokens"]), model["vocabulary"], 4, (0, 1, 2, 3, 4), None)
    setting = experiment.party_setting(config, mask, clients, clients)
    rows = jax.ShapeDtypeStruct((model["rows"], model["tokens"]), np.uint16)
    names = tuple(f"client{n}" for n in range(clients))
    return Built(config, setting, rows, shapes_of(setting, rows, spec["parts"]), mask, names)


def invented(like: Any, length: int) -> Any:
    """Returns numbers of the kind that a payload has, in the shapes given."""
    import jax

    rng = np.random.default_rng(0)

    def draw(x: Any) -> np.ndarray:
        if x.dtype == np.uint16:  # positions
            return np.sort(rng.integers(1, length - 1, x.shape), axis=-1).astype(np.uint16)
        if x.dtype == np.int8:
            return rng.integers(-127, 128, x.shape, np.int8)
        return np.asarray(0.01 * rng.standard_normal(x.shape)).astype(x.dtype)

    return jax.tree.map(draw, like)


def frames_of(b: Built) -> dict[str, tuple[bytes, bytes]]:
    """Returns the two pairs of frames that a microbatch sends and is answered with, by a method that `Echo` takes for it."""
    from fedbert_jax.runtime import frames
    from fedbert_jax.runtime.payloads import to_tensors

    frame = lambda name, like, **more: frames.encode({}, to_tensors(name, invented(like, 2**15)) | more)  # noqa: E731
    return {
        "message": (frame("", b.shapes.up), frame("hidden_states", b.shapes.hidden)),
        "transform": (
            frame("head_gradient", b.shapes.gradient, loss=np.zeros((), np.float32)),
            frame("input_gradient", b.shapes.up.activations),
        ),
    }

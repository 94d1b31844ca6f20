"""`python -m benchmarks.ceiling`: the device's matmul ceiling, of which a training step's FLOP/s are a share.

It is the speed of the best of many large square matrix products, in JAX and in torch; the better of the two counts.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any


def measure(dtype: str, device: str, n: int, seconds: float = 2.0) -> dict[str, Any]:
    """Returns the FLOP/s of each library, the name of the better one, and the name of the device.

    Args:
      dtype: `float32` or `bfloat16`.
      device: `cpu` or `gpu`; without a GPU, `gpu` means the CPU.
      n: rows and columns of the matrices.
      seconds: how long each library tries.
    """
    best = {"jax": _best(*_jax_product(dtype, n), seconds), "torch": _best(*_torch_product(dtype, device, n), seconds)}
    import jax

    library = max(best, key=lambda name: best[name])
    return {
        "flops": best[library],
        "library": library,
        "by_library": best,
        "n": n,
        "dtype": dtype,
        "device": jax.devices()[0].device_kind,
        "platform": jax.devices()[0].platform,
    }


def _best(product: Callable[[], None], flops: float, seconds: float) -> float:
    product()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        product()
        best = min(best, time.perf_counter() - start)
    return flops / best


def _jax_product(dtype: str, n: int) -> tuple[Callable[[], None], float]:
    import jax
    import jax.numpy as jnp

    times = 1 if jax.default_backend() == "cpu" else 20  # products are too short to be launched one by one
    a, b = (0.01 * jax.random.normal(jax.random.key(k), (n, n), jnp.float32).astype(dtype) for k in (0, 1))
    compiled = jax.jit(lambda a, b: jax.lax.fori_loop(0, times, lambda _, x: x @ b, a)).lower(a, b).compile()
    return lambda: jax.block_until_ready(compiled(a, b)), 2.0 * n**3 * times


def _torch_product(dtype: str, device: str, n: int) -> tuple[Callable[[], None], float]:
    import torch

    cuda = device == "gpu" and torch.cuda.is_available()
    times = 20 if cuda else 1
    a, b = (0.01 * torch.randn(n, n).to("cuda" if cuda else "cpu", getattr(torch, dtype)) for _ in range(2))

    def product() -> None:
        x = a
        for _ in range(times):
            x = x @ b
        if cuda:
            torch.cuda.synchronize()

    return product, 2.0 * n**3 * times


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ceiling", description=__doc__)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--n", type=int, default=2048, help="rows and columns (default: 2048)")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long each library tries (default: 2)")
    args = parser.parse_args()
    print(json.dumps(measure(args.dtype, args.device, args.n, args.seconds)))


if __name__ == "__main__":
    main()

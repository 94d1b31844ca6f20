"""Builds a side by the name that a suite's rows give it."""

from __future__ import annotations

import shutil

from benchmarks.pairs import Side
from benchmarks.sizes import Size

STRATEGIES = ("centralized", "parallel", "sequential", "merged")
WAYS = ("", "-1", "-chunks")  # after a strategy: rounds of one local step; logits at a quarter of the positions at a time
JAX = (*(name + way for name in STRATEGIES for way in WAYS), "parallel-gradients", "plain")
TORCH = (
    "hf",
    "hf-loop",
    "hf-compiled",
    "gather",
    "gather-compiled",
    "split",
    "v1",
    "v1-gather",
    "v2",
    "v2-gather",
    "relay-gather",
)


def make_side(name: str, size: Size) -> Side:
    """Builds a side: compiles it, and for torch runs it once."""
    if name == "plain":
        from benchmarks.plain_jax import plain_side

        return plain_side(size, size.steps)
    if name in JAX:
        from benchmarks.jax_sides import round_side

        strategy, _, way = (name, "", "") if name == "parallel-gradients" else name.partition("-")
        return round_side(size, strategy, 1 if way == "1" else size.steps, chunks=4 if way == "chunks" else 1)
    if name not in TORCH:
        raise ValueError(f"side {name!r}: accepted: {', '.join((*JAX, *TORCH))}.")
    from benchmarks import torch_sides
    from benchmarks.torch_splitfed import splitfed_side

    kind, _, how = name.partition("-")
    if kind == "hf":
        return torch_sides.hf_side(size, size.hf_steps, size.batch if how == "loop" else size.rows, how == "compiled")
    if kind == "gather":
        return torch_sides.gather_side(size, size.steps, how == "compiled")
    if kind == "split":
        return torch_sides.split_side(size, size.steps)
    return splitfed_side(size, size.steps, kind, everywhere=how != "gather")


def load(family: str) -> None:
    """Imports everything that sides of a family (`jax` or `torch`) are built from, which a process holds before its side."""
    if family == "jax":
        import jax

        import benchmarks.plain_jax

        jax.devices()
    else:
        import benchmarks.torch_splitfed  # noqa: F401


def missing(name: str, size: Size) -> str:
    """Returns what this machine lacks for a side; "" if nothing."""
    needs_compiler = name.endswith("-compiled") and size.device == "cpu" and size.compiler == "inductor"
    if needs_compiler and not (shutil.which("g++") or shutil.which("clang++")):
        return "torch.compile needs a C++ compiler (g++ or clang++)"
    return ""

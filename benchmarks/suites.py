"""The suites: which sides are compared at which size, and the targets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from benchmarks.pairs import Row
from benchmarks.sizes import SIZES, Size


@dataclass(frozen=True)
class Suite:
    """The rows measured on one kind of device."""

    name: str
    rows: tuple[Row, ...]
    dtype: str
    processes: str  # where the sides of a pair live, by default: see `measure.Bench`

    def sizes(self, fast: bool) -> dict[str, Size]:
        """Returns the sizes of `rows_at`'s rows."""
        if fast:
            return {"fast": dataclasses.replace(SIZES["fast"], dtype=self.dtype, device=self.name)}
        return {row.size: SIZES[row.size] for row in self.rows}

    def rows_at(self, fast: bool) -> tuple[Row, ...]:
        """Returns the rows; if `fast`, each once and at the size for debugging the program."""
        if not fast:
            return self.rows
        once: dict[str, Row] = {}
        for row in self.rows:
            once.setdefault(row.name, dataclasses.replace(row, size="fast"))
        return tuple(once.values())


# Compiling comes first, since it keeps no side. Rows that share a side stand together, so that each side is freed early.
CPU = Suite(
    "cpu",
    dtype="float32",
    processes="one",
    rows=(
        Row("centralized: compiling the round", "centralized", target=20.0, size="base", kind="seconds"),
        Row("parallel: compiling the round", "parallel", target=20.0, size="base", kind="seconds"),
        Row("centralized/torch gather", "centralized", "gather", 0.95, "small"),
        Row("centralized/torch gather, compiled", "centralized", "gather-compiled", None, "small"),
        Row("centralized/plain JAX", "centralized", "plain", None, "small"),
        Row("centralized/HF", "centralized", "hf", 2.8, "small"),
        Row("centralized/HF, compiled", "centralized", "hf-compiled", None, "small"),
        Row("centralized/HF, loop over clients", "centralized", "hf-loop", None, "small"),
        Row("parallel/centralized", "parallel", "centralized", 0.93, "small"),
        Row("parallel/centralized, averaging every step", "parallel-1", "centralized-1", 0.85, "small"),
        Row("parallel, gradients averaged/centralized", "parallel-gradients", "centralized", 0.97, "small"),
        Row("parallel, gradients averaged/parallel", "parallel-gradients", "parallel", None, "small"),
        Row("parallel, logits in chunks/parallel", "parallel-chunks", "parallel", None, "small"),
        Row("parallel/HF", "parallel", "hf", 1.8, "small"),
        Row("parallel/HF, loop over clients", "parallel", "hf-loop", 1.8, "small"),
        Row("parallel/torch split", "parallel", "split", 1.0, "small"),
        Row("parallel/torch V2, gather", "parallel", "v2-gather", 1.5, "small"),
        Row("parallel/torch V2", "parallel", "v2", 2.5, "small"),
        Row("parallel, gradients averaged/torch V2, gather", "parallel-gradients", "v2-gather", 1.5, "small"),
        Row("parallel, gradients averaged/torch V2", "parallel-gradients", "v2", 2.5, "small"),
        Row("parallel/torch V1, gather", "parallel", "v1-gather", None, "small"),
        Row("parallel/torch V1", "parallel", "v1", None, "small"),
        Row("merged/torch V1, gather", "merged", "v1-gather", None, "small"),
        Row("sequential/torch V2, handed on, gather", "sequential", "relay-gather", None, "small"),
        Row("centralized/torch gather", "centralized", "gather", None, "base"),
        Row("centralized/HF", "centralized", "hf", None, "base"),
        Row("parallel/centralized", "parallel", "centralized", None, "base"),
        Row("parallel, gradients averaged/centralized", "parallel-gradients", "centralized", None, "base"),
        Row("parallel, gradients averaged/torch V2, gather", "parallel-gradients", "v2-gather", None, "base"),
        Row("parallel/torch V2, gather", "parallel", "v2-gather", None, "base"),
    ),
)


def _gpu_rows(size: str) -> tuple[Row, ...]:
    return (
        Row("centralized: share of the matmul ceiling", "centralized", target=0.5, size=size, kind="share"),
        Row("centralized/HF, compiled", "centralized", "hf-compiled", 1.3, size),
        Row("centralized/HF", "centralized", "hf", None, size),
        Row("centralized/torch gather, compiled", "centralized", "gather-compiled", None, size),
        Row("centralized/plain JAX", "centralized", "plain", None, size),
        Row("parallel, gradients averaged/centralized", "parallel-gradients", "centralized", None, size),
        Row("parallel, gradients averaged/torch V2, gather", "parallel-gradients", "v2-gather", None, size),
        Row("parallel, gradients averaged/torch V2", "parallel-gradients", "v2", None, size),
        Row("parallel/torch V2", "parallel", "v2", 10.0, size),
        Row("parallel/torch V2, gather", "parallel", "v2-gather", 10.0, size),
        Row("parallel/centralized", "parallel", "centralized", 0.97, size),
    )


# Rows that need sixteen bodies, or that cost the same at every size, are measured at one size.
GPU = Suite(
    "gpu",
    dtype="bfloat16",
    processes="two",
    rows=(
        *_gpu_rows("base-128"),
        Row("parallel/torch split", "parallel", "split", None, "base-128"),
        Row("parallel/torch V1, gather", "parallel", "v1-gather", None, "base-128"),
        Row("merged/torch V1, gather", "merged", "v1-gather", None, "base-128"),
        Row("sequential/torch V2, handed on, gather", "sequential", "relay-gather", None, "base-128"),
        Row("parallel/centralized, averaging every step", "parallel-1", "centralized-1", None, "base-128"),
        Row("parallel, logits in chunks/parallel", "parallel-chunks", "parallel", None, "base-128"),
        *_gpu_rows("base-512"),
        *_gpu_rows("large-512"),
    ),
)

SUITES = {suite.name: suite for suite in (CPU, GPU)}

"""Whether bytes hold token ids, labels or text: a search for each of them as it would lie in memory."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

TYPES = tuple(np.dtype(f"{order}{kind}") for kind in ("u1", "u2", "i4", "i8") for order in "<>")


def windows(rows: np.ndarray, length: int, stride: int = 1) -> np.ndarray:
    """Returns all runs of `length` consecutive numbers in rows [..., N], each once; or every `stride`-th of them."""
    rows = np.asarray(rows).reshape(-1, np.shape(rows)[-1])
    runs = np.lib.stride_tricks.sliding_window_view(rows, length, axis=1)[:, ::stride].reshape(-1, length)
    return np.unique(runs, axis=0)


def runs_in(blobs: Iterable[bytes], runs: np.ndarray) -> list[str]:
    """Says which runs of numbers lie in bytes, in any integer type, of either byte order."""
    blob = b"\n".join(blobs)
    found = []
    for dtype in TYPES:
        patterns = {run.astype(dtype).tobytes() for run in runs if run.max() <= np.iinfo(dtype).max}
        found += [f"{dtype.name}: {pattern.hex()}" for pattern in patterns if pattern in blob]
    return found


def text_in(blobs: Iterable[bytes], texts: Iterable[str], length: int = 16) -> list[str]:
    """Says which stretches of `length` characters of texts lie in bytes, as UTF-8 or UTF-16, in either case."""
    blob = b"\n".join(blobs).lower()
    stretches = {text[n : n + length].lower() for text in texts for n in range(0, len(text) - length + 1, length // 2)}
    return [part for part in stretches if any(part.encode(code) in blob for code in ("utf-8", "utf-16-le"))]

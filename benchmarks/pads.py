"""What one-time pads cost a client: time to put one on a segment's numbers, and to take those of eight off a sum.

python -m benchmarks.pads
"""

from __future__ import annotations

import secrets
import statistics
import time

import numpy as np

from fedbert_jax.privacy.pads import NONCE, Pads

CLIENTS, TIMES = 8, 7
SIZES = {"the demo's segment": 611_200, "BERT-base's segment": 24_459_834}


def measured(numbers: int) -> tuple[float, float]:
    """Returns milliseconds to hide a message of int32 numbers, and to take eight pads off a sum; medians of seven."""
    pads, x = Pads(secrets.randbits(256), "a run"), {"x": np.zeros(numbers, np.int32)}
    hide, show = [], []
    for round in range(TIMES + 1):
        start = time.perf_counter()
        hidden = pads.hide(x, (0, round, 0), 0)
        middle = time.perf_counter()
        nonces = np.frombuffer(secrets.token_bytes(CLIENTS * NONCE), np.uint8).reshape(CLIENTS, NONCE)
        pads.show({"x": hidden["x"]}, (0, round, 0), range(CLIENTS), nonces)
        hide.append(middle - start)
        show.append(time.perf_counter() - middle)
    return statistics.median(hide[1:]) * 1e3, statistics.median(show[1:]) * 1e3


def main() -> None:
    for name, numbers in SIZES.items():
        hide, show = measured(numbers)
        print(f"{name}, {numbers:,} numbers: {hide:.1f} ms to hide, {show:.0f} ms to take {CLIENTS} pads off a sum")


if __name__ == "__main__":
    main()

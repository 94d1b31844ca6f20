"""The server's arithmetic answers before it is done with what no answer needs."""

from __future__ import annotations

from typing import Any

import numpy as np
from federation import Federation
from tiny import tiny_config


class Norm:
    """A norm that is still being computed: whoever reads it waits."""

    def __init__(self, value: Any, read: Any):
        self.value, self.read = value, read

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        self.read()
        return np.asarray(self.value, dtype)

    def __float__(self) -> float:
        self.read()
        return float(self.value)


def test_nobody_waits_for_an_update_before_the_round_is_over():
    federation = Federation(tiny_config(federated=dict(rounds=1)))
    engine, over, early = federation.engine, [False], []
    update, finish, begin = engine.programs.update, engine.finish_round, engine.begin

    def updates(*args: Any) -> Any:
        body, opt, norm = update(*args)
        return body, opt, Norm(norm, lambda: early.append(not over[0]))

    def finishes() -> None:
        over[0] = True
        finish()

    def begins(*args: Any) -> None:
        over[0] = False
        begin(*args)

    engine.programs.update, engine.finish_round, engine.begin = updates, finishes, begins
    federation.run()
    assert early and not any(early)
    assert all(numbers["grad_norm_server"] > 0 for _, numbers in federation.rounds)

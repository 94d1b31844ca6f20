"""Run by test_sharding.py in a process with eight devices: strategies over (data, model) meshes against one device."""

from __future__ import annotations

import jax
import numpy as np
from tiny import make_simulation, tiny_config

assert jax.device_count() == 8, jax.devices()

CASES = [
    ("parallel", "pooled", 2),
    ("parallel", "merged", 2),
    ("sequential", "pooled", 2),
    ("local", "pooled", 2),
    ("fedavg", "pooled", 2),
]
MESHES = [(4, 2), (8, 1)]  # the second for the first case only


def end_of_run(strategy: str, body: str, local_steps: int, data: int, model: int):
    config = tiny_config(
        federated=dict(
            strategy=strategy, body=body, local_steps=local_steps, num_clients=5, batch_size=8, rounds=2
        ),
        mesh=dict(data=data, model=model),
        model=dict(hidden_dropout=0.1, num_heads=4, vocab_size=64),
        eval=dict(batch_size=4),
    )
    simulation = make_simulation(config, clients=5)
    state = simulation.init_state()
    for n in range(2):
        state, metrics = simulation.run_round(state, n)
    scores = simulation.evaluate(state)
    simulation.close()
    return simulation, state, jax.device_get((state, metrics)), scores


def main() -> None:
    for case in CASES:
        _, _, expected, scores = end_of_run(*case, 1, 1)
        for mesh in MESHES if case == CASES[0] else MESHES[:1]:
            simulation, state, actual, same = end_of_run(*case, *mesh)
            for (path, a), b in zip(
                jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
            ):
                np.testing.assert_allclose(
                    a, b, rtol=1e-5, atol=2e-6, err_msg=f"{case} on {mesh}: {jax.tree_util.keystr(path)}"
                )
            np.testing.assert_allclose(same.loss, scores.loss, rtol=1e-5)
            kernel = state.model.server["layers"]["attention"]["qkv"]["kernel"]
            assert len(kernel.sharding.device_set) == 8
            parts = {shard.index[-1].indices(16) for shard in kernel.addressable_shards}
            assert len(parts) == mesh[1], (case, mesh, parts)  # the heads really lie apart
            if case[:2] == ("parallel", "pooled"):
                assert (simulation.cohort + simulation.padding) % mesh[0] == 0
            assert simulation.compiled() == 1, "the round was compiled again"
        print("equal:", *case, flush=True)


if __name__ == "__main__":
    main()

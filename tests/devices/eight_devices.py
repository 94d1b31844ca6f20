"""Run by test_mesh.py in a process with eight devices: compares strategies on (data, model) meshes with one device."""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from collectives import count_collectives
from tiny import VOCAB, make_simulation, tiny_config

from fedbert_jax.glue.examples import TaskData
from fedbert_jax.glue.sequences import Sequences
from fedbert_jax.glue.simulation import Finetuning
from fedbert_jax.glue.tasks import TASKS
from fedbert_jax.workdir.checkpoint import Checkpoints

assert jax.device_count() == 8, jax.devices()
gc.set_threshold(50_000)  # as in conftest.py


class Case(NamedTuple):
    """A strategy, and what else is set: a key of `SETTINGS`."""

    strategy: str = "parallel"
    body: str = "pooled"
    average: str = "parameters"
    local_steps: int = 1
    also: str = ""


SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "": {},
    "adam": dict(aggregator=dict(name="adam", learning_rate=0.01)),
    "noise": dict(
        federated=dict(num_clients=100, weighting="uniform", client_optimizer_state="reset"),
        privacy=dict(dp="client", dp_clip=0.05, dp_noise=0.5),
    ),
    "chunks": dict(model=dict(logits_at_once=8)),  # with rows on all devices
    "slices": dict(federated=dict(clients_at_once=4)),  # on devices: two slices give what one gives
    "keep": dict(federated=dict(client_optimizer_state="keep")),
    "blinded": dict(privacy=dict(averaging="blinded")),
    "blinded, reset": dict(federated=dict(client_optimizer_state="reset"), privacy=dict(averaging="blinded")),
    "int8": dict(wire=dict(gradient_codec="int8")),
}
CASES = [
    Case(local_steps=3, also="adam"),  # a first step and a loop, which XLA keeps if it has several iterations
    Case(average="gradients", local_steps=2),
    Case(body="merged", also="noise"),
    Case("sequential", also="chunks"),
    Case("local"),
    Case("fedavg", also="slices"),
    Case("centralized"),
    Case(also="keep"),
    Case(also="blinded, reset"),
    Case(average="gradients", also="blinded"),
    Case(average="gradients", also="int8"),
]
ROUGHLY = {"int8": dict(rtol=0.02, atol=2e-3)}  # where a number rounds otherwise, a step is another by its 127th
MOST = 0.9  # of what int8 has yet to send is the same, within
ALIKE = dict(rtol=1e-3, atol=1e-6)
# With one seed, each step's sequences are split over devices; with four seeds on data=4, the seeds are.
FINETUNING = [("centralized", (0, 1, 2, 3)), ("parallel", (0,))]
MESHES = {CASES[0]: [(4, 2), (8, 1)], CASES[1]: [(8, 1)]}  # of the others, the first
RESTORED = [(2, 4), (1, 1)]  # what was saved on the first mesh


def build(case: Case, data: int, model: int):
    also = {section: dict(values) for section, values in SETTINGS[case.also].items()}
    if case.also == "slices" and data == 1:
        del also["federated"]["clients_at_once"]
    federated = dict(num_clients=5, clients_per_round=5, batch_size=8, rounds=2, client_optimizer_state="average")
    federated |= case._asdict() | also.pop("federated", {})
    federated.pop("also")
    config = tiny_config(
        federated=federated,
        mesh=dict(data=data, model=model),
        model=dict(hidden_dropout=0.1, num_heads=4, vocab_size=64) | also.pop("model", {}),
        eval=dict(batch_size=4, max_clients=5),  # data=8 doesn't divide it
        **also,
    )
    return make_simulation(config, clients=config.federated.num_clients)


def end_of_run(case: Case, *mesh: int):
    simulation = build(case, *mesh)
    state = simulation.init_state()
    for n in range(2):
        state, metrics = simulation.run_round(state, n)
    scores = simulation.evaluate(state) if case.strategy in ("parallel", "local") else None  # with a model for all, and each
    simulation.close()
    metrics = metrics._replace(failed=metrics.failed[: simulation.feed.cohort])  # without the padding
    return simulation, state, jax.device_get((state, metrics)), scores


def restore_elsewhere(state, case: Case) -> None:
    """Restores a checkpoint of one mesh's shards on other meshes, with each array sharded as the new mesh wants it."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder), keep=1)
        checkpoints.save(2, state, {})
        checkpoints.close()
        for mesh in RESTORED:
            other = build(case, *mesh)
            again, _ = Checkpoints(Path(folder)).restore(2, other.state_shape, other.state_sharding)
            leaves = (jax.tree.leaves(x) for x in (again, state, other.state_sharding))
            for actual, expected, sharding in zip(*leaves, strict=True):
                assert actual.sharding == sharding
                np.testing.assert_array_equal(actual, expected)
            other.close()
    print("equal: restored on", *RESTORED, flush=True)


def check_collectives(simulation) -> None:
    """Devices that hold whole clients communicate once a step, for the body's gradient, and once a round to average.

    The round's other reduction hands out the optimizers' step counter, 4 bytes, and its one gather tells at which clients
    numbers were not finite, 4 bytes a client. If the segment's gradient is averaged, too, it goes with the body's, and
    nothing is left for the round's end; a step's other reduction, 4 bytes, adds up the weights of all positions. Anything
    else would be data moving between devices needlessly.
    """
    f = simulation.config.federated
    data = simulation.feed.draw(0)
    clients = simulation.feed.cohort + simulation.feed.padding
    assert {s.data.shape[1] for s in data.rows.addressable_shards} == {clients // 8}  # [K, C, B, T]
    with jax.set_mesh(simulation.mesh):
        compiled = simulation._round.lower(simulation.init_state(), data).compile()
    counts = count_collectives(compiled.as_text())
    by_round = {"all-reduce": f.local_steps + 2, "all-gather": 1}
    if f.average != "parameters":  # two a step, and one of each a round for whose numbers are not finite
        by_round = {"all-reduce": 2 * f.local_steps + 1, "all-gather": 1}
    assert counts == by_round, counts
    simulation.close()
    print("equal: collectives", f.average, flush=True)


def end_of_finetuning(strategy: str, seeds: tuple[int, ...], data: int, model: int) -> list[np.ndarray]:
    config = tiny_config(
        task="finetune",
        mesh=dict(data=data, model=model),
        model=dict(num_heads=4, vocab_size=64, hidden_dropout=0.1),
        data=dict(source="glue:SST-2@unread", tokenizer="unread", partition=dict(kind="iid")),
        federated=dict(strategy=strategy, num_clients=4, batch_size=4),
        eval=dict(batch_size=6),  # data=4 doesn't divide 6
    )
    rng = np.random.default_rng(0)
    lengths = rng.integers(4, 13, 40).astype(np.int32)
    tokens = np.where(np.arange(12) < lengths[:, None], rng.integers(5, VOCAB, (40, 12)), 0).astype(np.int32)
    examples = Sequences(tokens, np.zeros_like(tokens), lengths, rng.integers(0, 2, 40).astype(np.int32))
    task = TaskData(TASKS["SST-2"], examples, {"dev": examples.take(np.arange(13))}, {}, {})
    tuning = Finetuning(config, task, None, seeds)
    state, _ = tuning.init_state()
    for n in range(2):
        state, metrics = tuning.step(state, n)
    kernel = state.model.client["pooler"]["kernel"]
    assert len(kernel.sharding.device_set) == data * model
    shared_out = {shard.index[0].indices(len(seeds)) for shard in kernel.addressable_shards}
    assert len(shared_out) == (data if len(seeds) % data == 0 else 1), shared_out  # the seeds really are split
    return [*jax.tree.leaves(jax.device_get((state, metrics))), tuning.logits(state.model, task.dev["dev"])]


def main() -> None:
    for case in CASES:
        _, _, expected, scores = end_of_run(case, 1, 1)
        close = dict(rtol=1e-5, atol=2e-6) | ROUGHLY.get(case.also, {})
        for mesh in MESHES.get(case, [(4, 2)]):
            simulation, state, actual, same = end_of_run(case, *mesh)
            for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
                at = f"{case} on {mesh}: {jax.tree_util.keystr(path)}"
                np.testing.assert_allclose(a, b, **close, err_msg=at)
                if "unsent" in at:
                    assert np.mean(np.isclose(a, b, **ALIKE)) > MOST, at
            if scores:
                np.testing.assert_allclose(same.by_text.loss, scores.by_text.loss, rtol=close["rtol"])
            kernel = state.model.server["layers"]["attention"]["qkv"]["kernel"]
            assert len(kernel.sharding.device_set) == 8
            parts = {shard.index[-1].indices(16) for shard in kernel.addressable_shards}
            assert len(parts) == mesh[1], (case, mesh, parts)  # the heads really are split
            if case in CASES[:2]:
                assert (simulation.feed.cohort + simulation.feed.padding) % mesh[0] == 0
            if mesh == (8, 1):
                check_collectives(simulation)
            elif case == CASES[0]:
                restore_elsewhere(state, case)
            assert simulation.compiled() == 1, "the round was compiled again"
        print("equal:", *case, flush=True)
    for strategy, seeds in FINETUNING:
        expected = end_of_finetuning(strategy, seeds, 1, 1)
        for a, b in zip(end_of_finetuning(strategy, seeds, 4, 2), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6, err_msg=f"{strategy}, seeds {seeds}")
        print("equal: finetune", strategy, seeds, flush=True)


if __name__ == "__main__":
    main()

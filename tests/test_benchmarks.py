"""The benchmark commands at their smallest: they run, their results have the documented structure, and JSON holds them."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import io
import json
import random
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import fedbert_jax
from benchmarks import __main__ as command
from benchmarks import (
    against,
    clients,
    compiling,
    federation,
    finetune,
    flops,
    jax_sides,
    limits,
    link,
    measure,
    network,
    pairs,
    parties,
    permutation,
    preparing,
    sides,
    sizes,
    steps,
    studies,
    study,
    tables,
    traffic,
    watch,
    worker,
)
from benchmarks.suites import SUITES
from fedbert_jax.data.masking import mask_blocks
from fedbert_jax.federated.joined import joined_loss
from fedbert_jax.federated.rounds import make_strategy
from fedbert_jax.federated.state import Cohort, Pair
from fedbert_jax.models import huggingface
from fedbert_jax.study import Stopped

ROOT = Path(__file__).parents[1]
SMALLEST = sizes.Size(hidden=16, layers=1, heads=2, vocab=128, length=16, clients=3, batch=2, steps=4, compiler="eager")
CEILING = {
    "flops": 1e12,
    "library": "torch",
    "by_library": {"torch": 1e12},
    "n": 8,
    "dtype": "float32",
    "device": "cpu",
    "platform": "cpu",
}


@pytest.fixture(autouse=True, scope="module")
def few_threads_and_little_garbage():
    """On a busy machine, threads that wait for one another take longer than the tests' tiny matrices, and the collections
    between samples take longer than the samples if they look at all objects that the libraries' imports have made."""
    torch = pytest.importorskip("torch")
    import benchmarks.torch_splitfed  # noqa: F401

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


def side(name="a", losses=(4.0, 3.0, 2.0), guess=4.0):
    values = iter(losses)
    return pairs.Side(name, 10, lambda: next(values), guess, guess)


@pytest.mark.slow
@pytest.mark.parametrize("name", SUITES)
def test_a_suite_runs_from_end_to_end(name, tmp_path):
    """Both suites on this CPU, the gpu suite in bfloat16, and of it what is not in the other.

    Compiling has its own test; `merged` and `sequential`, which take seconds to compile, are tested with SplitFed.
    """
    out = {kind: tmp_path / f"out.{kind}" for kind in ("json", "png", "md")}
    args = command.parse(
        [
            "--suite",
            name,
            "--size",
            "fast",
            "--samples",
            "1",
            "--processes",
            "one",
            "--no-memory",
            "--json",
            str(out["json"]),
            "--plot",
            str(out["png"]),
            "--results",
            str(out["md"]),
        ]
    )
    dtype = args.sizes["fast"].dtype
    assert dtype == {"cpu": "float32", "gpu": "bfloat16"}[name]
    args.sizes["fast"] = dataclasses.replace(SMALLEST, dtype=dtype, device=name)
    slow = ("merged", "sequential", "parallel-1", "parallel-chunks")
    args.rows = [row for row in args.rows if row.kind != "seconds" and row.a not in slow]
    if name == "gpu":
        args.rows = [row for row in args.rows if "compiled" in row.name or row.kind == "share"]
    stream = io.StringIO()
    with jax.numpy_rank_promotion("allow"):  # the plain model is written as one writes it without that check
        code = command.run(args, CEILING, 1, Console(file=stream))
    record = json.loads(out["json"].read_text())
    assert [r for r in record["rows"] if "failed" in r] == [] and code == 0
    assert [r["name"] for r in record["rows"]] == [row.name for row in args.rows]
    for r in record["rows"]:
        assert len(r["values"]) == 1 and r["value"] == r["values"][0] > 0
        assert r["met"] == (None if r["target"] is None else r["value"] >= r["target"])
        if r["kind"] == "ratio":
            assert r["value"] == pytest.approx(r["b_ms"] / r["a_ms"])
    found = {s["key"]: s for s in record["sides"]}
    assert found.keys() == {key for row in args.rows for key in (row.a, row.b) if key}  # each built, and only once
    for s in found.values():
        assert s["share"] == pytest.approx(s["flops_executed"] / CEILING["flops"])
        assert (s["flops_executed"] < s["flops_needed"]) == (s["key"] in sides.JAX and s["key"] != "plain")
    block = out["md"].read_text()
    assert out["png"].read_bytes().startswith(b"\x89PNG") and "matmul ceiling" in block
    lines = {row.name: line for row in args.all_rows for line in block.splitlines() if f"| {row.name} |" in line}
    for row in args.all_rows:
        assert (tables.UNMEASURED in lines[row.name]) == (row not in args.rows)
    assert "| fast |" in stream.getvalue() and tables.UNMEASURED not in stream.getvalue()


@pytest.mark.slow
def test_sides_in_processes_of_their_own():
    """A pair may live in two processes, each with its own memory, which is freed when they end."""
    bench = measure.Bench({"tiny": SMALLEST}, samples=1, processes="two")
    row = pairs.Row("centralized/V2", "centralized", "v2-gather", size="tiny")
    result = json.loads(json.dumps(bench.measure(row)))
    assert result["value"] > 0 and result["b"] == "torch SplitFed V2, gather"
    assert [s["key"] for s in bench.facts()] == ["centralized", "v2-gather"]
    assert all(s["peak_bytes"] > 0 for s in bench.facts())
    with pytest.raises(RuntimeError, match="freed"):
        bench.sides["tiny", "v2-gather"].run()
    failed = bench.measure(pairs.Row("none", "nonsense", "gather", size="tiny"))
    assert "accepted: centralized" in failed["failed"]


def test_compiling_is_timed_in_fresh_processes(monkeypatch):
    closed = []

    def remote(name, size):
        return dataclasses.replace(side(name), compile_seconds=19.0 + len(closed), close=lambda: closed.append(name))

    monkeypatch.setattr(measure.worker, "remote_side", remote)
    row = pairs.Row("compiling", "parallel", target=20.0, size="tiny", kind="seconds")
    result = measure.Bench({"tiny": SMALLEST}, samples=7).measure(row)
    assert result["values"] == [19.0, 20.0, 21.0] and closed == ["parallel"] * 3
    assert not result["met"] and tables.verdict(result) == "missed by 0.0 s"


def test_another_checkout_is_timed_in_pairs(monkeypatch, tmp_path, capsys):
    """Each side's code comes from its own checkout, and what is slower there gives a ratio above 1."""
    begun = []

    def remote(name, size, checkout=against.ROOT):
        begun.append(checkout)
        slower = 1.5 if checkout == tmp_path else 1.0
        made = dataclasses.replace(side(name), compile_seconds=8 * slower)
        made.timed = lambda: made.losses.append(2.0) or 1e-6 * slower  # a token
        return made

    monkeypatch.setattr(against, "remote_side", remote)
    monkeypatch.setattr(against.machine, "keep_freed_memory", lambda: None)
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "worker.py").write_text("")
    against.main([str(tmp_path), "--sides", "parallel", "--compiled", "fast", "--samples", "3"])
    here, there = against.ROOT, tmp_path
    assert begun == [here, there, *(here, there), *(there, here), *(here, there)]
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| parallel")]
    times = [f"{1e-3 * sizes.SIZES['small'].tokens * slower:.1f}" for slower in (1.0, 1.5)]
    assert [row[1:] for row in rows] == [[*side, "1.500", "1.500 to 1.500"] for side in (times, ["8.00", "12.00"])]
    for wrong in ([str(tmp_path / "none")], [str(tmp_path), "--sides", "hf"], [str(tmp_path), "--samples", "0"]):
        with pytest.raises(SystemExit, match=r"^2$"):
            against.main(wrong)


@pytest.mark.slow
def test_a_side_runs_the_code_of_its_checkout(tmp_path):
    """Even though the package is installed; and a setting that the other checkout doesn't know is left to it."""
    for folder in ("benchmarks", "fedbert_jax"):
        shutil.copytree(against.ROOT / folder, tmp_path / folder)
    older = tmp_path / "benchmarks" / "sizes.py"
    older.write_text(older.read_text().replace("    unroll: bool = True", "    unroll = True"))
    with (tmp_path / "fedbert_jax" / "__init__.py").open("a") as file:
        file.write('\nraise RuntimeError("the other one")\n')
    with pytest.raises(RuntimeError, match="the other one"):
        worker.remote_side("centralized", SMALLEST, tmp_path)
    assert worker.remote_side("centralized", SMALLEST).compile_seconds > 0


@pytest.mark.slow
def test_compiling_is_timed_in_every_way(monkeypatch, capsys):
    """One way really is a process of its own; of the others, the command only says which they are."""
    flag = "--xla_backend_optimization_level=0"
    found = compiling.in_a_process("fast", "centralized", False, flag, 600)
    assert min(found[key] for key in ("compiling", "ms", "gflop", "gb", "temporary_mb")) > 0
    asked = []

    def in_a_process(size, strategy, unroll, flags, limit):
        asked.append((size, strategy, unroll, flags))
        return None if flags else found

    monkeypatch.setattr(compiling, "in_a_process", in_a_process)
    compiling.main(["--size", "fast", "--strategies", "parallel", f"--flags={flag}", "--limit", "5"])
    assert asked == [("fast", "parallel", unroll, flags) for unroll in (True, False) for flags in ("", flag)]
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| parallel")]
    assert [row[1:3] for row in rows] == [[layers, flags] for layers in ("unrolled", "scanned") for flags in ("none", flag)]
    assert rows[0][3:6] == [f"{found['compiling']:.1f}", f"{found['ms']:.1f}", f"{found['gflop']:.2f}"]
    assert rows[1][3].startswith("more than 5")


@pytest.mark.slow
@pytest.mark.parametrize("version, strategy", [("v1", "merged"), ("relay", "sequential")])
def test_splitfed_in_torch_learns_what_fedbert_jax_learns(version, strategy):
    """Same weights, same masked text: SplitFed V1 is `merged`, and V2 with the segment handed on is `sequential`."""
    import torch

    from benchmarks import torch_sides
    from benchmarks.torch_splitfed import SplitFed

    size = SMALLEST
    setting = jax_sides.make_setting(size, strategy, size.steps)
    chosen = make_strategy(dataclasses.replace(setting, prepare=lambda _, batch: batch))  # the batches are masked already
    blocks = jnp.asarray(sizes.random_blocks(size, size.steps), jnp.int32).reshape(-1, size.batch, size.length)
    keys = jax.random.split(jax.random.key(3), len(blocks))
    batches = jax.vmap(lambda k, b: mask_blocks(k, b, jax_sides.mask_spec(size)))(keys, blocks)
    batches = jax.tree.map(lambda x: x.reshape(size.steps, size.clients, *x.shape[1:]), batches)
    client, server = jax_sides.fresh_model(size)

    model = torch_sides.make_model(size)
    tensors = huggingface.to_tensors(client, server)
    lost, unexpected = model.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in tensors.items()}, strict=False)
    assert not unexpected and all("decoder" in name for name in lost)  # the decoder is tied
    everywhere = version == "v1"  # the loss is the same either way: here one of each
    theirs = SplitFed(version, model, size, everywhere)
    take = lambda x, k, c: torch.from_numpy(np.asarray(x[k, c]).astype(np.int64))  # noqa: E731
    torch_batches = [
        [tuple(take(x, k, c) for x in (batches.tokens, batches.positions, batches.labels)) for c in range(size.clients)]
        for k in range(size.steps)
    ]

    state, weights = chosen.init(Pair(client, server)), jnp.full(size.clients, 1 / size.clients, jnp.float32)
    round_ = jax.jit(chosen.round)
    losses = []
    for n in range(3):
        cohort = Cohort(batches, jnp.arange(size.clients, dtype=jnp.int32), weights, jnp.int32(n))
        state, metrics = round_(state, cohort)
        losses.append(float(metrics.loss))
    assert losses[-1] < losses[0] - 0.02
    assert [theirs.round(torch_batches).item() for _ in range(3)] == pytest.approx(losses, rel=2e-4)


@pytest.mark.slow
def test_torch_split_trains_as_parallel_does():
    """Same text, same optimizer, same averaging: after equally many rounds, the losses differ only by the draws."""
    ours, theirs = sides.make_side("parallel", SMALLEST), sides.make_side("split", SMALLEST)
    v2 = sides.make_side("v2", SMALLEST)
    for one in (ours, theirs, v2):
        while len(one.losses) < 12:
            one.timed()
        one.check()
    assert theirs.losses[-1] < theirs.losses[0] - 0.1  # or else the next line could not tell learning from standing still
    assert theirs.losses[-1] == pytest.approx(ours.losses[-1], abs=0.15)


def test_plain_jax_computes_what_fedbert_jax_computes():
    """The plain model with the segments' weights has their loss."""
    from benchmarks import plain_jax

    setting = jax_sides.make_setting(SMALLEST, "centralized", 1)
    client, server = jax_sides.fresh_model(SMALLEST)
    shapes = jax.eval_shape(lambda key: plain_jax.init_params(key, SMALLEST), jax.random.key(0))
    e, h, body = client["embeddings"], client["head"], server["layers"]
    attention = body["attention"]
    qkv = {
        name: {"kernel": attention["qkv"]["kernel"][:, :, n], "bias": attention["qkv"]["bias"][:, n]}
        for n, name in enumerate(("query", "key", "value"))
    }
    mine = {
        "word": e["word"]["embedding"],
        "position": e["position"]["embedding"][: SMALLEST.length],
        "type": e["token_type"]["embedding"][:1],
        "norm": e["norm"]["norm"],
        "layers": qkv
        | {
            "out": attention["out"],
            "norm1": body["attention_norm"]["norm"],
            "up": body["up"],
            "down": body["down"],
            "norm2": body["output_norm"]["norm"],
        },
        "head": {"dense": h["dense"], "norm": h["norm"]["norm"], "bias": h["bias"]},
    }
    assert jax.tree.map(jnp.shape, mine) == jax.tree.map(jnp.shape, shapes)
    blocks = jnp.asarray(sizes.random_blocks(SMALLEST, 1), jnp.int32).reshape(-1, SMALLEST.length)
    batch = jax.jit(lambda b: mask_blocks(jax.random.key(1), b, jax_sides.mask_spec(SMALLEST)))(blocks)
    expected = jax.jit(lambda b: joined_loss(setting.segments, client, server, b))(batch)
    with jax.numpy_rank_promotion("allow"):
        found = jax.jit(lambda b: plain_jax.loss_fn(mine, b, SMALLEST))(batch)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_flops_are_counted_by_the_stated_formula():
    size = sizes.SIZES["base-128"]
    d, t, m, layers, vocab = 768, 128, 20, 12, 30522
    everywhere = 6 * layers * 12 * d * d + 12 * layers * t * d + 6 * d * d + 6 * vocab * d
    assert flops.per_token(size, logits_everywhere=True) == (everywhere, everywhere)
    masked = everywhere - (6 * d * d + 6 * vocab * d) * (t - m) / t
    needed, executed = flops.per_token(size, last_layer_pruned=True)
    assert needed == pytest.approx(masked)
    # The last layer's keys and values are computed at all positions, the rest of it at the masked ones.
    last = 6 * 2 * d * d + (6 * 10 * d * d + 12 * t * d) * m / t
    assert executed == pytest.approx(masked - (6 * 12 * d * d + 12 * t * d) + last)


def test_no_compilation_that_is_timed_is_read_from_a_cache():
    cpu, gpu = SUITES["cpu"].rows, SUITES["gpu"].rows
    off = {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    assert command.caching("one", gpu, "folder") == command.caching("two", cpu, "folder") == off
    kept = command.caching("two", gpu, "folder")
    assert kept["JAX_COMPILATION_CACHE_DIR"] == "folder" and kept["JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES"] == "none"
    assert kept.keys().isdisjoint(off)


def test_a_record_is_gone_on_with(tmp_path):
    """Rows measured before stay, unless their size has changed; machines without any rows left are dropped."""
    path, other = tmp_path / "r.json", dataclasses.replace(SMALLEST, batch=5)
    row = {"size": "s", "name": "a/b", "date": "monday"}
    first = measure.open_record(path, "cpu", {"s": SMALLEST}, {"date": "monday"})
    first["rows"].append(row)
    path.write_text(json.dumps(first))
    again = measure.open_record(path, "cpu", {"s": SMALLEST}, {"date": "tuesday"})
    assert again["rows"] == [row] and list(again["machines"]) == ["monday", "tuesday"]
    changed = measure.open_record(path, "cpu", {"s": other}, {"date": "tuesday"})
    assert changed["rows"] == [] and list(changed["machines"]) == ["tuesday"]
    with pytest.raises(SystemExit, match="--json"):
        measure.open_record(path, "gpu", {"s": SMALLEST}, {"date": "tuesday"})


def test_memory_is_added_to_the_sides_that_lack_it(monkeypatch):
    asked, saved = [], []
    monkeypatch.setattr(measure.worker, "peak_of", lambda name, size: asked.append(name) or 7)
    peaks = dict(a=None, b=5, c=None)
    sides = [{"size": "s", "key": key, "name": key, "peak_bytes": peak} for key, peak in peaks.items()]
    record = measure.new_record("cpu") | {"sides": sides}
    measure.add_memory(record, {"s": SMALLEST}, [pairs.Row("a/b", "a", "b", size="s")], saved.append)
    assert [s["peak_bytes"] for s in record["sides"]] == [7, 5, None] and asked == ["a"] and saved == [record]


def test_results_have_every_row_of_every_suite():
    """RESULTS.md was written by this version: `--results` adds the rows that a suite has gained."""
    text = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    for suite in SUITES.values():
        block = re.search(rf"<!-- suite:{suite.name} -->(.*?)<!-- end -->", text, re.DOTALL)
        assert block is not None
        cells = [line.strip("| ").split(" | ") for line in block[1].splitlines()]
        named = {(c[0], c[1]) for c in cells if len(c) > 1}
        assert {(row.size, row.name) for row in suite.rows} <= named


def test_a_block_is_replaced_and_the_rest_stays(tmp_path):
    path = tmp_path / "R.md"
    tables.update_block(path, "cpu", "one")
    path.write_text(path.read_text() + "\nafter\n")
    tables.update_block(path, "gpu", "two")
    tables.update_block(path, "cpu", r"three \1")
    assert path.read_text() == (
        "# Results\n\n<!-- suite:cpu -->\n\nthree \\1\n\n<!-- end -->\n\nafter\n\n"
        "<!-- suite:gpu -->\n\ntwo\n\n<!-- end -->\n"
    )


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--suite", "cpu", "--only", "nothing"], "accepted: parts of base: centralized"),
        (["--suite", "gpu", "--batch", "base=1"], "accepted: SIZE=N with SIZE one of base-128"),
        (["--suite", "cpu", "--samples", "0"], "at least 1"),
        ([], "accepted: cpu, gpu"),
    ],
)
def test_a_wrong_argument_is_named(arguments, says, capsys):
    with pytest.raises(SystemExit):
        command.parse(arguments)
    assert says in " ".join(capsys.readouterr().err.split())


def test_a_measurement_that_compiles_is_refused():
    """Compilation by JAX or torch.compile within a call is noticed, except in the first call."""
    import torch

    watch.compilations()
    shapes = iter(range(1, 9))

    def run() -> float:
        return float(jax.jit(lambda x: x + 1)(np.zeros(next(shapes)))[0])

    one = pairs.Side("a", 10, run, 4.0, 4.0)
    one.timed()
    with pytest.raises(RuntimeError, match="compiled during"):
        one.timed()
    before = watch.compilations()
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(2))
    assert watch.compilations() > before


def test_torch_gather_computes_what_hf_computes():
    """Logits at only the masked positions give the same loss as logits everywhere."""
    import torch

    from benchmarks import torch_sides

    model = torch_sides.make_model(SMALLEST)
    tokens = torch_sides.make_blocks(SMALLEST, 1).flatten(0, 2)
    masked, positions, labels = torch_sides.draw_masks(tokens, SMALLEST)
    everywhere = torch.full_like(tokens, -100).scatter_(1, positions, labels)
    z = model.bert(input_ids=masked).last_hidden_state
    gathered = torch_sides.mlm_loss(model.cls, z, positions, labels)
    torch.testing.assert_close(gathered, model(input_ids=masked, labels=everywhere).loss)
    assert (positions > 0).all() and (positions < SMALLEST.length - 1).all()  # [CLS] and [SEP] stay


def test_a_side_that_does_not_learn_is_refused():
    broken = side(losses=[4.0] * 40)
    broken.timed()
    with pytest.raises(RuntimeError, match="does not fall"):
        broken.check()
    with pytest.raises(RuntimeError, match="first loss"):
        dataclasses.replace(side(), initial_loss=9.0).check()


def test_pairs_alternate_which_side_is_first():
    order: list[str] = []

    def make(name: str) -> pairs.Side:
        def run() -> float:
            order.append(name)
            return 1.0

        return pairs.Side(name, 10, run, 4.0, 4.0)

    pairs.compare(pairs.Row("a/b", "a", "b"), make("a"), make("b"), 10, samples=3)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"  # the first two are the warm-up


def test_one_side_rests_while_the_other_runs():
    """For when the device's memory doesn't hold both."""
    order: list[str] = []

    def make(name: str) -> pairs.Side:
        def note(text: str):
            return lambda: order.append(text) or 1.0

        return pairs.Side(name, 10, note(name), 4.0, 4.0, ready=note("+" + name), rest=note("-" + name))

    pairs.compare(pairs.Row("a/b", "a", "b"), make("a"), make("b"), 10, samples=1, turns=True)
    for running, resting in (("a", "b"), ("b", "a")):
        starts = [n for n, what in enumerate(order) if what == running]
        assert starts and all(order[n - 2 : n] == ["-" + resting, "+" + running] for n in starts)


def test_quartiles():
    assert pairs.quartiles([3.0]) == (3.0, 3.0)
    assert pairs.quartiles([5.0, 1.0, 2.0, 3.0, 4.0]) == (2.0, 4.0)


@pytest.mark.slow
def test_clients_measures_each_number_in_its_own_process(tmp_path):
    out = tmp_path / "clients.json"
    command = [sys.executable, "-m", "benchmarks.clients", "--clients", "3", "--rounds", "2", "--size", "fast"]
    done = subprocess.run([*command, "--json", str(out)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (run,) = json.loads(out.read_text())["runs"]
    assert run["clients"] == 3 and run["compiled_rounds"] == 1
    assert len(run["round_seconds"]) == 2 and run["eval_seconds"] > 0
    assert 0 < run["imported_peak_bytes"] <= run["data_peak_bytes"] <= run["training_peak_bytes"] <= run["peak_bytes"]
    assert run["token_bytes"] % (clients.LENGTH * 2) == 0
    assert "peak after training" in done.stdout


@pytest.mark.slow
def test_fine_tuning_starts_both_sides_from_the_same_weights(tmp_path):
    """Same weights, batches and rate: except for dropout, both sides' losses go the same way."""
    model = finetune.synthetic_model(tmp_path, hidden=16)
    glue = finetune.synthetic_task(tmp_path / "glue", 8 * 256, longest=12)  # one padded length to compile for
    sides = finetune.make_sides(model, glue, 1, tmp_path)
    row = json.loads(json.dumps(pairs.compare(finetune.ROWS[0], sides["jax"], sides["torch"], 32, samples=2)))
    assert len(row["values"]) == 2 and row["target"] == 1.0
    assert sides["jax"].losses[:3] == pytest.approx(sides["torch"].losses[:3], abs=0.03)


# --- a federation over a network --------------------------------------------------------------------------------------


def test_a_step_takes_at_best_what_its_dependences_leave():
    client = dict(draw=1.0, begin=2.0, head=3.0, finish=4.0, step=5.0)
    server = dict(forward=10.0, backward=20.0, step=6.0)
    # One after the other; the server's update is hidden behind the way back and the client's next step.
    undivided = network.pipeline(1, client, server, (7.0, 1.0), (2.0, 8.0), delay=3.0)
    assert undivided == 1 + 2 + (7 + 3) + 10 + (2 + 3) + 3 + (1 + 3) + 20 + (8 + 3) + 4 + 5
    # Unless it takes longer than these: then the next step's hidden states wait for it.
    slow = network.pipeline(1, client, server | {"step": 100.0}, (7.0, 1.0), (2.0, 8.0), delay=3.0)
    assert slow == 10 + (2 + 3) + 3 + (1 + 3) + 20 + 100
    # Halves: one is computed while the other crosses, so that half of what crosses is hidden, each way.
    nothing, server = dict.fromkeys(client, 0.0), dict(forward=8.0, backward=8.0, step=0.0)
    assert network.pipeline(1, nothing, server, (8.0, 0.0), (0.0, 8.0)) == 8 + 8 + 8 + 8
    assert network.pipeline(2, nothing, server, (4.0, 0.0), (0.0, 4.0)) == 4 + 8 + 8 + 4


def test_a_step_is_measured_against_the_larger_of_its_ingredients():
    way = federation.Way(speed=link.Speed(100.0, 0.5))
    phases = dict(
        client=dict(draw=1.0, begin=0.0, head=2.0, finish=0.0, step=1.0), server=dict(forward=2.0, backward=4.0, step=0.0)
    )
    one = federation.Sample(12.0, transfer=3.0, still=5.0, **phases)
    assert (one.compute, one.ratio, one.overhead) == (10.0, 1.2, 2.0)
    other = dataclasses.replace(one, transfer=20.0)
    assert other.ratio == 0.6
    frames = {"up": [500, 0], "down": [0, 500]}
    assert network.best(way, one, frames) == 10 + 3  # the delay is in the transfer
    found = json.loads(json.dumps(network.summary(way, [one, other, one], frames)))
    assert (
        found["ratio"] == 1.2 and found["target"] == 1.25 and found["best_ratio"] == 1.3 and network.verdict(found) == "met"
    )
    missed = network.summary(way, [dataclasses.replace(one, step=14.0)], frames)
    assert network.verdict(missed) == "missed by 0.15, at best missed"
    missed = network.summary(way, [dataclasses.replace(one, step=14.0, transfer=2.0)], frames)
    assert network.verdict(missed) == "missed by 0.15"
    assert network.summary(dataclasses.replace(way, parts=2), [one], frames)["target"] == 1.15
    assert "| 1.20 |" in network.table([found]) and "100 Mbit/s, 0.5 ms, float32, 1 microbatch" in network.table([found])


def test_a_line_has_its_rate_however_late_it_is_woken():
    pace, kilobyte = link.Pace(8.0), 1000  # which takes a millisecond
    assert pace.leaves(kilobyte, 10.0, waited=True) == pytest.approx(10.0 - link.SLACK + 0.001)
    assert pace.leaves(kilobyte, 10.0, waited=False) == pytest.approx(10.0 - link.SLACK + 0.002)
    assert pace.leaves(kilobyte, 10.5, waited=False) == pytest.approx(10.0 - link.SLACK + 0.003)
    assert pace.leaves(kilobyte, 10.5, waited=True) == pytest.approx(10.5 - link.SLACK + 0.001)
    assert link.Pace(None).leaves(kilobyte, 3.0, waited=False) == 3.0
    assert link.Pace(8.0).leaves(kilobyte, 10.0, waited=False) == pytest.approx(10.0 - link.SLACK + 0.001)  # the first


def test_a_line_counts_every_byte_and_holds_them_up():
    speed = link.Speed(megabits=80.0, delay=20.0)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        line = link.Link(listening.getsockname()[1], speed)
        with socket.create_connection(("127.0.0.1", line.port), 20) as client:
            server, _ = listening.accept()
            sent, start = np.random.default_rng(0).bytes(200_000), time.perf_counter()
            client.sendall(sent)
            with server, server.makefile("rb") as file:
                got = file.read(len(sent))
                seconds = time.perf_counter() - start
                server.sendall(got[:1000])
                assert client.makefile("rb").read(1000) == sent[:1000]
        assert got == sent and (line.up, line.down) == (200_000, 1000)
        assert seconds > 0.020 + 0.020 - link.SLACK  # on the way, and at 10 MB/s
        line.close()


def test_what_crosses_for_a_token_of_bert_base():
    size, masked, scale = 768, 20, 4  # bytes of a row in int8, rows that come back of 128, a row's scale
    by_hand = 2 * (size + scale) + masked * (2 * (size + scale) + 2) / 128
    assert 1e3 * traffic.kilobytes_a_token("base, 8 x 128 tokens", "int8", "masked") == pytest.approx(by_hand)
    assert by_hand < 1900


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--parts", "3"], "--parts 3: accepted: a divisor of the 8 sequences"),
        (["--line", "fast"], "accepted: loopback, or MBIT or MBIT:MS"),
        (["--clients", "0"], "at least 1"),
    ],
)
def test_a_wrong_argument_of_the_network_is_named(arguments, says, capsys):
    with pytest.raises(SystemExit):
        network.parse(arguments)
    assert says in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_a_federation_is_measured_in_processes_of_its_own():
    """Two clients, two microbatches, certificates: every part of a sample, and what crosses is what `traffic` says."""
    changes = dict(hidden_size=64, num_layers=1, num_heads=2)
    model = dict(preset="tiny", vocabulary=128, rows=4, tokens=64, steps=2, changes=changes)
    with federation.credentials(2) as folder:
        plan = federation.Plan(model, 2, credentials=folder)
        with contextlib.closing(federation.Federation(federation.Way(parts=2), plan, counting=True)) as running:
            warm, compiled = running.sample(False), running.still(False)
            one = running.sample(True)
            assert running.still(False) == compiled > 0
            counted, said = running.bytes_of_a_round(), running.server.call({"do": "traffic"})["bytes"]
        assert not any(worker.running for worker in (running.server, *running.clients))
    for sample in (warm, one):
        assert set(sample.client) == set(parties.PHASES[0]) and set(sample.server) == set(parties.PHASES[1])
        assert min(sample.step, sample.transfer, sample.still, *sample.client.values(), *sample.server.values()) > 0
    assert abs(counted / said - 1) < network.APART
    steps = model["rows"] * (2 * 64 * 64 * 4 + 10 * (2 * 64 * 4 + 2))  # h, dh; z, dz and positions, of 10 of 64 tokens
    assert said > 2 * model["steps"] * steps  # and the segments


# --- studies ----------------------------------------------------------------------------------------------------------


def test_a_study_judges_by_the_seeds_spread():
    def judged(base, other):
        return study.judge({"base": dict(enumerate(base)), "other": dict(enumerate(other))}, "base")["other"]

    near = judged([5.0, 5.2, 5.4], [5.05, 5.25, 5.48])
    assert near["within"] and near["difference"] == pytest.approx(0.06) and near["mean"] == pytest.approx(5.26)
    assert near["differences"] == pytest.approx([0.05, 0.05, 0.08]) and near["error"] == pytest.approx(0.01)
    assert not judged([5.0, 5.2, 5.4], [5.3, 5.5, 5.7])["within"]
    alone = judged([5.0], [5.1])
    assert alone["within"] is alone["error"] is None and alone["difference"] == pytest.approx(0.1)


def test_two_means_differ_by_more_than_both_deviations():
    assert study.differs([1.0, 2.0, 3.0], [4.1, 5.1, 6.1]) and not study.differs([1.0, 2.0, 3.0], [2.9, 3.9, 4.9])


@pytest.mark.parametrize("name", studies.STUDIES)
def test_a_studys_configs_are_accepted(name):
    """Before a study has trained for an hour, and stops at an arm's mistake."""
    chosen = studies.STUDIES[name]
    for arm in chosen.arms.values():
        changes = {"fill_mask": (), **chosen.changes, **arm.changes}
        fedbert_jax.load_config(arm.config, {k: () if v == "()" else v for k, v in changes.items()})


@pytest.fixture
def commands(monkeypatch):
    """The commands that a study gives, recorded instead of run; each leaves behind the files that it would."""
    given: list[list[str]] = []

    def run(command, stdout, **_):
        given.append(command)
        if "fedbert_jax.audit" in command:
            row = {"knows": "seed", "attack": "nearest", "of": "tokens", "top1": 0.5 + len(given) / 1000}
            (Path(command[-1]) / "audit").mkdir()
            (Path(command[-1]) / "audit" / "audit.json").write_text(json.dumps([row]))
            return subprocess.CompletedProcess(command, 0)
        workdir = Path(command[command.index("--workdir") + 1])
        if "fedbert_jax.glue" in command:
            for n, task in enumerate(command[command.index("--tasks") + 1].split(",")):
                scores = [0.5 + n / 10 + m / 100 + ("random" in workdir.name) / 5 for m in range(5)]
                seeds = {str(m): {"dev": {"pearson": x / 2}} for m, x in enumerate(scores)}
                (workdir / task).mkdir(parents=True)
                (workdir / task / "results.json").write_text(json.dumps({"values": scores, "seeds": seeds}))
            return subprocess.CompletedProcess(command, 0)
        workdir.mkdir(parents=True)
        changes = dict(flag.removeprefix("--config.").split("=", 1) for flag in command if flag.startswith("--config."))
        if changes.get("data.seq_len") == "17" and changes["seed"] == "1":
            return subprocess.CompletedProcess(command, 1)
        config = {
            "seed": int(changes["seed"]),
            "precision": {"compute_dtype": changes.get("precision.compute_dtype", "auto")},
        }
        (workdir / "config.json").write_text(json.dumps(config))
        ends = {"loss": 5.0 + len(given) / 10, "accuracy": 0.2}
        last = {f"eval_{name}{mean}": x for name, x in ends.items() for mean in ("", "_by_text", "_over_clients")}
        lines = [{"round": 0}, {"round": 1, "tokens": 10, "seconds": 2.0, "eval_clients_scored": 2} | last]
        (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr("fedbert_jax.study.subprocess.run", run)
    return given


def test_a_study_runs_every_arm_with_every_seed_once(tmp_path, commands, capsys):
    """Each run is the package's own command in its own workdir; a change reaches all runs, and nothing is done twice."""
    out = tmp_path / "bf16.json"
    options = ["bf16", "--seeds", "2", "--workdir", str(tmp_path / "w"), "--json", str(out)]
    study.main([*options, "--config.data.seq_len=16"])
    kinds = [(Path(c[c.index("--workdir") + 1]).name, c[-1]) for c in commands]
    assert kinds == [(f"{d}-{n}", "--config.data.seq_len=16") for n in (0, 1) for d in ("float32", "bfloat16")]
    for c in commands:
        dtype, seed = Path(c[c.index("--workdir") + 1]).name.split("-")
        assert {
            f"--config.precision.compute_dtype={dtype}",
            f"--config.seed={seed}",
            "--config.federated.rounds=200",
        } <= set(c)
    found = json.loads(out.read_text())["pretraining"]["judgement"]["bfloat16"]
    assert found["difference"] == pytest.approx(0.1) and found["within"]
    text = capsys.readouterr().out
    assert (
        "| bfloat16 | +0.1000 ± 0.0000 | +0.1000, +0.1000 | within |" in text and "2 of" not in text.split("| bfloat16 |")[0]
    )
    study.main([*options, "--config.data.seq_len=16"])
    assert len(commands) == 4


def test_a_study_audits_what_it_has_trained(tmp_path, commands, capsys):
    study.main(["defences", "--arms", "demo,deep", "--seeds", "2", "--workdir", str(tmp_path)])
    audited = [Path(c[-1]).name for c in commands if "fedbert_jax.audit" in c]
    assert audited == ["demo-0", "demo-1", "deep-0", "deep-1"] and len(commands) == 8
    text = capsys.readouterr().out
    assert "| run | audited | seed, tokens |" in text and "4 of 4 | 50.6 % ± 0.1 %" in text
    assert not any("--public" in c for c in commands)


def test_a_study_is_audited_with_the_public_text_that_it_is_given(tmp_path, commands):
    """Its runs train on other text, from the checkpoint that is given."""
    places = [f"--{name}={tmp_path / name}" for name in ("model", "text", "public")]
    study.main(["checkpoint", "--workdir", str(tmp_path / "w"), *places])
    audited = [c for c in commands if "fedbert_jax.audit" in c]
    assert [Path(c[-1]).name for c in audited] == ["client-0-0", "client-1-0"]
    assert all(c[c.index("--public") + 1] == f"text:{tmp_path / 'public'}" for c in audited)
    assert all(f"--config.data.source=text:{tmp_path / 'text'}" in c for c in commands if "fedbert_jax.main" in c)


def test_a_study_stops_with_a_command_that_fails(tmp_path, commands):
    with pytest.raises(Stopped, match=r"float32-1 stopped .*goes on from there"):
        study.main(["bf16", "--workdir", str(tmp_path), "--config.data.seq_len=17"])


def test_a_study_fine_tunes_what_it_has_trained(tmp_path, commands, monkeypatch, capsys):
    """It does so beside the checkpoint and a random start; a start that differs from the random one gets a star."""
    monkeypatch.setattr(study, "heldout", lambda model, pretrained: 4.0)
    places = [f"--{name}={tmp_path / name}" for name in ("model", "text", "glue")]
    study.main(["continued", "--workdir", str(tmp_path / "w"), *places])
    glue = [c for c in commands if "fedbert_jax.glue" in c]
    starts = {(c[c.index("--model") + 1].removeprefix(f"{tmp_path}/"), "--random-start" in c) for c in glue}
    trained = {(f"w/{arm}-0/hf", False) for arm in ("centralized", "parallel", "sequential", "local")}
    assert starts == {("model", True), ("model", False)} | trained and len(glue) == 6 * 3
    pretraining = [c for c in commands if "fedbert_jax.main" in c]
    assert all(f"--config.data.source=text:{tmp_path / 'text'}" in c for c in pretraining) and len(pretraining) == 4
    text = capsys.readouterr().out
    assert "| random |  | 72.0 ± 1.6 | 72.0 ± 1.6 | 82.0 ± 1.6 | 36.0 ± 0.8 |" in text
    assert "| checkpoint | 4.000 | 52.0 ± 1.6 * |" in text


def test_arms_with_other_clients_have_the_baselines_vocabulary(tmp_path, commands, monkeypatch):
    """One trained on less text would have other words, and losses that say nothing of one another."""
    monkeypatch.setattr(study, "heldout", lambda model, pretrained: 4.0)
    study.main(["scratch", "--workdir", str(tmp_path / "w"), *(f"--{name}={tmp_path / name}" for name in ("text", "glue"))])
    arms = {Path(c[c.index("--workdir") + 1]).name: c for c in commands if "fedbert_jax.main" in c}
    tokenizers = {name: [flag for flag in c if "data.tokenizer=" in flag] for name, c in arms.items()}
    assert next(iter(arms)) == "centralized-0"
    own = tokenizers.pop("local-0")
    assert own == [f"--config.data.tokenizer={tmp_path / 'w' / 'centralized-0' / 'data' / 'tokenizer'}"]
    assert set(map(tuple, tokenizers.values())) == {("--config.data.tokenizer=train:8192",)}


def test_losses_over_other_vocabularies_are_not_compared(tmp_path, monkeypatch):
    vocabularies = {"a": 0}, {"a": 1}
    monkeypatch.setattr("fedbert_jax.data.tokenizer.load_tokenizer", lambda _: Mock(get_vocab=lambda: vocabularies[0]))
    monkeypatch.setattr("fedbert_jax.workdir.paths.Workdir.read_config", lambda _: None)
    built = Mock(tokenizer=Mock(get_vocab=lambda: vocabularies[1]))
    monkeypatch.setattr("fedbert_jax.experiment.build", lambda *_: built)
    with pytest.raises(SystemExit, match="has another vocabulary than"):
        study.heldout(tmp_path / "model", tmp_path / "run")


@pytest.mark.parametrize(
    "options, words",
    [
        ("bf16 --seeds 0", "at least 1"),
        ("bf16 --arms bfloat16", "float32 among them"),
        ("continued", "needs --model"),
        ("checkpoint --model=x --text=x", "needs --public"),
        ("bf16 --rounds 3", "--rounds: accepted"),
    ],
)
def test_a_study_refuses_what_it_cannot_do(options, words, capsys):
    with pytest.raises(SystemExit):
        study.main(options.split())
    assert words in capsys.readouterr().err


# --- preparing text ---


@pytest.mark.slow
def test_preparing_is_measured_beside_the_datasets_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 8))) for _ in range(500)]
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(" ".join(rng.choices(words, k=100)) for _ in range(300)))
    record = tmp_path / "record.json"
    command = ["preparing", f"--text=text:{text}", "--megabytes=1", "--pairs=1", f"--json={record}"]
    monkeypatch.setattr("sys.argv", command)
    monkeypatch.chdir(ROOT)
    preparing.main()
    (size,) = json.loads(record.read_text())["sizes"].values()
    mine, theirs = size["fedbert_jax"], size["datasets.map"]
    # Ours lack half a block for each client and what is held out, and what of the repetitions is the same.
    assert 0.8 < mine["tokens"] / theirs["tokens"] < 1.05 and mine["tokens"] > 100_000
    assert all(side["seconds"] > 0.5 and side["memory_bytes"] > 50e6 for side in (mine, theirs))
    assert "tokens a second" in capsys.readouterr().out


def test_the_text_that_is_prepared_has_its_size_and_no_repetition(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    rows = preparing.write_text([f"{'one two three four five six ' * 10}{n}" for n in range(20)], 1, path)
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(found) == rows and 1_000_000 <= path.stat().st_size < 1_001_000
    assert len({row["text"] for row in found}) > 0.99 * rows
    assert {row["client"] for row in found} == {f"client-{n:03d}" for n in range(100)}


# --- rows in a secret order ---


def test_rows_in_a_secret_order_are_put_at_their_places() -> None:
    """Words are four times as large as places, which hides these unless words are grouped first."""
    rng = np.random.default_rng(0)
    words, at = 4 * rng.normal(size=(60, 32)), rng.normal(size=(12, 32))
    spelt = rng.choice(60, (200, 12), p=np.arange(60, 0, -1) / 1830)
    normal = lambda x: x / x.std(axis=-1, keepdims=True)  # noqa: E731
    h, marks = normal(words[spelt] + at), normal(words[0] + at)
    order = rng.permuted(np.broadcast_to(np.arange(12), (200, 12)), axis=1)
    found = permutation.places(np.take_along_axis(h, order[..., None], axis=1), marks)
    assert np.mean(found == order) > 0.9
    assert (np.sort(found, axis=1) == np.arange(12)).all()  # each place once


def test_arms_take_turns_and_the_middle_round_counts(monkeypatch, capsys):
    """Of each pass the median of the rounds from the fourth on, for 2,048 tokens; of the passes their median."""
    ran = []

    def run(command, **_):
        workdir = Path(command[command.index("--workdir") + 1])
        arm, nth = "deep" if "--config.model.client_layers=1" in command else "demo", len(ran)
        ran.append(arm)
        seconds = [9, 9, 9, 0.4 + nth, 0.2 + nth, 0.3 + nth]
        lines = [{"round": 0, "eval_loss": 8.0}]
        lines += [{"round": n, "tokens": 4096 * n, "seconds": x} for n, x in enumerate(seconds, 1)]
        workdir.mkdir()
        (workdir / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        assert {"--config.seed=0", "--config.federated.rounds=6", "--config.x=1"} <= set(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(steps.subprocess, "run", run)
    steps.main(["defences", "--arms", "demo,deep", "--rounds", "6", "--config.x=1"])
    assert ran == ["demo", "deep", "deep", "demo", "demo", "deep"]
    said = capsys.readouterr().out
    assert "| demo | 1650.0 | 150.0, 1650.0, 2150.0 |" in said and "| deep | 1150.0 | 650.0, 1150.0, 2650.0 |" in said
    monkeypatch.setattr(steps.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 2))
    with pytest.raises(SystemExit, match=r"^2$"):
        steps.main(["defences", "--arms", "demo"])
    with pytest.raises(SystemExit, match=r"^2$"):
        steps.main(["defences", "--seeds=2"])
    assert "--seeds=2: accepted: the options above and --config.KEY=VALUE" in capsys.readouterr().err


def test_groups_called_by_their_commonest_words():
    """Two of three rows of one group, and one of two of the other, are right."""
    assert limits.named(np.array([0, 1, 1, 0, 0]), np.array([7, 7, 3, 7, 4])) == 3 / 5

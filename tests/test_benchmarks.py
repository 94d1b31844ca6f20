"""The benchmark commands at their smallest: they run, their results have the documented structure, and JSON holds them."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import clients, finetune, machine, pairs, sizes, step

ROOT = Path(__file__).parents[1]
SMALLEST = sizes.Size(hidden=16, layers=1, heads=2, vocab=128, length=16, clients=3, batch=2)


def shown(show, result):
    stream = io.StringIO()
    show(result, Console(file=stream, width=250))
    return stream.getvalue()


def side(name="a", losses=(4.0, 3.0, 2.0), guess=4.0):
    values = iter(losses)
    return pairs.Side(name, 10, lambda: next(values), guess, guess)


def test_step_compares_jax_with_torch():
    pytest.importorskip("torch")
    rows = [row for row in step.ROWS if row.name in ("parallel/torch split", "parallel/HF, loop over clients")]
    notes: list[str] = []
    result = {
        "benchmark": "step", "machine": machine.facts(1), "settings": {"size": vars(SMALLEST), "samples": 1},
    } | step.measure(SMALLEST, 1, rows, note=notes.append)  # fmt: skip
    result = json.loads(json.dumps(result))
    assert [row["name"] for row in result["rows"]] == [row.name for row in rows]
    assert len(notes) == len(rows)
    for row in result["rows"]:
        assert len(row["ratios"]) == 1 and row["ratio"] == row["ratios"][0] > 0
        assert row["ratio"] == pytest.approx(row["b_ms"] / row["a_ms"])
        assert row["met"] == (row["ratio"] >= row["target"])
    assert len(result["sides"]) == 3  # parallel is built once for both rows
    assert result["machine"]["cores"] == 1 and result["machine"]["versions"]["jax"]
    assert "parallel/torch split" in shown(step.show, result)


def test_torch_split_trains_as_parallel_does():
    """Same text, same optimizer, same averaging: after as many rounds the two losses differ by the draws alone."""
    pytest.importorskip("torch")
    ours, theirs = step.make_side("parallel-8", SMALLEST, False), step.make_side("split", SMALLEST, False)
    while len(theirs.losses) < 6:
        theirs.timed()
    while len(ours.losses) < 6:
        ours.timed()
    assert theirs.losses[-1] < theirs.losses[0] - 0.3  # so that the next line can tell learning from standing still
    assert theirs.losses[-1] == pytest.approx(ours.losses[-1], abs=0.15)


def test_torch_gather_computes_what_hf_computes():
    """Logits at the masked positions alone give the loss that logits everywhere give."""
    torch = pytest.importorskip("torch")
    from benchmarks import torch_sides

    model = torch_sides._model(SMALLEST)
    tokens = torch_sides._blocks(SMALLEST, 1).flatten(0, 2)
    masked, positions, labels = torch_sides._mask(tokens, SMALLEST)
    everywhere = torch.full_like(tokens, -100).scatter_(1, positions, labels)
    z = model.bert(input_ids=masked).last_hidden_state
    gathered = torch_sides._mlm_loss(model.cls, z, positions, labels)
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


def test_quartiles():
    assert pairs.quartiles([3.0]) == (3.0, 3.0)
    assert pairs.quartiles([5.0, 1.0, 2.0, 3.0, 4.0]) == (2.0, 4.0)


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


def test_fine_tuning_starts_both_sides_from_the_same_weights(tmp_path):
    """Same weights, batches and rate: dropout apart, both sides' losses go the same way."""
    pytest.importorskip("torch")
    model = finetune.synthetic_model(tmp_path, hidden=16)
    glue = finetune.synthetic_task(tmp_path / "glue", 8 * 256, longest=12)  # one padded length to compile for
    sides = finetune.make_sides(model, glue, 1, tmp_path)
    row = json.loads(json.dumps(pairs.compare(finetune.ROWS[0], sides["jax"], sides["torch"], 32, samples=2)))
    assert len(row["ratios"]) == 2 and row["target"] == 1.0
    assert sides["jax"].losses[:3] == pytest.approx(sides["torch"].losses[:3], abs=0.03)

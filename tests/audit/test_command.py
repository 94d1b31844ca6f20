"""The audit's command, on runs of a few seconds: rows, files, what is left out, and mistakes in one sentence."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
from corpus import write_corpus
from rich.console import Console
from sentences import make_config, write_glue, write_tokenizer
from test_main import load

from benchmarks import controls
from fedbert_jax import compare
from fedbert_jax.audit import labels
from fedbert_jax.audit.attacks import KINDS
from fedbert_jax.audit.case import Case, Sizes
from fedbert_jax.audit.command import main
from fedbert_jax.audit.public import default_source
from fedbert_jax.audit.source import open_source
from fedbert_jax.errors import ConfigError, UserError
from fedbert_jax.glue.finetune import finetune
from fedbert_jax.report.audits import read_audit, strongest
from fedbert_jax.report.page import write_report
from fedbert_jax.train import train
from fedbert_jax.workdir.paths import Workdir

SMALL = ("--blocks", "12", "--log", "60", "--known_blocks", "3")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("audit"))


@pytest.fixture(scope="module")
def trained(corpus):
    """A run with two checkpoints, whose clients have a secret of their own; and what is public."""
    config = load(corpus, federated__rounds=6, privacy__client_seed=77, model__num_layers=1)
    assert train(config, corpus.parent / "run", Console(quiet=True)) == 0
    (corpus.parent / "public.txt").write_text((corpus.parent / "text" / "client_0" / "all.txt").read_text()[::-1])
    return corpus.parent / "run", f"text:{corpus.parent / 'public.txt'}"


@pytest.fixture(scope="module")
def audited(trained):
    """The run's audit, and what it has printed."""
    workdir, public = trained
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr("rich.console.Console.print", lambda self, *a, **k: said.append(str(a[0]) if a else ""))
        assert main([str(workdir), "--public", public, *SMALL, "--markdown"]) == 0
    return workdir, json.loads((workdir / "audit" / "audit.json").read_text()), "\n".join(said)


def arrays(x):
    """Every array that can be reached from a view."""
    if dataclasses.is_dataclass(x):
        names = [f.name for f in dataclasses.fields(x)] + [n for n, p in vars(type(x)).items() if hasattr(p, "func")]
        for name in names:
            yield from arrays(getattr(x, name))
    elif isinstance(x, (tuple, list)):
        for one in x:
            yield from arrays(one)
    elif isinstance(x, dict):
        yield from arrays(list(x.values()))
    elif isinstance(x, np.ndarray) and x.ndim >= 1:
        yield x


def test_no_view_holds_a_block_or_the_labels_of_what_is_attacked(trained):
    workdir, public = trained
    case = Case(open_source(workdir, None, {}), Sizes(12, 60, 3), public, print)
    truth = case.replay.truth

    def rows(x):
        return {row.astype(np.int64).tobytes() for row in x.reshape(-1, x.shape[-1]) if np.issubdtype(x.dtype, np.number)}

    hidden = rows(truth.tokens) | rows(truth.original) | rows(truth.labels)
    assert len(hidden) > 24
    for kind in KINDS:
        facts = case.granted(kind)
        if not isinstance(facts, str):
            view = dataclasses.replace(case.view, **facts)
            seen = set().union(*map(rows, arrays(view)))
            assert len(seen) > 100 and not seen & hidden, kind
    assert hidden <= set().union(*map(rows, arrays(dataclasses.replace(case.view, known=truth))))  # what would be found


def test_every_row_says_what_it_is_of_and_what_guessing_gives(audited):
    workdir, rows, said = audited
    by = {(row["knows"], row["attack"]): row for row in rows}
    asked = {"knows", "attack", "top1", "top5", "low", "high", "bits_per_token", "floor_random", "floor_unigram", "seconds"}
    assert all(asked <= row.keys() and row["round"] == 6 for row in rows)
    assert by["segment", "nearest"]["top1"] == 1.0 == by["segment", "nearest"]["exact"]
    assert by["segment", "gradient"]["top1"] > 0.98 and by["segment", "gradient"]["of"] == "labels"
    assert by["old_segment", "nearest"]["top1"] > 0.95
    # The server has the seed, and not the clients' secret.
    assert by["seed", "nearest"]["top1"] < 0.05 and by["seed", "likeness"]["top1"] < 0.05
    words = [row for row in rows if row["of"] == "words"]
    assert {row["attack"] for row in words} == {
        f"words by {seen}" for seen in ("move", "difference", "direction", "moments")
    }
    assert all(row["top1"] is None and 0 <= row["low"] <= row["auc"] <= row["high"] <= 1 for row in words)
    assert by["public_text", "cipher"]["floor_unigram"] == by["segment", "nearest"]["floor_unigram"] > 0
    for left_out in ("checkpoint: left out, since training began with random numbers", "neighbour: left out"):
        assert left_out in said
    assert (
        "strongest: segment 100.0 % of tokens (nearest)" in said and (workdir / "audit" / "audit.png").stat().st_size > 5000
    )
    assert "12 blocks of 3 clients" in said and "weak" in said
    assert "aggregator: the learning rate of this round is 0.0% of its peak; moves tell more where it is higher" in said


def test_the_log_lies_before_the_round_and_known_text_is_not_what_is_read(trained):
    source = open_source(trained[0], 3, {})
    assert source.replayed == 3 and source.before == (2, 1, 0) and 0.1 < source.rate() < 1
    case = Case(source, Sizes(blocks=12, log=60, known=20), "", print)
    messages, truth = case.log
    assert len(truth.tokens) == 36  # three rounds of twelve
    again = np.arange(0, 36, 3)
    case.replay = case.replay._replace(truth=truth.pick(again))  # as if blocks of the log were those attacked
    known = case.granted("known_text")["known"]
    places = [n for n, h in enumerate(messages.h) if (h == known.h).all(axis=(1, 2)).any()]
    assert len(places) == 20 and not set(places) & set(again.tolist())
    assert len(set(messages.client[places].tolist())) == 3  # spread over the log


def test_answers_are_of_blocks_of_the_round_that_are_not_attacked(trained):
    case = Case(open_source(trained[0], 3, {}), Sizes(blocks=6, log=60, known=3), "", print)
    answers, others = case.granted("known_text")["answers"], case.view.others
    assert len(others.h) == 6 and len(answers.rows) == 3  # of twelve
    np.testing.assert_array_equal(others.h[answers.rows], answers.blocks.h)
    read = case.replay
    assert not (others.dz[:, None] == read.messages.dz[None]).all(axis=(2, 3)).any()
    assert not {x.tobytes() for x in answers.labels} & {x.tobytes() for x in read.truth.labels}
    # They are the labels that the round had: with the segment, the gradient of these blocks gives them, too.
    found = labels.read_labels(case.view.public.segments, case.granted("segment")["segment"], others.z, others.dz)
    assert (found[answers.rows][..., 0] == answers.labels).mean() > 0.98


def test_how_gradients_are_blurred_is_public(trained):
    source = open_source(trained[0], None, {"wire.gradient_clip": 0.5, "wire.gradient_noise": 0.25})
    public = Case(source, Sizes(12, 60, 3), "", print).view.public
    assert (public.gradient_clip, public.gradient_noise) == (0.5, 0.25)


@pytest.mark.slow
def test_the_same_numbers_when_repeated(audited, trained, tmp_path):
    workdir, public = trained
    assert main([str(workdir), "--public", public, *SMALL, "--out", str(tmp_path), "--json", str(tmp_path / "x")]) == 0
    without = lambda rows: [{k: v for k, v in row.items() if k != "seconds"} for row in rows]  # noqa: E731
    again = json.loads((tmp_path / "x").read_text())
    assert without(again) == without(audited[1])


@pytest.mark.slow
def test_what_is_supposed_stays_apart(audited, capsys):
    workdir, rows, _ = audited
    assert main([str(workdir), "--knows", "segment", "--config.wire.noise=3", "--attacks", "nearest", *SMALL]) == 0
    assert read_audit(workdir) == rows
    (noisy,) = json.loads((workdir / "audit/knows=segment/attacks=nearest/wire.noise=3.0/audit.json").read_text())
    assert noisy["top1"] < 0.9 and "supposing wire.noise=3.0" in capsys.readouterr().out
    assert main([str(workdir), "--knows", "segment", "--config.wire.gradient_noise=0.004", *SMALL]) == 0
    hazy = json.loads((workdir / "audit/knows=segment/wire.gradient_noise=0.004/audit.json").read_text())
    read = {row["attack"]: row["top1"] for row in hazy if row["of"] == "labels"}
    clear = {row["attack"]: row["top1"] for row in rows if row["of"] == "labels" and row["knows"] == "segment"}
    assert clear.keys() == {"gradient"} and read.keys() == {"gradient", "gradient and model"}
    assert 0.1 < max(read.values()) < clear["gradient"]


@pytest.mark.parametrize("content", ["5", "[5]", '[{"knows": "x", "attack": "y", "of": "z", "top1": "abc"}]', "{"])
def test_a_damaged_audit_is_no_audit(content, tmp_path):
    (tmp_path / "audit").mkdir()
    (tmp_path / "audit" / "audit.json").write_text(content)
    assert read_audit(tmp_path) == []


@pytest.mark.slow
def test_a_seed_that_everybody_knows_reads_the_text_and_all_hidden_states_are_read_too(corpus, tmp_path, capsys):
    """A run without a secret of the clients', to whom all hidden states come back. Other seeds and blocks give nothing."""
    config = load(corpus, federated__rounds=6, wire__downlink="all", model__num_layers=1)
    assert train(config, tmp_path, Console(quiet=True)) == 0
    assert (
        main(
            [str(tmp_path), "--knows", "seed,segment", "--attacks", "nearest,gradient", "--out", f"{tmp_path}/audit", *SMALL]
        )
        == 0
    )
    by = {(row["knows"], row["attack"]): row for row in read_audit(tmp_path)}
    assert by["seed", "nearest"]["top1"] > 0.8
    labels = by["segment", "gradient"]
    assert labels["top1"] > 0.98 and labels["of"] == "labels" and labels["given"] == {
        "blocks": 12, "log": 60, "known_blocks": 3, "public": "", "divergence": None,
    }  # fmt: skip
    assert "the noise follows from it" not in " ".join(capsys.readouterr().out.split())
    noisy = ["--config.wire.gradient_noise=0.1", "--knows", "seed", "--attacks", "gradient"]
    assert main([str(tmp_path), "--out", f"{tmp_path}/noisy", *noisy, *SMALL]) == 0
    assert "seed: the noise follows from it, too" in " ".join(capsys.readouterr().out.split())
    controls.main([str(tmp_path), "--blocks", "12", "--log", "60"])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| the ")]
    shares = [float(row[2].rstrip("%")) for row in rows]
    assert min(shares[0:2]) > 80 and max(shares[2:8]) < 5 and shares[8] == 100 and shares[9] < 20 and len(rows) == 10


def test_a_report_and_a_comparison_have_it(audited, tmp_path, capsys):
    workdir, rows, _ = audited
    page = write_report(workdir).read_text()
    assert "Read off what crossed" in page and "old segment" in page
    other = shutil.copytree(workdir, tmp_path / "other", ignore=shutil.ignore_patterns("audit"))
    assert compare.main([str(workdir), "--json", str(tmp_path / "c.json"), "--markdown"]) == 0
    printed = capsys.readouterr().out
    assert "segment, tokens" in printed and "bytes a token" in printed and "1 of 1" in printed
    (found,) = json.loads((tmp_path / "c.json").read_text())["audits"]
    assert found["runs"] == [list(strongest(rows).values())]
    best = strongest(rows)["seed", "tokens"]
    assert best["top1"] == max(row["top1"] for row in rows if row["knows"] == "seed")
    assert compare.main([str(other)]) == 0
    assert "segment" not in capsys.readouterr().out
    assert "Read off what crossed" not in write_report(other).read_text()


@pytest.mark.slow
def test_a_fine_tuned_task_is_read_too(tmp_path_factory, tmp_path, capsys):
    tokenizer, glue = (write(tmp_path_factory.mktemp("glue")) for write in (write_tokenizer, write_glue))
    config = make_config(
        tokenizer,
        glue,
        federated=dict(strategy="parallel", num_clients=2, batch_size=4),
        data=dict(partition=dict(kind="iid")),
        finetune=dict(epochs=1.0),
    )
    assert finetune(config, tmp_path, Console(quiet=True)) == 0
    assert main([str(tmp_path), "--knows", "segment,known_text,old_segment,seed", "--out", f"{tmp_path}/audit", *SMALL]) == 0
    rounds = read_audit(tmp_path)[0]["round"]
    assert f"the text of round {rounds - 1} once more, by the model as it is after round {rounds}" in capsys.readouterr().out
    by = {(row["knows"], row["attack"]): row for row in read_audit(tmp_path)}
    assert by["segment", "nearest"]["exact"] == 1.0 and by["segment", "gradient"]["top1"] > 0.9
    assert by["segment", "gradient"]["floor_unigram"] >= 0.5 and by["seed", "nearest"]["top1"] > 0.5
    with pytest.raises(UserError, match="--round 3: accepted with a fine-tuned task: none"):
        main([str(tmp_path), "--round", "3"])


@pytest.mark.parametrize(
    "given, said",
    [
        (["--knows", "nothing"], "--knows nothing: accepted: segment, old_segment"),
        (["--attacks", "x"], "--attacks x: accepted: nearest"),
        (["--blocks", "0"], "--blocks 0: accepted: at least 1"),
        (["--round", "5"], "--round 5: there is no such checkpoint; accepted: 3, 6"),
        (["--config.model.preset=base"], "--config.model.preset=base: accepted: --config.wire.codec=VALUE"),
        (["--config.wire.noise=-1"], "wire.noise=-1"),
        (["--knows", "neighbour"], "no attack fits"),
        (["--public", "text:/nowhere"], "/nowhere"),
        (["--public", "own"], "less than a block of 16 tokens is left without what the run has, too"),
        (["--out", "file"], "is no directory; give another place"),
    ],
)
def test_a_mistake_is_one_sentence(given, said, trained, corpus, tmp_path):
    (tmp_path / "file").touch()
    places = {"own": f"text:{corpus.parent / 'text' / 'client_0' / 'all.txt'}", "file": str(tmp_path / "file")}
    given = [places.get(word, word) for word in given]
    with pytest.raises((UserError, ConfigError)) as error:
        main([str(trained[0]), *given])
    assert said in str(error.value) and "\n" not in str(error.value)


def test_runs_in_which_nothing_crosses_are_refused(corpus, tmp_path):
    with pytest.raises(UserError, match=r"config\.json"):
        main([str(tmp_path)])
    (tmp_path / "run").mkdir()
    Workdir(tmp_path / "run").write_config(load(corpus, federated__strategy="centralized", federated__rounds=1))
    with pytest.raises(UserError, match="in which no activations cross"):
        main([str(tmp_path / "run")])


def test_public_text_of_a_run_on_docstrings_is_that_of_other_packages():
    from fedbert_jax.config import from_dict

    source = default_source(from_dict({"data": {"source": "docs:numpy,optax"}, "federated": {"rounds": 1}}))
    assert source.startswith("docs:") and "optax" not in source and "sklearn" in source
    assert default_source(from_dict({"data": {"source": "text:x"}, "federated": {"rounds": 1}})) == ""

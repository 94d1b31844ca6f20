"""Runs are grouped by config, ordered by their final loss, and warned of if they can't be compared."""

from __future__ import annotations

import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

import pytest

from fedbert_jax import compare
from fedbert_jax.config import from_dict, to_dict
from fedbert_jax.errors import UserError
from fedbert_jax.report import compare_plot, comparison
from fedbert_jax.report.plots import to_png
from fedbert_jax.workdir.log import MetricsLog, to_json


def make_workdir(
    path: Path,
    loss: float = 5.0,
    seed: int = 0,
    rounds: int = 10,
    sends: int = 1000,
    baselines: tuple[float, float] = (5.89, 0.062),
    evaluates: bool = True,
    **config: Any,
) -> Path:
    """Writes a run whose held-out loss falls from 8 to `loss`."""
    path.mkdir(parents=True, exist_ok=True)
    values = {"seed": seed, **config}
    values["federated"] = {"num_clients": 4, "rounds": 10} | values.get("federated", {})
    (path / "config.json").write_text(to_json(to_dict(from_dict(values))))
    with MetricsLog(path / "metrics.jsonl") as log:
        for n in range(rounds + 1):
            record: dict[str, Any] = {"round": n, "tokens": 1000 * n}
            if n:
                record |= {"seconds": 2.0, "uplink_bytes": sends * n, "downlink_bytes": sends * n}
            if evaluates:
                now = loss + (8 - loss) * (1 - n / rounds)
                record |= {"eval_loss": now, "eval_accuracy": 0.01 * n}
                record |= {"eval_loss_by_text": now, "eval_accuracy_by_text": 0.01 * n, "eval_clients_scored": 4}
                record |= {"eval_loss_over_clients": now + 0.25, "eval_accuracy_over_clients": 0.005 * n}
            log.append(record)
    facts = {"baselines": {"unigram_loss": baselines[0], "commonest_accuracy": baselines[1]}}
    (path / "run.json").write_text(to_json(facts))
    return path


def load(*paths: Path) -> list[comparison.Group]:
    return comparison.load_groups(paths)


def test_runs_that_differ_only_in_seed_share_a_row(tmp_path: Path) -> None:
    losses = (5.0, 5.2, 5.5)
    paths = [make_workdir(tmp_path / f"pooled_seed{s}", loss, seed=s) for s, loss in enumerate(losses)]
    paths.append(make_workdir(tmp_path / "private", 5.1, federated={"body": "private"}))
    private, pooled = load(*paths)
    assert (private.label, len(private.runs), pooled.label, len(pooled.runs)) == ("private", 1, "pooled", 3)
    assert pooled.remarks == ("3 seeds",) and private.settings == {"federated.body": "private"}
    summary = comparison.summarize(pooled, "final_eval_loss")
    assert summary.mean == pytest.approx(statistics.mean(losses)) and summary.sd == pytest.approx(statistics.stdev(losses))
    assert comparison.summarize(private, "final_eval_loss").sd is None
    assert comparison.warn([private, pooled]) == []


def test_what_is_averaged_sets_runs_apart_and_is_told_with_the_strategy(tmp_path: Path) -> None:
    paths = [make_workdir(tmp_path / "a", 5.0, federated={"average": "gradients"}), make_workdir(tmp_path / "b", 5.1)]
    gradients, parameters = load(*paths)
    assert gradients.settings == {"federated.average": "gradients"} and gradients.remarks == parameters.remarks == ()
    rows = comparison.to_markdown([gradients, parameters]).splitlines()[2:]
    assert rows[0].startswith("| a | parallel (gradients averaged) | 5.000 |")
    assert rows[1].startswith("| b | parallel (pooled body) | 5.100 |")
    written = comparison.to_dict([gradients, parameters])["groups"]
    assert [group["average"] for group in written] == ["gradients", "parameters"]


def test_where_and_how_often_a_run_saves_sets_nobody_apart(tmp_path: Path) -> None:
    a = make_workdir(tmp_path / "a0", seed=0, checkpoint={"every_rounds": 7})
    b = make_workdir(tmp_path / "a1", seed=1, resume="force", data={"cache_dir": "/elsewhere"})
    (group,) = load(a, b)
    assert group.label == "a"


def test_any_other_key_sets_a_run_apart_and_is_told(tmp_path: Path) -> None:
    a = make_workdir(tmp_path / "a", 5.0, federated={"local_steps": 1})
    b = make_workdir(tmp_path / "b", 5.1)
    c = make_workdir(tmp_path / "c", 5.2, wire={"codec": "bfloat16"})
    names = [group.name for group in load(a, b, c)]
    assert names == ["a (local_steps=1)", "b", "c (codec=bfloat16)"]


def test_the_lowest_final_loss_comes_first_and_what_has_none_last(tmp_path: Path) -> None:
    diverged = make_workdir(tmp_path / "nan", math.nan, federated={"local_steps": 1})
    silent = make_workdir(tmp_path / "none", evaluates=False, federated={"local_steps": 2})
    worse = make_workdir(tmp_path / "worse", 5.5, federated={"local_steps": 3})
    better = make_workdir(tmp_path / "better", 4.5, federated={"local_steps": 5})
    assert [group.label for group in load(diverged, worse, silent, better)] == ["better", "worse", "nan", "none"]


def test_one_diverged_seed_is_not_averaged_away(tmp_path: Path) -> None:
    paths = [make_workdir(tmp_path / f"r{s}", loss, seed=s) for s, loss in enumerate((5.0, math.nan))]
    (group,) = load(*paths)
    summary = comparison.summarize(group, "final_eval_loss")
    assert summary.mean is not None and math.isnan(summary.mean)
    assert "not finite" in comparison.to_markdown([group])


def test_one_seed_without_an_evaluation_leaves_the_mean_open(tmp_path: Path) -> None:
    (group,) = load(make_workdir(tmp_path / "r0"), make_workdir(tmp_path / "r1", seed=1, evaluates=False))
    assert comparison.summarize(group, "final_eval_loss") == comparison.Summary(None, None, (5.0, None))


@pytest.mark.parametrize(
    "other, word",
    [
        ({"rounds": 8}, "budgets"),
        ({"data": {"source": "docs:numpy"}}, "data.source"),
        ({"data": {"tokenizer": "train:512"}}, "data.tokenizer"),
        ({"data": {"seq_len": 64}}, "data.seq_len"),
        ({"mlm": {"mask_prob": 0.3}}, "mlm.mask_prob"),
        ({"baselines": (5.90, 0.062)}, "baselines"),
        ({"baselines": (6.90, 0.062), "seed": 1}, "baselines"),
    ],
)
def test_runs_that_are_not_comparable_are_warned_of(tmp_path: Path, other: dict[str, Any], word: str) -> None:
    a = make_workdir(tmp_path / "a", federated={"local_steps": 1})
    (sentence,) = comparison.warn(load(a, make_workdir(tmp_path / "b", **other)))
    assert word in sentence


def test_another_seed_may_hold_out_slightly_other_text(tmp_path: Path) -> None:
    a = make_workdir(tmp_path / "a")
    assert comparison.warn(load(a, make_workdir(tmp_path / "b", seed=1, baselines=(5.93, 0.064)))) == []


def test_the_same_seed_twice_is_no_second_sample(tmp_path: Path) -> None:
    groups = load(make_workdir(tmp_path / "a1"), make_workdir(tmp_path / "a2"))
    assert groups[0].remarks == ("2 runs, seeds repeat",)
    (sentence,) = comparison.warn(groups)
    assert "same seed" in sentence


def test_labels_tell_equal_names_apart(tmp_path: Path) -> None:
    a = make_workdir(tmp_path / "x" / "run", 5.0)
    b = make_workdir(tmp_path / "y" / "run", 5.1, federated={"local_steps": 1})
    c = [make_workdir(tmp_path / "z" / str(s), 5.2, seed=s, federated={"local_steps": 2}) for s in range(2)]
    assert [group.label for group in load(a, b, *c, a)] == ["x/run", "y/run", "z"]


def test_the_command_prints_the_table_and_writes_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [make_workdir(tmp_path / f"pooled[b]_seed{s}", 5 + s, seed=s) for s in range(2)]
    paths.append(make_workdir(tmp_path / "a|b", 4.0, sends=0, federated={"strategy": "centralized"}))
    out = tmp_path / "out"
    arguments = [*map(str, paths), "--out", str(out), "--json", str(tmp_path / "x.json")]
    assert compare.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "pooled[b]" in printed and "± 0.707" in printed and printed.index("a|b") < printed.index("pooled")
    assert (out / "compare.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    written = json.loads((out / "compare.json").read_text())
    assert written == json.loads((tmp_path / "x.json").read_text())
    assert [group["label"] for group in written["groups"]] == ["a|b", "pooled[b]"]
    assert written["groups"][1]["final_eval_loss"]["values"] == [5.0, 6.0]
    assert written["groups"][1]["seeds"] == [0, 1] and written["groups"][1]["uplink_bytes"]["mean"] == 10_000

    assert compare.main([*map(str, paths), "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[2].startswith(r"| a\|b | centralized | 4.000 |")
    assert lines[3].startswith("| pooled[b] (2 seeds) | parallel (pooled body) | 5.500 ± 0.707 |")
    assert lines[0].startswith("| run | strategy | loss by text |")
    assert {line.count(" | ") for line in lines[:4]} == {lines[0].count(" | ")}


def test_json_has_null_for_what_is_not_finite(tmp_path: Path) -> None:
    path = make_workdir(tmp_path / "a", math.nan)
    assert compare.main([str(path), "--out", str(tmp_path)]) == 0
    text = (tmp_path / "compare.json").read_text()
    assert "NaN" not in text and json.loads(text)["groups"][0]["final_eval_loss"]["mean"] is None


def test_warnings_are_printed_in_both_forms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(make_workdir(tmp_path / "a")), str(make_workdir(tmp_path / "b", rounds=5, seed=1))]
    for flags in ([], ["--markdown"]):
        assert compare.main([*paths, *flags]) == 0
        assert "Warning: The runs' budgets differ, from 5 k to 10 k tokens" in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, "empty", "no metrics"])
def test_a_directory_that_is_no_run_is_one_sentence_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None
) -> None:
    good, bad = make_workdir(tmp_path / "good"), tmp_path / "bad"
    if content:
        bad.mkdir()
    if content == "no metrics":
        (bad / "config.json").write_text("{}")
    with pytest.raises(UserError, match=re.escape(str(bad))):
        compare.main([str(good), str(bad)])
    assert capsys.readouterr().out == ""
    assert UserError.exit_code == 2


def test_without_a_directory_the_command_says_how_it_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"arguments are required: DIR; `.*compare --help` lists the arguments"):
        compare.main([])
    assert capsys.readouterr() == ("", "")


def test_the_plot_draws_a_line_a_group_in_a_band_over_seeds(tmp_path: Path) -> None:
    paths = [make_workdir(tmp_path / f"a{s}", 5 + s, seed=s) for s in range(3)]
    paths.append(make_workdir(tmp_path / "b", 4.0, sends=0, federated={"strategy": "local"}))
    left, right = compare_plot.draw(load(*paths)).axes
    assert [line.get_label() for line in left.get_lines()] == ["b", "a (3 seeds)"]
    assert left.get_lines()[1].get_ydata()[-1] == pytest.approx(6.0) and len(left.collections) == 1
    silent, sending = right.get_lines()
    assert set(silent.get_ydata()) == {4.0} and sending.get_xdata()[-1] == pytest.approx(20.0)  # kB
    assert "kB" in right.get_xlabel()


def test_where_nobody_sends_anything_the_plot_is_against_time(tmp_path: Path) -> None:
    path = make_workdir(tmp_path / "a", sends=0)
    _, right = compare_plot.draw(load(path)).axes
    assert "time" in right.get_xlabel() and right.get_lines()[0].get_xdata()[-1] == pytest.approx(20 / 60)


@pytest.mark.parametrize("options", [{"evaluates": False}, {"rounds": 1}, {"loss": math.nan}])
def test_runs_with_little_to_draw_are_drawn(tmp_path: Path, options: dict[str, Any]) -> None:
    compare_plot.write(load(make_workdir(tmp_path / "a", **options)), tmp_path / "out")
    assert (tmp_path / "out" / "compare.png").stat().st_size > 1000


def test_the_first_point_is_there_where_bytes_are_on_a_logarithmic_axis(tmp_path: Path) -> None:
    paths = [make_workdir(tmp_path / "a", 5.0, sends=10, rounds=4)]
    paths.append(make_workdir(tmp_path / "b", 5.0, sends=9000, rounds=4, federated={"local_steps": 1}))
    left, right = compare_plot.draw(load(*paths)).axes
    assert right.get_xscale() == "symlog" and right.get_xlim()[0] < 0
    for line in right.get_lines():
        assert line.get_xdata()[0] == 0 and len(line.get_xdata()) == 5
        assert right.transData.transform((0, 6.0))[0] < right.transData.transform((line.get_xdata()[1], 6.0))[0] - 10
    # The start, at 8, lies above the axes' range, so it is marked at their edge.
    assert left.get_ylim()[1] < 8
    for axes in (left, right):
        assert [text.get_text() for text in axes.texts] == ["▲", "▲", "▲ first point, at 8.00"]


def test_legends_are_whole_whatever_the_names(tmp_path: Path) -> None:
    config = {"client_optimizer": {"learning_rate": 1e-4, "warmup_steps": 77, "b2": 0.98}, "mlm": {"mask_prob": 0.2}}
    paths = [
        make_workdir(tmp_path / "a"),
        make_workdir(tmp_path / ("long " * 40), **config),
        make_workdir(tmp_path / ("$" * 200), federated={"local_steps": 3}),
        make_workdir(tmp_path / "_[b]_caf\udce9", wire={"codec": "bfloat16"}),
    ]
    figure = compare_plot.draw(load(*paths))
    assert to_png(figure)
    (legend,) = figure.legends
    box, canvas = legend.get_window_extent(), figure.bbox
    assert min(box.x0, box.y0) >= 0 and box.x1 <= canvas.x1 and box.y1 <= canvas.y1
    assert min(axes.get_window_extent().height for axes in figure.axes) > 2.9 * figure.dpi  # and leaves the plots room
    names = [text.get_text().replace("\n", " ") for text in legend.get_texts()]
    assert len(names) == 4 and any("mask_prob=0.2" in name for name in names)
    assert not any("…" in name for name in names) and any("$" * 3 in name.replace("\\$", "$") for name in names)


def test_a_workdirs_name_is_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_workdir(tmp_path / "[red]a$_{x}$<b>:smile:*caf\udce9")
    assert compare.main([str(path)]) == 0
    assert "[red]a$_{x}$<b>:smile:*caf\\xe9  parallel" in capsys.readouterr().out
    assert compare.main([str(path), "--markdown"]) == 0
    assert r"| [red]a\$\_{x}\$\<b\>:smile:\*caf\\xe9 |" in capsys.readouterr().out
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match=r"taken can't be written"):
        compare.main([str(path), "--out", str(tmp_path / "taken")])


def test_epsilon_has_a_column_where_a_run_has_one(tmp_path: Path) -> None:
    plain, noised = make_workdir(tmp_path / "plain"), make_workdir(tmp_path / "noised", 6.0, aggregator={"momentum": 0.5})
    assert "epsilon" not in comparison.to_markdown(load(plain, noised))
    with MetricsLog(noised / "metrics.jsonl") as log:
        log.append({"round": 11, "tokens": 11_000, "dp_epsilon": 3.25})
    header, _, first, second = comparison.to_markdown(load(plain, noised)).splitlines()
    assert [line.split(" | ")[-1] for line in (header, first, second)] == ["epsilon |", "– |", "3.250 |"]
    assert comparison.to_dict(load(noised))["groups"][0]["dp_epsilon"]["mean"] == 3.25

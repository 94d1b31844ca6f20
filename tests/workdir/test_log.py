"""metrics.jsonl survives being killed, and comes back with the numbers that went in."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from fedbert_jax.errors import UserError
from fedbert_jax.report.runs import load_run, quantity
from fedbert_jax.workdir import log
from fedbert_jax.workdir.log import MetricsLog, read_metrics, to_json, truncate


def write_rounds(path: Path, rounds: range) -> None:
    with MetricsLog(path) as log:
        for n in rounds:
            log.append({"round": n, "train_loss": 1 / 3 / (n + 1)})


def test_floats_come_back_to_the_bit(tmp_path: Path) -> None:
    values = [0.1 + 0.2, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0]
    single = np.float32(0.1)
    with MetricsLog(tmp_path / "m.jsonl") as log:
        log.append({"round": np.int64(1), "list": values, "array": np.array(values), "single": single})
    (record,) = read_metrics(tmp_path / "m.jsonl")
    assert record["round"] == 1
    assert [v.hex() for v in record["list"]] == [v.hex() for v in values] == [v.hex() for v in record["array"]]
    assert np.float32(record["single"]) == single


def test_jax_and_bfloat16_scalars_become_numbers() -> None:
    jnp = pytest.importorskip("jax.numpy")
    record = {"loss": jnp.float32(1.5), "half": jnp.bfloat16(2.5), "round": jnp.int32(3)}
    assert json.loads(to_json(record)) == {"loss": 1.5, "half": 2.5, "round": 3}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), np.float32("nan")])
def test_what_is_not_finite_is_null(tmp_path: Path, bad: float) -> None:
    with MetricsLog(tmp_path / "m.jsonl") as log:
        log.append({"round": 1, "eval_loss": bad, "eval_clients": {"a": {"loss": bad}}})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    record = json.loads((tmp_path / "m.jsonl").read_text(), parse_constant=refuse)
    assert record == {"round": 1, "eval_loss": None, "eval_clients": {"a": {"loss": None}}}


def test_each_line_can_be_read_as_soon_as_it_is_appended(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "m.jsonl") as log:
        for n in range(3):
            log.append({"round": n})
            assert [record["round"] for record in read_metrics(tmp_path / "m.jsonl")] == list(range(n + 1))


def test_torn_at_every_byte_the_whole_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write_rounds(path, range(3))
    whole = path.read_bytes()
    ends = [i for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        assert len(read_metrics(path)) == sum(end <= cut for end in ends)  # a line is whole even without its newline


def test_a_log_opened_on_a_torn_line_goes_on_with_whole_ones(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write_rounds(path, range(3))
    path.write_bytes(path.read_bytes()[:-7])
    write_rounds(path, range(2, 4))
    assert [record["round"] for record in read_metrics(path)] == [0, 1, 2, 3]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"round": 0}\n{"rou\n{"round": 2}\n')
    with pytest.raises(UserError, match="line 2"):
        read_metrics(path)


def test_truncate_keeps_the_bytes_of_earlier_rounds_and_no_others(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write_rounds(path, range(6))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines)[:-4])  # round 5 is torn
    truncate(path, 3)
    assert path.read_bytes() == b"".join(lines[:4])
    truncate(path, 3)
    assert path.read_bytes() == b"".join(lines[:4])
    assert os.listdir(tmp_path) == ["m.jsonl"]


def test_truncate_drops_a_torn_line_even_when_it_keeps_all_rounds(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write_rounds(path, range(2))
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"round": 2, "tra')
    truncate(path, 100)
    assert path.read_bytes() == whole


def test_killed_before_the_rename_truncate_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.jsonl"
    write_rounds(path, range(4))
    before = path.read_bytes()
    synced: list[int] = []

    def killed(source: Path, target: Path) -> None:
        assert source.read_bytes() == before[: len(source.read_bytes())] and synced  # complete and on the disk by now
        raise KeyboardInterrupt

    monkeypatch.setattr(log.os, "fsync", synced.append)
    monkeypatch.setattr(log.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        truncate(path, 1)
    assert path.read_bytes() == before


def test_truncate_without_a_file_makes_none(tmp_path: Path) -> None:
    truncate(tmp_path / "m.jsonl", 3)
    assert not list(tmp_path.iterdir())


def test_a_run_reads_its_series_and_fills_in_keys_of_later_versions(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"seed": 3, "federated": {"rounds": 7}}')
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.append({"round": 0, "tokens": 0, "eval_loss": 8.0})
        log.append({"round": 1, "tokens": 10, "train_loss": 7.0, "seconds": 2.0})
        log.append({"round": 2, "tokens": 20, "eval_loss": 5.0, "seconds": 3.0, "uplink_bytes": 4, "downlink_bytes": 5})
        log.append({"round": 3, "tokens": 30, "eval_loss": float("nan"), "uplink_bytes": 6, "downlink_bytes": 7})
    run = load_run(tmp_path)
    assert run.config["federated.rounds"] == 7 and run.config["federated.strategy"] == "parallel"
    x, y = run.series("eval_loss")
    np.testing.assert_array_equal(x, [0, 20, 30])
    np.testing.assert_array_equal(y, [8.0, 5.0, np.nan])
    assert run.best("eval_loss") == 5.0 and np.isnan(run.final("eval_loss") or 0.0)
    assert run.final("eval_accuracy") is None and run.best("eval_accuracy") is None
    assert (run.rounds, run.tokens, run.seconds, run.bytes) == (3, 30, 5.0, 13)
    assert run.facts == {}


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "not a workdir"),
        ({"config.json": "{}"}, "no metrics yet"),
        ({"config.json": "{}", "metrics.jsonl": '{"rou'}, "no metrics yet"),
        ({"config.json": "{", "metrics.jsonl": '{"round": 0}\n'}, "not valid JSON"),
        ({"config.json": "{}", "metrics.jsonl": '{"round": 0}\n', "run.json": "[]"}, "not a JSON object"),
    ],
)
def test_what_is_no_run_is_refused_in_one_sentence(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as error:
        load_run(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "value, text",
    [
        (None, "–"),
        (0, "0"),
        (7.5, "7.5"),
        (999, "999"),
        (1000, "1 k"),
        (999_999, "1 M"),
        (12_345_678, "12.3 M"),
        (float("nan"), "not finite"),
        (4.2e15, "4,200 T"),
    ],
)
def test_quantity_has_three_digits_and_a_unit(value: float | None, text: str) -> None:
    assert quantity(value) == text

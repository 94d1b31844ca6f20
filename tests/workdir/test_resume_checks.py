"""When a run may go on: with its own config, no fewer rounds than are done, and learning rates that don't jump unasked."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from tiny import tiny_config

from fedbert_jax.config import Config, OptimizerConfig
from fedbert_jax.errors import ConfigError
from fedbert_jax.federated import optim
from fedbert_jax.workdir import resume
from fedbert_jax.workdir.checkpoint import Checkpoints
from fedbert_jax.workdir.paths import check_same
from fedbert_jax.workdir.resume import Made, check, check_unedited, harmless, newest, stamp

STEPS = 2  # per round
LINEAR = dict(learning_rate=0.01, warmup_steps=4, schedule="linear", end_learning_rate=0.0)


def config(rounds: int = 10, optimizer: dict | None = None, **changes) -> Config:
    """Ten rounds of two steps, with a warm-up of four steps and a linear decay to 0, unless given otherwise."""
    federated = dict(rounds=rounds) | changes.pop("federated", {})
    both = LINEAR | (optimizer or {})
    return tiny_config(federated=federated, client_optimizer=both, server_optimizer=both, **changes)


def made(round: int = 10, **changes) -> Made:
    return Made(round, json.loads(json.dumps(stamp(config(**changes)))))  # a checkpoint's is read back from JSON


def rate(c: Config, step: int) -> float:
    return float(np.asarray(optim.make_schedule(c.client_optimizer, *optim.schedule_span(c.federated, STEPS))(step)))


def test_fewer_rounds_than_are_done_are_refused():
    check(config(10), made(10), STEPS, None)
    with pytest.raises(ConfigError, match=r"federated\.rounds=9: accepted: at least 10 rounds, which are finished"):
        check(config(9), made(10), STEPS, None)
    check(config(8), made(7), STEPS, None)  # ends earlier than was planned, but not before the finished rounds


def test_more_rounds_at_a_rate_that_jumps_up_are_refused_with_what_may_be_asked_for():
    """After ten rounds the rate is 0; with fifteen it would be 0.01 * (30 - 20) / 26."""
    words = (
        r"federated\.rounds=15: after round 10 the rate of client_optimizer would jump up from 0 to 0\.00385; "
        r"federated\.schedule_rounds=10 .*federated\.schedule_from=10 .*federated\.schedule_rounds=15 takes the jump"
    )
    with pytest.raises(ConfigError, match=words):
        check(config(15), made(10), STEPS, None)
    with pytest.raises(ConfigError, match="after round 6 the rate"):  # halfway down, too
        check(config(15), made(6), STEPS, None)


@pytest.mark.parametrize(
    "schedule, after, later",
    [
        (dict(schedule_rounds=10), 0.0, 0.0),  # the end's rate
        (dict(schedule_from=10), 0.01 / 4, 0.01 * 5 / 6),  # a warm-up of 4 steps, then 6 down, one of them by step 25
        (dict(schedule_rounds=15), 0.01 * 10 / 26, 0.01 * 5 / 26),  # as if fifteen rounds had been asked for
    ],
)
def test_each_wish_has_a_key(schedule, after, later):
    extended = config(15, federated=schedule)
    check(extended, made(10), STEPS, None)
    assert rate(extended, 20) == pytest.approx(after, rel=1e-5) and rate(extended, 25) == pytest.approx(later, rel=1e-5)


def test_the_schedule_that_was_left_as_it_was_is_the_old_one():
    old, new = config(10), config(15, federated=dict(schedule_rounds=10))
    assert [rate(old, n) for n in range(20)] == [rate(new, n) for n in range(20)]


@pytest.mark.parametrize("optimizer", [dict(schedule="constant"), dict(decay_steps=16), dict(learning_rate=0.0)])
def test_what_does_not_jump_needs_no_key(optimizer):
    check(config(15, optimizer), made(10, optimizer=optimizer), STEPS, None)


def test_a_second_extension_has_to_be_asked_for_again():
    """Neither a key that was given before nor one that is left out asks for anything."""
    past = made(15, rounds=15, federated=dict(schedule_from=10))
    for given in (dict(schedule_from=10), {}):
        with pytest.raises(ConfigError, match="would jump up"):
            check(config(30, federated=given), past, STEPS, None)
    check(config(30, federated=dict(schedule_from=15)), past, STEPS, None)


def test_without_a_stamp_the_config_file_is_asked():
    with pytest.raises(ConfigError, match="would jump up"):
        check(config(15), Made(10, None), STEPS, config(10))
    check(config(15), Made(10, None), STEPS, None)  # nobody knows any more


@pytest.mark.parametrize(
    "start, rounds, words",
    [(11, 20, "10, the finished"), (1, 20, "10, the finished"), (10, 10, r"less than federated\.rounds=10")],
)
def test_schedules_begin_in_rounds_that_are_done(start, rounds, words):
    with pytest.raises(ConfigError, match=rf"schedule_from={start}: accepted: {words}"):
        check(config(rounds, federated=dict(schedule_from=start)), made(10), STEPS, None)
    with pytest.raises(ConfigError, match="schedule_from=3: accepted: 0, the finished rounds"):
        check(config(20, federated=dict(schedule_from=3)), Made(0, None), STEPS, None)


def test_where_schedules_begin_anew_they_may_be_others():
    """The finished rounds stay as they were; half-way through the new phase they would not."""
    anew = config(20, dict(learning_rate=0.002, schedule="constant"), federated=dict(schedule_from=10), resume="force")
    check(anew, made(10), STEPS, None)
    check_same(config(10), anew, harmless=harmless(anew, made(10)))
    with pytest.raises(ConfigError, match=r"client_optimizer\.learning_rate \(was 0\.01, now 0\.002\)"):
        check(anew, made(12, rounds=20, federated=dict(schedule_from=10)), STEPS, None)
    with pytest.raises(ConfigError, match=r"client_optimizer\.learning_rate"):
        check_same(config(20), config(20, dict(learning_rate=0.002), resume="force"), harmless=harmless(anew, made(12)))


def test_a_checkpoint_of_another_config_is_refused_by_its_keys():
    other = config(10, federated=dict(batch_size=7), mlm=dict(mask_prob=0.5))
    words = r"checkpoint of round 10 was made with another config: federated\.batch_size \(was 7, now 2\), mlm\.mask_prob"
    with pytest.raises(ConfigError, match=words):
        check(config(10), Made(10, stamp(other)), STEPS, None)
    same = stamp(config(10, checkpoint=dict(keep=1), mesh=dict(model=2)))  # these change no number
    check(config(10), Made(10, same), STEPS, None)
    del same["mlm.whole_word"]  # as from a version without this key, which behaved like its default
    check(config(10), Made(10, same), STEPS, None)
    with pytest.raises(ConfigError, match=r"mlm\.whole_word \(was False, now True\)"):
        check(config(10, mlm=dict(whole_word=True)), Made(10, same), STEPS, None)
    check(config(10), Made(10, None), STEPS, None)  # from a version without stamps


def test_an_edited_config_file_is_noticed(tmp_path):
    check_unedited(tmp_path / "config.json", config(10), made(10))
    words = r"config\.json is not what the checkpoint of round 10 was made with: federated\.local_steps \(was 2, now 3\)"
    with pytest.raises(ConfigError, match=words):
        check_unedited(tmp_path / "config.json", config(10, federated=dict(local_steps=3)), made(10))
    check_unedited(tmp_path / "config.json", config(15, federated=dict(schedule_from=10)), made(10))  # extended, then killed


def test_a_checkpoint_tells_what_it_was_made_with(tmp_path):
    assert newest(tmp_path / "none") == Made(0, None)
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    assert newest(tmp_path / "c") == Made(0, None)
    checkpoints.save(3, {"w": np.ones(2, np.float32)}, {})
    checkpoints.save(4, {"w": np.ones(2, np.float32)}, {"config": stamp(config(7))})
    checkpoints.close()
    assert newest(tmp_path / "c") == Made(4, stamp(config(7)))
    (tmp_path / "c" / "4").rename(tmp_path / "elsewhere")
    assert newest(tmp_path / "c") == Made(3, None)


def test_a_warm_up_as_long_as_the_run_is_warned_of():
    assert optim.warnings(config(10), STEPS) == []
    assert optim.warnings(config(2), STEPS) == [
        "client_optimizer and server_optimizer: warmup_steps=4, but federated.rounds=2 makes 4 steps, so that the rate only "
        "rises, to 0.01 of 0.01."
    ]
    longer = dataclasses.replace(config(10), server_optimizer=OptimizerConfig(learning_rate=0.01, warmup_steps=100))
    (said,) = optim.warnings(longer, STEPS)
    assert said.startswith("server_optimizer: warmup_steps=100") and said.endswith("to 0.002 of 0.01.")
    again = config(20, federated=dict(schedule_from=18))  # four steps are left
    assert "only rises" in optim.warnings(again, STEPS)[0]


def test_rounds_that_learn_nothing_are_warned_of():
    (said,) = optim.warnings(config(15, federated=dict(schedule_rounds=10)), STEPS)
    assert said.startswith("client_optimizer and server_optimizer: the rate is 0 from round 11 of 15 on")
    assert optim.warnings(config(15, dict(end_learning_rate=1e-4), federated=dict(schedule_rounds=10)), STEPS) == []


def test_what_a_run_is_told_of_is_what_is_saved():
    assert resume.stamp(Config())["federated.rounds"] == 140 and "client_optimizer.learning_rate" in resume.stamp(Config())

"""Studies: arms, changes and seeds become commands, each is run once, and what stopped goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from corpus import run, write_corpus

from fedbert_jax import study
from fedbert_jax.errors import ConfigError, UserError
from fedbert_jax.study import Arm, Stopped, command_of, read_study

FILE = """
config = "demo"
seeds = [0, 3]
[changes]
federated.rounds = 5
model = { hidden_size = 32 }
fill_mask = ["a [MASK]", "b [MASK]"]
[arms.gradients]
[arms.parallel]
config = "parallel"
federated.rounds = 6
client_optimizer.learning_rate = [4e-3, 6e-3]
wire.codec = ["float32", "int8"]
"""


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "study.toml"
    path.write_text(FILE)
    return path


@pytest.fixture
def commands(monkeypatch) -> list[list[str]]:
    """Commands are recorded and not run; seed 3 of an arm with int8 fails."""
    given: list[list[str]] = []

    def stand_in(command, stdout, **_):
        given.append(command)
        stdout.write("some output\nerror: no room is left.\n")
        stdout.flush()
        failed = "--config.wire.codec=int8" in command and "--config.seed=3" in command
        return subprocess.CompletedProcess(command, 3 if failed else 0)

    monkeypatch.setattr("fedbert_jax.study.subprocess.run", stand_in)
    monkeypatch.setattr("fedbert_jax.compare.main", lambda arguments: len(arguments))
    return given


def test_every_choice_from_lists_is_an_arm(file):
    found = read_study(file)
    common = {"federated.rounds": 5, "model.hidden_size": 32, "fill_mask": ["a [MASK]", "b [MASK]"]}
    assert found.seeds == (0, 3)
    assert found.arms["gradients"] == Arm("demo", common)
    assert [*found.arms][1:] == [f"parallel-{rate}-{codec}" for rate in (0.004, 0.006) for codec in ("float32", "int8")]
    assert found.arms["parallel-0.006-int8"] == Arm(
        "parallel", common | {"federated.rounds": 6, "client_optimizer.learning_rate": 6e-3, "wire.codec": "int8"}
    )


def test_one_config_is_a_study_too_and_files_lie_beside_it(tmp_path):
    (tmp_path / "mine.py").write_text("")
    (tmp_path / "study.toml").write_text('config = "mine.py"\nseeds = 2\n')
    found = read_study(tmp_path / "study.toml")
    assert found.arms == {"mine": Arm(str(tmp_path / "mine.py"), {})} and found.seeds == (0, 1)


def test_none_has_a_word_and_a_study_that_comes_along_a_name(tmp_path):
    (tmp_path / "s.toml").write_text(
        'config = "demo"\n[changes]\neval.times = "None"\nfederated.clients_per_round = ["None", 4]\n'
    )
    found = read_study(tmp_path / "s.toml")
    assert [arm.changes["federated.clients_per_round"] for arm in found.arms.values()] == [None, 4]
    assert found.arms["demo-None"].changes["eval.times"] is None
    assert "--config.eval.times=None" in command_of(found.arms["demo-4"], 0, Path("w"), [])
    study.check(found, {})
    assert "parallel" in read_study(Path("strategies")).arms


def test_a_command_says_what_its_arm_is():
    command = command_of(Arm("demo", {"fill_mask": ["a [MASK]"], "federated.epochs": 2.0}), 3, Path("w/x"), ["--config.a=1"])
    assert command == [
        sys.executable, "-m", "fedbert_jax.main", "--config", "demo", "--workdir", "w/x",
        "--config.fill_mask=('a [MASK]',)", "--config.federated.epochs=2.0", "--config.seed=3", "--config.a=1",
    ]  # fmt: skip


def test_each_run_is_done_once_and_what_stopped_goes_on(file, tmp_path, commands):
    options = [str(file), "--workdir", str(tmp_path / "w"), "--arms", "gradients,parallel-0.004-int8"]
    with pytest.raises(
        Stopped, match=r"parallel-0.004-int8-3 stopped: no room is left \(see .*goes on from there"
    ) as caught:
        study.main([*options, "--config.data.seq_len=64"])
    assert caught.value.exit_code == 3
    names = [Path(c[c.index("--workdir") + 1]).name for c in commands]
    assert names == ["gradients-0", "parallel-0.004-int8-0", "gradients-3", "parallel-0.004-int8-3"]
    assert all(c[-1] == "--config.data.seq_len=64" for c in commands)
    commands.clear()
    with pytest.raises(Stopped):
        study.main([*options, "--config.data.seq_len=64"])
    assert [Path(c[c.index("--workdir") + 1]).name for c in commands] == names[-1:]
    commands.clear()
    assert (
        study.main([*options, "--config.data.seq_len=64", "--seeds=1"]) == 4
    )  # two workdirs, and where the comparison goes
    assert commands == []
    with pytest.raises(Stopped):
        study.main([*options, "--jobs", "3"])  # of another length: everything anew
    assert len(commands) >= 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("config = 3", "config: accepted: the name of one (bert_base, centralized, "),
        ("", "config: accepted: the name of one"),
        ("config = 'demo'\nseeds = 0", "seeds=0: accepted: how many, or a list of integers"),
        ("config = 'demo'\nrounds = 3", "rounds: accepted: config, seeds, changes and arms"),
        ("config = 'demo'\narms = 3", "arms is no section; accepted: [arms]"),
        ("config = 'demo'\n[arms]\nx = 3", "arms.x is no section; accepted: [arms.x]"),
        ("config = 'demo'\n[arms.'a b']", "arms.a b: accepted as a name: letters"),
        ("config = ", "can't be read (Invalid value"),
        (
            "config = 'demo'\n[changes]\nfederated.roundz = 3",
            "arm demo: config key federated.roundz does not exist (did you",
        ),
        ("config = 'demo'\n[changes]\nfederated.rounds = -3", "arm demo: config key federated.rounds=-3"),
        ("config = 'demo'\n[changes]\nseed = 3", "seed=3: accepted: seeds = [3], beside config"),
        ("config = 'dmeo'", "arm dmeo: config file dmeo does not exist"),
        ("config = 'serve'", "arm serve: config key task='serve': accepted in a study: 'pretrain'"),
    ],
)
def test_a_mistake_is_named_before_anything_runs(tmp_path, commands, text, words):
    (tmp_path / "study.toml").write_text(text)
    with pytest.raises(UserError) as caught:
        study.main([str(tmp_path / "study.toml"), "--workdir", str(tmp_path / "w")])
    assert words in str(caught.value) and commands == [] and not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--jobs 0", "--jobs 0: accepted: at least 1"),
        ("--seeds 0", "--seeds 0: accepted: at least 1"),
        ("--arms gradients,other", "--arms other: accepted: gradients, parallel-0.004-float32"),
        ("--config.federated.rounds", "--config.federated.rounds: accepted: --config.KEY=VALUE"),
        ("--config.federated.rounds=x", "federated.rounds='x': accepted: an integer"),
    ],
)
def test_an_option_that_cannot_be_is_named(file, tmp_path, commands, options, words):
    with pytest.raises(UserError) as caught:
        study.main([str(file), "--workdir", str(tmp_path / "w"), *options.split()])
    assert words in str(caught.value) and commands == []


def test_a_config_that_has_gone_wrong_since_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="arm x"):
        study.check(study.Study({"x": Arm("demo", {"nothing": 1})}, (0,)), {})


@pytest.mark.slow
def test_a_study_ends_in_a_comparison(tmp_path):
    write_corpus(tmp_path, clients=2, documents=12)
    (tmp_path / "study.toml").write_text(
        'config = "config.py"\nseeds = 2\n[changes]\nfederated.rounds = 1\nfederated.local_steps = 1\n'
        '[arms.parallel]\n[arms.local]\nfederated.strategy = "local"\n'
    )
    command = [
        sys.executable,
        "-m",
        "fedbert_jax.study",
        tmp_path / "study.toml",
        "--workdir",
        tmp_path / "w",
        "--jobs",
        "2",
    ]
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert "local-1 ..." in done.stdout and "2 seeds" in done.stdout
    groups = json.loads((tmp_path / "w/compare/compare.json").read_text())["groups"]
    assert sorted((g["strategy"], tuple(g["seeds"])) for g in groups) == [("local", (0, 1)), ("parallel", (0, 1))]

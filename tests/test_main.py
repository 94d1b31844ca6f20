"""The command line: a user's mistake is one sentence and exit code 2, before anything expensive starts."""

from __future__ import annotations

import ast
import json
import os
import sys
from pathlib import Path
from unittest.mock import MagicMock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from corpus import command, run, write_corpus
from jax.sharding import PartitionSpec as P
from rich.console import Console

from fedbert_jax import config as config_lib
from fedbert_jax import experiment as run_lib
from fedbert_jax.config import MeshConfig, default_config, flatten, from_dict, to_dict
from fedbert_jax.config.files import read_config
from fedbert_jax.devices.mesh import make_mesh
from fedbert_jax.errors import ConfigError, DivergedError, UserError
from fedbert_jax.loop import Loop
from fedbert_jax.runtime.simulation import Simulation
from fedbert_jax.train import Pretraining, train
from fedbert_jax.workdir.checkpoint import Checkpoints
from fedbert_jax.workdir.paths import Workdir

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def config_file(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"), clients=2, documents=12)


def load(config_file: Path, **changes):
    """The test config as a `Config`, with dotted keys changed."""
    scope: dict = {"__file__": str(config_file)}
    exec(compile(config_file.read_text(), str(config_file), "exec"), scope)
    values = scope["get_config"]()
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        node = values
        for part in section.split("__") if section else []:
            node = node[part]
        node[name] = value
    return from_dict(values)


# --- through the command ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override, words",
    [
        ("fedrated.rounds=3", ["no section fedrated", "did you mean federated.rounds"]),
        ("data.seq_len=64", ["data.seq_len=64", "max_position_embeddings=32"]),
    ],
)
def test_a_bad_override_is_one_sentence(config_file, tmp_path, override, words):
    done = run(*command(config_file, tmp_path / "w", override))
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr
    assert not (tmp_path / "w").exists()


def test_no_config_and_no_workdir(config_file):
    done = run(sys.executable, "-m", "fedbert_jax.main")
    assert done.returncode == 2 and "--config NAME, such as demo, or FILE.py" in done.stderr
    done = run(sys.executable, "-m", "fedbert_jax.main", "--config", config_file)
    assert done.returncode == 2 and "--workdir DIR" in done.stderr


def test_a_mistake_in_the_data_leaves_the_command_with_2(config_file, tmp_path):
    done = run(*command(config_file, tmp_path / "w", "data.source=text:/nowhere/*.txt"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "/nowhere" in done.stderr and "Traceback" not in done.stderr


# --- the config, once, at the edge -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(federated=dict(roundz=1)), r"federated\.roundz does not exist"),
        (dict(nonsense=dict(a=1)), "nonsense does not exist"),
        (dict(federated=3), "federated=3 is a section"),
        (dict(federated=dict(rounds="3")), r"federated\.rounds='3' is str; accepted: an integer"),
        (dict(federated=dict(rounds=True)), "is bool; accepted: an integer"),
        (dict(federated=dict(rounds=2.5)), "is float; accepted: an integer"),
        (dict(federated=dict(rounds=0)), r"federated\.rounds=0: accepted: an integer of at least 1"),
        (dict(federated=dict(num_clients=4, clients_per_round=5)), r"clients_per_round=5.*at most.*num_clients=4"),
        (dict(federated=dict(strategy="fedavg", body="private")), r"federated\.body='private'"),
        (dict(federated=dict(strategy="fedavg"), wire=dict(codec="bfloat16")), "which has no cut"),
        (dict(federated=dict(num_clients=4, clients_per_round=2, client_optimizer_state="keep")), "all clients"),
        (dict(federated=dict(strategy="local", num_clients=4, clients_per_round=2)), "all clients"),
        (dict(data=dict(partition=dict(kind="iid"))), r"federated\.num_clients=None"),
        (dict(data=dict(partition=dict(alpha=0.0))), r"data\.partition\.alpha"),
        (dict(data=dict(seq_len=1024)), r"data\.seq_len=1024.*max_position_embeddings=512"),
        (dict(data=dict(source="web:x")), r"data\.source='web:x'.*docs:"),
        (dict(data=dict(source="text:")), "followed by what to read"),
        (dict(data=dict(tokenizer="train:few")), "train:SIZE"),
        (dict(data=dict(eval_fraction=1.0)), r"data\.eval_fraction=1\.0"),
        (dict(mlm=dict(mask_prob=0.0)), r"mlm\.mask_prob"),
        (dict(model=dict(preset="huge")), "'tiny', 'mini', 'small'"),
        (dict(model=dict(hidden_size=100, num_heads=3)), r"multiple of model\.num_heads=3"),
        (dict(client_optimizer=dict(name="adamx")), "'adamw', 'adam'"),
        (dict(server_optimizer=dict(warmup_steps=10, decay_steps=5)), r"more than server_optimizer\.warmup_steps=10"),
        (dict(model=dict(init_from="somewhere")), r"data\.tokenizer='train:4096'.*the checkpoint's own"),
        (dict(federated=dict(strategy="local", client_optimizer_state="reset")), "averages no copies"),
        (dict(federated=dict(strategy="sequential", clients_at_once=2)), r"federated\.clients_at_once=2: accepted: None"),
        (dict(federated=dict(strategy="local"), model=dict(attention="cudnn")), "model.attention=.cudnn.: accepted: .auto."),
        (dict(federated=dict(clients_at_once=0)), "clients_at_once=0: accepted: an integer of at least 1"),
        (dict(federated=dict(strategy="sequential"), aggregator=dict(momentum=0.9)), "averages no copies"),
        (dict(aggregator=dict(learning_rate=-1.0)), r"aggregator\.learning_rate"),
        (dict(wire=dict(codec="float8")), "'float32', 'bfloat16' or 'int8'"),
        (dict(fill_mask=[1]), "a sentence, or several"),
    ],
)
def test_what_a_config_refuses(changes, words):
    with pytest.raises(ConfigError, match=words):
        from_dict(changes)


def test_an_optimizers_arguments_are_its_own(config_file, tmp_path):
    config = load(config_file, client_optimizer__momentum=0.9)
    with pytest.raises(ConfigError, match=r"client_optimizer\.momentum=0\.9.*adamw.*b1, b2, eps"):
        train(config, tmp_path, QUIET)


CONFIGS = Path(__file__).parents[1] / "configs"


def test_defaults_are_a_valid_config_and_survive_the_round_trip():
    config = from_dict(default_config())
    assert config == config_lib.Config()
    assert from_dict(config_lib.to_dict(config)) == config


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda p: p.stem)
def test_configs_of_the_repository_are_valid(path):
    assert len(ast.get_docstring(ast.parse(path.read_text()))) > 100  # says what it does, costs and reaches
    config = read_config(path)
    lacking = {
        "text": ("text:", "text:here"),
        "bert_base": ("text:", "text:here"),
        "join": ("text:", "text:here"),
        "join_classifier": ("glue:SST-2", "glue:SST-2@here"),
    }
    if path.stem in lacking:
        without, given = lacking[path.stem]
        with pytest.raises(ConfigError, match=rf"data\.source='{without}'"):  # the user has to give it
            from_dict(config)
        config.data.source = given
    from_dict(config)


@pytest.mark.parametrize("name", ["parallel", "sequential", "centralized", "fedavg", "local"])
def test_what_is_compared_with_the_demo_has_its_data_and_its_budget(name):
    """Everything except the strategy, and the rates that it needs, is the demo's."""
    demo, other = (flatten(to_dict(from_dict(read_config(CONFIGS / f"{n}.py")))) for n in ("demo", name))
    differ = {key for key in demo if demo[key] != other[key]} - {"fill_mask"}
    assert differ & {"federated.strategy", "federated.average"}
    rates = {f"{side}_optimizer.{key}" for side in ("client", "server") for key in ("learning_rate", "warmup_steps")}
    assert differ <= {"federated.strategy", "federated.average"} | (rates if name != "centralized" else set())


# --- the data and the workdir ----------------------------------------------------------------------------------------


def test_an_empty_corpus(config_file, tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("\n \n")
    with pytest.raises(UserError, match="no text"):
        train(load(config_file, data__source=f"text:{tmp_path / 'text'}"), tmp_path / "w", QUIET)


def test_a_text_that_is_not_utf8(config_file, tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.txt.*UTF-8"):
        train(load(config_file, data__source=f"text:{tmp_path / 'text'}"), tmp_path / "w", QUIET)


def small_client(tmp_path: Path) -> str:
    """Text with a client that fills no block."""
    folder = write_corpus(tmp_path, clients=2, documents=12).parent / "text"
    (folder / "small").mkdir()
    (folder / "small" / "one.txt").write_text("a few words")
    return f"text:{folder}"


def test_a_client_with_too_little_text_is_refused_or_dropped(config_file, tmp_path):
    source = small_client(tmp_path)
    with pytest.raises(UserError, match="small"):
        train(load(config_file, data__source=source, data__small_clients="error"), tmp_path / "w", QUIET)
    from fedbert_jax.data.dataset import prepare

    said: list[str] = []
    config = load(config_file, data__source=source)
    dataset, _ = prepare(config, tmp_path / "data", warn=said.append)
    assert "small" not in dataset.client_names and dataset.train.num_clients == 2
    assert len(said) == 1 and "small" in said[0]


def test_more_clients_a_round_than_there_are(config_file, tmp_path):
    with pytest.raises(UserError, match="clients_per_round"):
        train(load(config_file, federated__clients_per_round=9), tmp_path / "w", QUIET)


def test_a_workdir_that_cannot_be_written(config_file, tmp_path):
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(UserError, match="can't be written"):
        train(load(config_file), tmp_path / "file" / "w", QUIET)
    if os.geteuid() != 0:
        locked = tmp_path / "locked"
        locked.mkdir(mode=0o500)
        with pytest.raises(UserError, match="can't be written"):
            train(load(config_file), locked / "w", QUIET)


def test_a_workdir_in_use(config_file, tmp_path):
    from fedbert_jax.workdir.paths import open_workdir

    _, lock = open_workdir(tmp_path / "w")
    with pytest.raises(UserError, match="in use by another run"):
        train(load(config_file), tmp_path / "w", QUIET)
    lock.close()


HUGE = {
    f"{side}__{k}": v
    for side in ("client_optimizer", "server_optimizer")
    for k, v in dict(learning_rate=1e30, warmup_steps=0, clip_norm=None, schedule="constant").items()
}


def test_the_last_round_of_all_may_diverge_too(config_file, tmp_path):
    """Its loss is from before the step; the evaluation shows it. Nothing is saved or exported, and the files are JSON."""
    config = load(config_file, federated__rounds=1, federated__local_steps=1, model__num_layers=1, **HUGE)
    words = "round 1: the held-out loss is not finite, of clients client_0, client_1; there was no checkpoint yet"
    with pytest.raises(DivergedError, match=words) as raised:
        train(config, tmp_path / "w", QUIET)
    assert raised.value.exit_code == 3
    assert not (tmp_path / "w" / "hf").exists() and Checkpoints(tmp_path / "w" / "checkpoints").rounds() == []
    (line,) = (tmp_path / "w" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail)["round"] == 0
    assert json.loads((tmp_path / "w" / "run.json").read_text(), parse_constant=pytest.fail)["finished"] is False


def test_what_is_not_finite_is_never_saved_and_the_last_checkpoint_is_whole(config_file, tmp_path, monkeypatch):
    """One client's numbers fail in round 4, when its loss doesn't show it yet and nobody is evaluated."""
    config = load(
        config_file,
        federated__strategy="local",
        federated__rounds=6,
        federated__local_steps=1,
        checkpoint__every_rounds=1,
        eval__every_rounds=100,
        model__num_layers=1,
    )
    run_round = Simulation.run_round

    def poisoned(self, state, n):
        state, metrics = run_round(self, state, n)
        if n == 3:
            state.model.client["head"]["bias"] = state.model.client["head"]["bias"].at[1, 5].set(float("inf"))
        return state, metrics

    monkeypatch.setattr(Simulation, "run_round", poisoned)
    words = "round 4: .*finite of model/client/head/bias, of client client_1; the checkpoint of round 3 is kept, and nothing"
    with pytest.raises(DivergedError, match=words):
        train(config, tmp_path / "w", QUIET)
    workdir, checkpoints = Workdir(tmp_path / "w"), Checkpoints(tmp_path / "w" / "checkpoints")
    assert checkpoints.rounds() == [1, 2, 3] and not workdir.hf.exists()
    state, _ = run_lib.restore(run_lib.build(config, workdir), checkpoints, 3)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))


def test_a_checkpoint_that_is_not_finite_is_no_start(tmp_path):
    """An earlier version may have left one."""
    checkpoints, here = Checkpoints(tmp_path / "c", keep=2), jax.sharding.NamedSharding(make_mesh(MeshConfig()), P())
    state = {"head": {"bias": jnp.array([1.0, float("nan")])}}
    for n, saved in ((1, jax.tree.map(jnp.ones_like, state)), (2, state)):
        checkpoints.save(n, saved, {})
    checkpoints.wait()
    words = r"c/2 holds numbers that are not finite \(head/bias\); delete that directory to go on from round 1"
    with pytest.raises(DivergedError, match=words):
        checkpoints.restore(2, jax.eval_shape(lambda: state), jax.tree.map(lambda _: here, state))


def test_without_held_out_text_a_word_tells_whether_the_model_speaks(monkeypatch):
    monkeypatch.setattr("fedbert_jax.train.fill_mask", lambda *_: [[("the", float("nan")), ("a", 0.1)]])
    loop, job = Loop.__new__(Loop), Pretraining.__new__(Pretraining)
    job.scores, job.sim, job.run = {}, MagicMock(), MagicMock()
    loop.job, loop.checkpoints = job, MagicMock()
    loop.checkpoints.rounds.return_value = [5]
    words = "^round 7: what the model predicts is not finite; the checkpoint of round 5 is"
    with pytest.raises(DivergedError, match=words), loop.guard(7):
        job._check_model(MagicMock())
    job.scores = {"eval_loss": 5.0}
    job._check_model(MagicMock())
    job.scores = {"eval_loss": float("nan")}
    with pytest.raises(DivergedError, match="held-out loss"), loop.guard(7):
        job._check_model(MagicMock())


@pytest.mark.slow
def test_a_profile_of_some_rounds_is_written(config_file, tmp_path):
    small = dict(federated__rounds=4, federated__local_steps=1, model__num_layers=1)
    config = load(config_file, profile="2:3", **small)
    assert train(config, tmp_path / "w", QUIET) == 0
    (trace,) = (tmp_path / "w" / "profile").rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(trace)).planes
    rounds = [dict(e.stats)["step_num"] for p in planes for line in p.lines for e in line.events if e.name == "round"]
    assert sorted(rounds) == [2, 3]
    # With another profile, or none, it is still the same run.
    assert train(load(config_file, **small), tmp_path / "w", QUIET) == 0

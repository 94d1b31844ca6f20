"""The command line: arguments in any order, and for a mistake its true cause and what is accepted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedbert_jax.config import all_keys, flags
from fedbert_jax.errors import ConfigError

FILE = """
from fedbert_jax.config import default_config

def get_config():
    config = default_config()
    config.data.source = "text:here"
    return config
"""
EPOCHS = FILE.replace("    return", "    config.federated.epochs = 3.0\n    return")


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "a.py").write_text(FILE)
    return str(tmp_path / "a.py")


def load(*arguments: str):
    return flags.load_config(flags.parse(arguments))


# --- what works ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "order",
    [
        "--config FILE --workdir w X",
        "X --config FILE --workdir w",
        "--workdir=w X --config=FILE",
        "-workdir w -config FILE X",
    ],
)
def test_any_order(file, order):
    change = "--config.federated.rounds=7"
    given = flags.parse(order.replace("X", change).replace("FILE", file).split())
    assert given.need("workdir") == "w" and flags.load_config(given).federated.rounds == 7


@pytest.mark.parametrize(
    "arguments, key, value",
    [
        (["--config.federated.rounds", "9"], "federated.rounds", 9),
        (["--config.federated.rounds=1", "--config.federated.rounds=2"], "federated.rounds", 2),
        (["--config.mesh.data", "-1"], "mesh.data", -1),
        (["--config.client_optimizer.learning_rate=1e-3"], "client_optimizer.learning_rate", 0.001),
        (["--config.client_optimizer.clip_norm=None"], "client_optimizer.clip_norm", None),
        (["--config.federated.num_clients=4"], "federated.num_clients", 4),
        (["--config.data.lowercase"], "data.lowercase", True),
        (["--config.data.lowercase", "false"], "data.lowercase", False),
        (["--noconfig.data.lowercase"], "data.lowercase", False),
        (["--config.data.document_start=^= [^=]"], "data.document_start", "^= [^=]"),
        (["--config.fill_mask=Paris is the [MASK] of France."], "fill_mask", ("Paris is the [MASK] of France.",)),
        (["--config.fill_mask=[MASK] is (a) city, isn't it?"], "fill_mask", ("[MASK] is (a) city, isn't it?",)),
        (["--config.fill_mask=('a [MASK]', 'b [MASK]')"], "fill_mask", ("a [MASK]", "b [MASK]")),
        (['--config.fill_mask=["a [MASK]"]'], "fill_mask", ("a [MASK]",)),
        (["--config.fill_mask=('a [MASK]')"], "fill_mask", ("a [MASK]",)),
        (["--config.fill_mask=()"], "fill_mask", ()),
        (["--config.fill_mask="], "fill_mask", ()),
    ],
)
def test_a_value_from_the_shell(arguments, key, value):
    assert flags.parse(arguments).keys == {key: value}


def test_what_a_config_file_may_return(tmp_path):
    for body in ("{'federated': {'rounds': 3}}", "ConfigDict({'federated': {'rounds': 3}})", "FrozenConfigDict(rounds)"):
        (tmp_path / "b.py").write_text(
            "from ml_collections import ConfigDict, FrozenConfigDict\nrounds = {'federated': {'rounds': 3}}\n"
            f"def get_config(): return {body}\n"
        )
        changes = ("--config.federated.num_clients=2", "--config.data.source=docs:numpy")
        config = load("--config", str(tmp_path / "b.py"), *changes)
        assert (config.federated.rounds, config.federated.num_clients, config.data.source) == (3, 2, "docs:numpy")


def test_which_of_rounds_and_epochs_decides(tmp_path):
    path = tmp_path / "e.py"
    path.write_text(EPOCHS)
    assert load(f"--config={path}").federated.epochs == 3.0
    chosen = load(f"--config={path}", "--config.federated.rounds=5").federated  # the command line comes first
    assert (chosen.epochs, chosen.rounds) == (None, 5)
    with pytest.raises(ConfigError, match=r"federated\.rounds=5 and federated\.epochs=2\.0 are both set; accepted: one"):
        load(f"--config={path}", "--config.federated.rounds=5", "--config.federated.epochs=2")
    path.write_text(EPOCHS.replace("    return", "    config.federated.rounds = 9\n    return"))
    with pytest.raises(ConfigError, match="both set"):
        load(f"--config={path}")
    assert load(f"--config={path}", "--config.federated.epochs=None").federated.rounds == 9
    assert load(f"--config={path}", "--config.federated.epochs=4").federated.epochs == 4.0


# --- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line, words",
    [
        ("", "no config given; accepted: --config NAME, such as demo, or FILE.py."),
        ("--config.federated.rounds=1", "no config given"),
        ("--workdir --config a.py", "--workdir has no value, but --config after it; accepted: --workdir DIR."),
        ("--config --workdir w", "--config has no value, but --workdir after it"),
        ("--config a.py --workdir", "--workdir has no value; accepted: --workdir DIR."),
        ("--workdir=", "--workdir has no value"),
        ("--config.federated.rounds --workdir w", "--config.federated.rounds has no value"),
        ("--wrokdir w", "no flag --wrokdir (did you mean --workdir?); accepted: --config, --workdir,"),
        ("--Config a.py", "did you mean --config?"),
        ("--rounds=3", "did you mean --config.federated.rounds?"),
        ("--federated.rounds=3", "did you mean --config.federated.rounds?"),
        ("--cofnig.federated.rounds=3", "did you mean --config.federated.rounds?"),
        ("--batch_size 3", "--config.federated.batch_size or --config.eval.batch_size?"),
        ("a.py", "unexpected argument 'a.py' (did you mean --config a.py?)"),
        ("federated.rounds=3", "did you mean --config.federated.rounds=3?"),
        ("–workdir w", "did you mean --workdir, with two hyphens?"),
        ("--config.fedrated.rounds=3", "no section fedrated (did you mean federated.rounds?); accepted: task, seed,"),
        ("--config.federated.roundz=3", "did you mean federated.rounds?); accepted: federated.strategy,"),
        ("--config.federated.roundz 3", "did you mean federated.rounds?"),
        ("--config.Federated.rounds=3", "did you mean federated.rounds?"),
        ("--config.data.partitoin.kind=iid", "did you mean data.partition.kind?"),
        ("--config.rounds=3", "did you mean federated.rounds?"),
        ("--config.bogus=1", "config key bogus does not exist; accepted: task, seed,"),
        ("--config.federated=3", "config key federated is a section; accepted: its keys, federated.strategy,"),
        ("--config.federated.rounds.x=3", "federated.rounds is no section, but takes an integer"),
        ("--config.federated.rounds=many", "federated.rounds='many': accepted: an integer."),
        ("--config.federated.rounds=", "federated.rounds='': accepted: an integer."),
        ("--config.data.lowercase=perhaps", "data.lowercase='perhaps': accepted: true or false."),
        ("--config.fill_mask=('a',3)", "accepted: a sentence, or several"),
        ("--processes=two", "--processes=two: accepted: an integer."),
        ("--distributed=maybe", "--distributed=maybe: accepted: --distributed, or --nodistributed."),
    ],
)
def test_a_mistake_is_named(line, words):
    with pytest.raises(ConfigError) as caught:
        load(*line.split())
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, words",
    [
        ("def get_config():\n    return 1 / 0\n", "fails at line 2: ZeroDivisionError"),
        ("def get_config(:\n", "fails at line 1: SyntaxError"),
        ("x = 1\n", "has no get_config()"),
        ("def get_config():\n    return None\n", "get_config() returns NoneType; accepted: a ConfigDict"),
        ("import nowhere_to_be_found\n", "fails at line 1: ModuleNotFoundError"),
        ("def get_config():\n    return {'federated': {'roundz': 3}}\n", "did you mean federated.rounds?"),
        ("def get_config():\n    return {'federated': 3}\n", "federated=3 is a section"),
        ("def get_config():\n    return {'fill_mask': 'no mask'}\n", "fill_mask='no mask': accepted: sentences with [MASK]"),
    ],
)
def test_a_config_file_that_is_none(tmp_path, text, words):
    (tmp_path / "c.py").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load("--config", str(tmp_path / "c.py"))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_config_file_that_is_not_there(tmp_path):
    missing = [
        (tmp_path / "no.py", "does not exist"),
        ("x" * 5000, "does not exist"),
        ("/dev/null", "is no file"),
        (tmp_path, "is a directory"),
    ]
    for name, words in missing:
        with pytest.raises(ConfigError, match=words):
            load("--config", str(name))


# --- help ------------------------------------------------------------------------------------------------------------


def test_help_has_every_key_with_its_default_and_its_comment():
    told = flags.tell_about(flags.parse(["--config.bogus=1", "--help"]), "how it is used")
    assert told is not None and told.startswith("how it is used\n")
    lines = {line.split("=")[0].strip(): line for line in told.splitlines() if re.match(r"  [a-z_.0-9]+=", line)}
    assert list(lines) == all_keys() and len(lines) > 90
    for line in lines.values():
        assert len(line.rpartition(") ")[2]) > 2, f"a key without a comment: {line}"
    assert lines["federated.rounds"].startswith("  federated.rounds=140  (an integer) how long the run is")
    assert "  data.source='docs:'  (text) docs:[PACKAGE,...] | text:GLOB" in told
    # A comment of two lines above a key, and section and flag descriptions.
    assert "trained at every step; merged a copy a client, averaged with the round" in lines["federated.body"]
    assert "data: Where the text comes from" in told and "--join_timeout SECONDS" in told


def test_the_list_of_keys_and_the_version_need_no_config():
    listed = flags.tell_about(flags.parse(["--list_keys"]), "")
    assert listed is not None and len(listed.splitlines()) == len(all_keys())
    assert {"data.seq_len=128", "data.tokenizer='train:4096'", "federated.num_clients=None"} <= set(listed.splitlines())
    assert re.fullmatch(r"fedbert_jax \d+\.\d+\.\d+", flags.tell_about(flags.parse(["--version"]), "") or "")
    assert flags.tell_about(flags.parse(["--workdir", "w"]), "") is None

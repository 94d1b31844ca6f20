"""The length of a run follows from its text; the numbers here are worked out by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from corpus import write_corpus
from test_main import load

from fedbert_jax import experiment as run_lib
from fedbert_jax.config import as_begun, from_dict, to_dict, work_out
from fedbert_jax.errors import UserError
from fedbert_jax.workdir.paths import Workdir, check_same


def config(strategy: str = "parallel", federated: dict | None = None, **sections: dict):
    shape = dict(strategy=strategy, epochs=3.0, local_steps=5, batch_size=2)
    return from_dict(dict(federated=shape | (federated or {}), **sections))


@pytest.mark.parametrize(
    "changes, blocks, clients, rounds",
    [
        ({}, 400, 4, 30),  # 3 x 400 blocks; a round takes 4 x 5 x 2 = 40 of them
        ({}, 401, 4, 31),  # 1,203: thirty rounds leave three blocks
        (dict(epochs=0.07, local_steps=1, batch_size=1), 100, 1, 7),  # 0.07 * 100 is 7.000000000000001 in floats
        (dict(clients_per_round=2), 400, 4, 60),
        (dict(max_clients_per_round=2), 400, 4, 60),
        (dict(max_clients_per_round=9), 400, 4, 30),
        (dict(strategy="centralized"), 400, 4, 30),
        (dict(strategy="sequential"), 400, 4, 30),
        (dict(strategy="local", max_clients_per_round=2), 400, 4, 30),  # each has a model of its own: all take part
        (dict(epochs=None, rounds=12), 400, 4, 12),
    ],
)
def test_rounds_by_hand(changes, blocks, clients, rounds):
    assert work_out(config(federated=changes), blocks, clients).federated.rounds == rounds


def test_the_cohort_is_written_down_where_it_is_limited():
    limited = config(federated=dict(max_clients_per_round=2))
    assert work_out(limited, 400, 4).federated.clients_per_round == 2
    assert work_out(limited, 400, 2).federated.clients_per_round is None  # all two of them


def test_saves_evaluations_and_warm_up_are_shares_of_the_run():
    sections = dict(eval=dict(times=20), checkpoint=dict(times=4), client_optimizer=dict(warmup=0.1))
    found = work_out(config(**sections), 400, 4)  # 30 rounds of 5 steps
    assert (found.eval.every_rounds, found.checkpoint.every_rounds) == (2, 8)  # 15 evaluations and 4 saves, at most 20 and 4
    assert (found.client_optimizer.warmup_steps, found.server_optimizer.warmup_steps) == (15, 100)
    turns = work_out(config("sequential", **sections), 400, 4)  # each round has 4 turns of 5 steps
    assert turns.client_optimizer.warmup_steps == 60
    short = work_out(config(federated=dict(epochs=0.1), **sections), 10, 4)
    assert (short.federated.rounds, short.eval.every_rounds, short.client_optimizer.warmup_steps) == (1, 1, 0)


def test_a_run_goes_on_with_what_it_began_with():
    given = config(client_optimizer=dict(warmup=0.1))
    begun = work_out(given, 400, 4)
    assert as_begun(given, begun).federated.rounds == 30
    check_same(begun, given)  # what was worked out doesn't count as a difference
    longer = dataclasses.replace(given, federated=dataclasses.replace(given.federated, epochs=6.0))
    with pytest.raises(UserError, match=r"federated\.epochs \(was 3\.0, now 6\.0\); --config\.resume=force"):
        check_same(begun, longer)
    resumed = work_out(longer, 400, 4, begun)
    assert resumed.federated.rounds == 60
    assert resumed.client_optimizer.warmup_steps == 15  # the warm-up is over and stays as long as it was


def test_a_run_is_built_with_as_many_rounds_as_its_text_asks_for(tmp_path: Path):
    file = write_corpus(tmp_path, clients=3, documents=12)
    given = load(file, federated__epochs=2.0, federated__max_clients_per_round=2, eval__times=5, fill_mask=())
    workdir = Workdir(tmp_path / "w")
    workdir.root.mkdir()
    built = run_lib.build(given, workdir)
    blocks = json.loads((workdir.data / "meta.json").read_text())["clients"]
    total = sum(client["train_blocks"] for client in blocks)
    rounds = -(-2 * total // (2 * 2 * 2))  # a round: 2 clients, 2 steps, 2 blocks
    assert (built.config.federated.rounds, built.simulation.feed.cohort) == (rounds, 2)
    assert built.config.eval.every_rounds == -(-rounds // 5)
    workdir.write_config(built.config)
    assert run_lib.build(given, workdir).config == built.config == workdir.read_config()
    assert json.loads(workdir.config.read_text())["federated"]["rounds"] == rounds
    assert from_dict(to_dict(built.config)) == built.config


# --- before any text is read -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(data__tokenizer="{}/nowhere"), r"nowhere': there is no such directory"),
        (dict(data__tokenizer="{}/words", model__vocab_size=9), r"model\.vocab_size=9: accepted: at least 10"),
        (dict(data__tokenizer="{}/words", fill_mask=("a " * 40 + "[MASK]",)), r"\[MASK\] among the first 32 tokens"),
        (dict(data__tokenizer="", model__init_from="{}/nowhere"), r"model\.init_from='.*nowhere'.*no such directory"),
        (dict(data__tokenizer="{}/words", model__init_from="{}/bert"), "accepted: BERT"),
        (dict(mesh__model=3), r"mesh\.model=3"),
    ],
)
def test_what_needs_no_text_is_refused_before_it_is_read(tmp_path, monkeypatch, changes, words):
    file = write_corpus(tmp_path, clients=1, documents=2)
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcde"]) + "\n")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "gpt2"}')
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(run_lib, "prepare", lambda *_, **__: pytest.fail("the text was read"))

    def here(value):
        return value.format(tmp_path) if isinstance(value, str) else value

    given = load(file, **{key: here(value) for key, value in changes.items()})
    workdir = Workdir(tmp_path / "w")
    workdir.root.mkdir()
    with pytest.raises(UserError, match=words):
        run_lib.build(given, workdir)


def test_a_workdir_whose_path_is_not_utf8_is_refused_in_a_sentence(tmp_path):
    from fedbert_jax.workdir.paths import open_workdir

    with pytest.raises(UserError, match=r"caf\\xe9 has bytes in its path that are not UTF-8"):
        open_workdir(tmp_path / "caf\udce9")

"""What a server records is what the simulation's round sends, and an audit of it reads the text that the clients have."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from parties import NAMES, Hall, Party, Place, all_end_well
from safetensors import safe_open
from safetensors.numpy import save_file
from sentences import write_glue, write_tokenizer

from fedbert_jax.audit.command import main
from fedbert_jax.audit.recorded import Recordings
from fedbert_jax.audit.replay import replay
from fedbert_jax.audit.source import Source
from fedbert_jax.errors import ConfigError, UserError
from fedbert_jax.experiment import build
from fedbert_jax.join import join
from fedbert_jax.report.audits import read_audit
from fedbert_jax.runtime.agreement import agreed
from fedbert_jax.runtime.credentials import seal
from fedbert_jax.serve import serve
from fedbert_jax.workdir.paths import Workdir

CASES = {
    "parameters": dict(wire__microbatches=2, federated__weighting="uniform"),
    "sequential": dict(federated__strategy="sequential", wire__downlink="all"),
}
SHORT = dict(federated__rounds=3, eval__every_rounds=3)
SMALL = ("--blocks", "12", "--log", "60", "--known_blocks", "3")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("recorded"))


def workdirs(place: Place, where: str) -> list[Path]:
    return [place.root / where / name for name in NAMES]


def federate(place: Place, name: str) -> None:
    """Trains with a server that records."""
    hall, changes = Hall(), CASES[name] | SHORT
    server = place.serve(name, hall.listen, audit__record=True, **changes)
    all_end_well(*(place.join(name, one, hall.connect(one), privacy__client_seed=5, **changes) for one in NAMES), server)
    assert f"keeps messages, from which text can be read, in {place.root / name}" in server.said.getvalue().replace("\n", "")


@pytest.fixture(scope="module", params=CASES)
def trained(request, place) -> tuple[str, Any, Source]:
    """A federation whose server records; and the same training, simulated."""
    name, changes = request.param, CASES[request.param] | SHORT
    federate(place, name)
    changes.pop("wire__microbatches", None)
    alike = dict(data__source=f"text:{place.root / 'text'}", data__deduplicate_across=False, privacy__client_seed=5)
    run = build(place.config(**changes, **alike), Workdir(place.root / name / "simulated"))
    state = run.simulation.init_state()
    begun = jax.tree.map(jnp.copy, state)
    for round in range(2):
        state, _ = run.simulation.run_round(state, round)
    return name, begun, Source(
        config=run.config, setting=run.simulation.setting, mesh=run.simulation.mesh, tokenizer=run.tokenizer,
        vocab_size=run.dataset.vocab_size, special_ids=run.dataset.special_ids, text=(), state=state, round=2,
        segments={}, clients=NAMES, replayed=2, before=(1, 0), cohort=run.simulation.feed.draw,
    )  # fmt: skip


@pytest.mark.slow
def test_what_is_recorded_is_what_the_simulated_round_sends(trained, place):
    name, begun, source = trained
    expected = replay(source)
    recordings = Recordings(place.root / name / "server", 2, workdirs(place, name))
    found = recordings.replay()
    loose = dict(rtol=2e-3, atol=2e-5)
    assert expected.messages.h.std() > 0.5
    for field in ("client", "positions"):
        np.testing.assert_array_equal(getattr(found.messages, field), getattr(expected.messages, field), err_msg=field)
    for field in ("h", "z"):
        np.testing.assert_allclose(getattr(found.messages, field), getattr(expected.messages, field), err_msg=field, **loose)
    scale = np.abs(expected.messages.dz).max()
    np.testing.assert_allclose(found.messages.dz / scale, expected.messages.dz / scale, **loose)
    for own, theirs in zip(found.truth, expected.truth, strict=True):
        np.testing.assert_array_equal(own, theirs)
    assert found.aggregate.views.keys() == expected.aggregate.views.keys()
    np.testing.assert_array_equal(found.aggregate.held, expected.aggregate.held)
    for view, seen in expected.aggregate.views.items():
        np.testing.assert_allclose(found.aggregate.views[view] / seen.max(), seen / seen.max(), rtol=0.02, atol=2e-3)
    log, truth = recordings.log(60)
    assert len(log.h) == 8 and recordings.source.before == (0,)  # two steps of two clients' two blocks, of the first round
    first = replay(dataclasses.replace(source, state=begun, replayed=0))
    np.testing.assert_allclose(log.h, first.messages.h, **loose)
    np.testing.assert_array_equal(truth.original, first.truth.original)


@pytest.fixture(scope="module")
def server(place) -> Path:
    """A recording server's workdir; its clients' are beside it."""
    if not (place.root / "parameters").exists():
        federate(place, "parameters")
    return place.root / "parameters" / "server"


def audited(server: Path, *given: str, clients: Sequence[str | Path] = NAMES) -> str:
    """Runs the command, and returns what it has printed."""
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rich.console.Console.print", lambda self, *a, **k: said.append(str(a[0]) if a else ""))
        assert main([str(server), "--clients", ",".join(str(server.parent / c) for c in clients), *SMALL, *given]) == 0
    return "\n".join(said)


@pytest.mark.slow
def test_the_command_reads_the_clients_text_off_what_a_server_has_recorded(server):
    knows = "segment,old_segment,seed,checkpoint,known_text,aggregator,neighbour"
    said = audited(server, "--knows", knows, "--out", f"{server}/audit")
    by = {(row["knows"], row["attack"]): row for row in read_audit(server)}
    assert by["segment", "nearest"]["top1"] == 1.0 == by["segment", "nearest"]["exact"]
    assert by["segment", "gradient"]["top1"] > 0.98 and by["old_segment", "nearest"]["top1"] > 0.95
    assert (
        by["seed", "nearest"]["top1"] < 0.05 < by["known_text", "known words"]["top1"]
    )  # the clients' secret isn't the seed
    assert {"words by move", "words by moments"} <= {attack for _, attack in by} and by["segment", "nearest"]["round"] == 2
    assert "8 blocks of 2 clients" in said and "checkpoint: left out, since training began with random numbers" in said
    assert "the log is of 8 blocks, from the rounds recorded after 0, as their segments made them" in said


def test_a_client_that_is_not_given_is_not_attacked(server):
    said = audited(server, "--knows", "segment,aggregator", "--out", f"{server}/audit", clients=NAMES[1:])
    assert "4 blocks of 1 clients" in said
    words = next(row for row in read_audit(server) if row["attack"] == "words by move")
    assert words["count"] == 1
    assert "no earlier round is recorded" in audited(server, "--round", "0", "--knows", "segment")


def change(workdir: Path, file: str, change: Callable[[Any], Any]) -> None:
    """Changes an object in a file of JSON."""
    value = json.loads((workdir / file).read_text())
    change(value)
    (workdir / file).write_text(json.dumps(value))


def other_secret(client: Path, folder: Path) -> Path:
    """Returns a copy of a client's workdir whose masks are others."""
    copy = shutil.copytree(client, folder / "secret" / client.name)
    for file, section in (("config.json", "privacy"), ("data/meta.json", "origin")):
        change(copy, file, lambda value: value[section].update(client_seed=6))  # noqa: B023
    return copy


def without(server: Path, folder: Path, lost: str) -> Path:
    """Returns a copy of a server's workdir whose recorded rounds lack the tensors whose names a regular expression finds."""
    copy = shutil.copytree(server, folder / "server", ignore=shutil.ignore_patterns("checkpoints", "audit"))
    for file in (copy / "recorded").iterdir():
        with safe_open(file, framework="np") as opened:
            kept = {key: opened.get_tensor(key) for key in list(opened.keys()) if not re.search(lost, key)}
            meta = opened.metadata()
        save_file(kept, file, meta)
    return copy


def test_without_a_segment_at_the_server_nobody_knows_one(server, tmp_path):
    """As where the server averages without seeing; whose text it is, positions still tell."""
    copy, clients = without(server, tmp_path, "segment|opt"), [server.parent / name for name in NAMES]
    knows = ("--knows", "segment,old_segment,aggregator,known_text", "--out", f"{copy}/audit")
    said = audited(copy, *knows, clients=clients)
    assert "segment: left out, since the server holds none" in said and "old_segment: left out" in said
    assert "aggregator: left out" in said and {row["knows"] for row in read_audit(copy)} == {"known_text"}
    with pytest.raises(UserError, match="the text there isn't what was recorded"):
        main([str(copy), "--clients", str(other_secret(clients[0], tmp_path))])


def test_a_client_that_was_left_out_of_the_rest_of_a_round_is_read_as_far_as_it_came(server, tmp_path):
    """The second one's second step has no second microbatch, and nothing came of it at the end."""
    copy = without(server, tmp_path, "^1/1/1/|^1/2/")
    found = Recordings(copy, 2, [server.parent / name for name in NAMES]).replay()
    np.testing.assert_array_equal(found.messages.client, [0, 0, 1, 1, 0, 0])
    assert len(found.aggregate.held) == len(found.aggregate.views["move"]) == 1


def test_a_mistake_is_one_sentence(server, place, tmp_path):
    north, south = (server.parent / name for name in NAMES)
    other = shutil.copytree(north, tmp_path / "other" / north.name)
    change(other, "run.json", lambda facts: facts.update(run="another"))
    text = shutil.copytree(north, tmp_path / "text" / north.name)
    tokens = np.load(text / "data" / "train.npy")
    np.save(text / "data" / "train.npy", np.where(tokens > 5, (tokens + 1) % 190 + 5, tokens))  # the same special tokens
    secret = other_secret(north, tmp_path)
    bare = shutil.copytree(server, tmp_path / "bare", ignore=shutil.ignore_patterns("checkpoints", "recorded"))
    run = tmp_path / "run"
    run.mkdir()
    Workdir(run).write_config(place.config(data__source="text:x"))
    both = f"{north},{south}"
    for given, said in (
        (
            [server],
            "scoring needs the text behind it, from the clients' workdirs (--clients DIR,DIR,...): so only a rehearsal",
        ),
        ([north], f"{north} is a client's workdir (task='join'), which has no messages of others; audit its server's"),
        ([run, "--clients", north], "--clients: accepted with a server's workdir (task='serve')"),
        ([bare, "--clients", both], "has no recorded rounds: a server records messages with --config.audit.record=True"),
        ([server, "--clients", both, "--round", "1"], "--round 1: it is not recorded; accepted: 0, 2"),
        ([server, "--clients", both, "--config.wire.noise=1"], "--config.wire.noise: accepted with what was recorded: none"),
        ([server, "--clients", server], "it is a workdir of task='serve'; accepted: those of task='join'"),
        (
            [server, "--clients", other],
            "'client_0' has no part in the server's training; accepted: the workdirs of client_0",
        ),
        ([server, "--clients", f"{north},{north}"], "the workdir of 'client_0' is given twice"),
        ([server, "--clients", f"{secret},{south}"], "these clients don't have the same secret"),
        ([server, "--clients", secret], f"--clients {secret}: the text there isn't what was recorded of round "),
        ([server, "--clients", text], f"--clients {text}: the text there isn't what was recorded of round "),
    ):
        with pytest.raises((UserError, ConfigError)) as error:
            main([str(word) for word in given])
        assert said in str(error.value) and "\n" not in str(error.value)


def test_the_clients_secret_is_that_of_their_credentials(server, tmp_path):
    folder, key = tmp_path / "credentials", ec.generate_private_key(ec.SECP256R1())
    folder.mkdir()
    pem = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / f"{NAMES[0]}.key").write_bytes(key.private_bytes(*pem))
    (folder / "group.sealed").write_bytes(seal((5).to_bytes(32, "big"), key.public_key()))
    client = shutil.copytree(server.parent / NAMES[0], tmp_path / NAMES[0])
    change(client, "config.json", lambda config: config["privacy"].update(client_seed=None))
    with pytest.raises(UserError, match="client_seed"):
        Recordings(server, 2, [client])
    change(client, "config.json", lambda config: config["network"].update(credentials=str(folder)))
    assert set(Recordings(server, 2, [client]).replay().messages.client) == {0}


def test_only_a_server_records(place):
    with pytest.raises(
        ConfigError, match=r"^config key audit\.record=True: accepted: False with task='join': only a server"
    ):
        place.config(task="join", data__source="text:x", audit__record=True)
    assert "audit.record" not in agreed(place.config(task="serve", federated__num_clients=2, audit__record=True))


def test_a_classifiers_federation_is_read_too(place, tmp_path):
    """One that averages gradients, with everything rounded on the way."""
    write_tokenizer(tmp_path)
    values = SHORT | dict(data__tokenizer=str(tmp_path), data__seq_len=32, federated__rounds=1, eval__max_blocks=64)
    values |= dict(federated__average="gradients", wire__codec="bfloat16", wire__gradient_codec="bfloat16")
    source, hall = f"glue:SST-2@{write_glue(tmp_path)}", Hall()
    serving = place.config(task="serve", federated__num_clients=2, audit__record=True, data__source="glue:SST-2", **values)
    joining = place.config(task="join", data__source=source, **values)
    server = Party(lambda stop, console: serve(serving, tmp_path / "server", console, hall.listen, stop))
    begin = lambda name: Party(lambda stop, out: join(joining, tmp_path / name, out, hall.connect(name), stop))  # noqa: E731
    all_end_well(*map(begin, NAMES), server)
    facts = [(tmp_path / name / "run.json").stat().st_mtime_ns for name in NAMES]
    knows = ("--knows", "segment,seed,aggregator", "--out", f"{tmp_path}/server/audit")
    assert "8 blocks of 2 clients" in audited(tmp_path / "server", *knows)
    by = {(row["knows"], row["attack"]): row for row in read_audit(tmp_path / "server")}
    assert by["segment", "nearest"]["exact"] == 1.0 == by["seed", "nearest"]["exact"]  # the first round's segment
    assert by["segment", "gradient"]["top1"] > 0.9 and by["segment", "gradient"]["count"] == 8
    aggregate = Recordings(tmp_path / "server", None, [tmp_path / name for name in NAMES]).replay().aggregate
    # A classifier's word table has a gradient at the words of its text alone. The first five are special tokens.
    np.testing.assert_array_equal(aggregate.views["gradient"][:, 5:] > 0, aggregate.held[:, 5:])
    assert aggregate.held.any() and not aggregate.held.all() and ("aggregator", "words by gradient") in by
    assert facts == [(tmp_path / name / "run.json").stat().st_mtime_ns for name in NAMES]

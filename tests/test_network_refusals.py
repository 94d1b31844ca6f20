"""Bad input of a federation's parties: each is one sentence and exit code 2 of the real command, before any training."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from network import NORTH, SOUTH, Network, Party
from processes import free_port
from provisioned import provisioned
from test_status import scraped

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    made = Network(tmp_path_factory.mktemp("refusals"))
    for federation in ("ours", "theirs"):
        provisioned(made.folder / federation, (NORTH, SOUTH))
    (made.folder / "text" / "small").mkdir()
    (made.folder / "text" / "small" / "all.txt").write_text("too little")
    yield made
    made.end()


@pytest.fixture(scope="module")
def refused(network: Network) -> dict[str, Party]:
    """Who is refused, by what is wrong; all at the same time, and by one server with certificates."""
    folder, metrics = network.folder, free_port()
    ours = {"network__credentials": folder / "ours" / "server", "network__metrics_port": metrics}
    server = network.start("serve", "server", **ours)
    server.until("listening at 127.0.0.1:")
    mine = lambda name, federation="ours": folder / federation / name  # noqa: E731
    one = {"network__credentials": mine(NORTH), "network__name": NORTH}
    away = free_port()
    started = {
        "port": network.start("serve", "port"),
        "schedule": network.start("serve", "schedule", federated__schedule_from=1),
        "away": network.start("join", "away", network__port=away, network__patience=0.5, data__source="text:x"),
        "name": network.start("join", "name", **one | {"network__name": "hamilton"}),
        "nobody": network.start("join", "nobody", network__credentials=folder / "nowhere", network__name=NORTH),
        "other": network.start("join", "other", **one | {"network__credentials": mine(NORTH, "theirs")}),
        "small": network.start("join", "small", **one),
        "config": network.start(
            "join", SOUTH, network__credentials=mine(SOUTH), federated__local_steps=3, mlm__mask_prob=0.2
        ),
    }
    codes = {what: party.wait() for what, party in started.items()}
    assert codes == dict.fromkeys(started, 2), {what: party.said() for what, party in started.items()}
    assert scraped(metrics)["fedbert_round"] == 0 and scraped(metrics)["fedbert_clients_here"] == 0
    return started


@pytest.mark.parametrize(
    "what, words",
    [
        ("port", "config keys network.host='127.0.0.1', network.port={port}: another program may have it."),
        ("schedule", "config key federated.schedule_from=1: accepted: 0, the finished rounds."),
        ("away", "no server answers at 127.0.0.1:"),
        ("name", "config key network.credentials='{folder}/ours/client_0': "),
        ("nobody", "config key network.credentials='{folder}/nowhere': {folder}/nowhere/ca.crt can't be read ("),
        (
            "other",
            "the server at 127.0.0.1:{port} refuses 'client_0': the server's certificate is not of the federation of "
            "ca.crt.",
        ),
        ("small", "data.source='text:{folder}/text/small'"),
        (
            "config",
            "the server refuses 'client_1': the configs differ: federated.local_steps=3 (the server has 2), "
            "mlm.mask_prob=0.2 (the server has 0.15).",
        ),
    ],
)
def test_it_is_one_sentence_and_nothing_was_trained(network, refused, what, words):
    party, place = refused[what], network.place(SOUTH if what == "config" else what)
    told = [line for line in party.said().splitlines() if line.startswith("error: ")]
    assert told == [party.last()] and "Traceback" not in party.said()
    assert words.format(port=network.port, folder=network.folder) in party.last() and party.last().endswith(".")
    assert not (place / "metrics.jsonl").exists() and not (place / "hf").exists()


def test_the_server_has_heard_of_nobody(network, refused):
    lines = (network.place("server") / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["begun"]
    said = (network.folder / "runs" / "server.log").read_text()
    assert "Traceback" not in said and "ssl" not in said.lower()
    assert not (Path(network.place("server")) / "checkpoints" / "1").exists()

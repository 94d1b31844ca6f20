"""A federation of real processes: whoever is killed, stopped or out of room and started again, it ends with the same model.

The parties are `python -m fedbert_jax.main` with a model of one small layer (tests/network.py).
"""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from leaks import runs_in, text_in, windows
from network import NORTH, SOUTH, Network
from proxy import Proxy

from fedbert_jax.data.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow
PARTIES = (("serve", "server"), ("join", NORTH), ("join", SOUTH))


class Undisturbed:
    """A federation in which nothing went wrong, and all bytes that its clients and its server have sent one another."""

    def __init__(self, folder: Path):
        network = Network(folder)
        try:
            with Proxy(network.port, keep=True) as proxy:
                here = {"network__port": proxy.port}
                parties = [network.start(task, name, **(here if task == "join" else {})) for task, name in PARTIES]
                assert [party.wait() for party in parties] == [0, 0, 0], [party.said() for party in parties]
                assert proxy.kept is not None
                self.bytes = bytes(proxy.kept)
        finally:
            network.end()
        assert network.model(NORTH) == network.model(SOUTH)
        self.model = network.model(NORTH)
        self.text = [path.read_text() for path in sorted(folder.glob("text/*/all.txt"))]
        tokenizer = load_tokenizer(str(folder / "tokenizer"))
        self.ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in self.text]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture(scope="module")
def model(undisturbed: Undisturbed) -> bytes:
    """The model of that federation."""
    return undisturbed.model


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    made = Network(tmp_path)
    yield made
    made.end()


def test_what_crosses_holds_no_text_and_no_run_of_its_token_ids(undisturbed):
    """Of the real command, in clear, as somebody on the line would read it: names, headers, and all that gRPC adds."""
    for word in (
        b"/fedbert.Federation/message",
        b"activations",
        b"head_gradient",
        b"trained_segment/embeddings/word/embedding",
        b"sums",
    ):
        assert word in undisturbed.bytes  # it is the whole of it, with nothing compressed
    assert len(undisturbed.bytes) > 200_000 and sum(map(len, undisturbed.ids)) > 2000
    for text, ids in zip(undisturbed.text, undisturbed.ids, strict=True):
        runs = windows(np.array([ids]), 8, stride=8)  # a block of 16 has one of them, wherever it begins
        assert text_in([undisturbed.bytes], [text]) == [] and runs_in([undisturbed.bytes], runs) == []
        assert text_in([undisturbed.bytes + text[100:130].encode()], [text]) != []
        assert runs_in([undisturbed.bytes + runs[5].astype("<u2").tobytes()], runs) != []


def events(network: Network) -> list[tuple[str, int]]:
    """What the server's journal says: events and rounds."""
    lines = (network.place("server") / "events.jsonl").read_text().splitlines()
    return [(e["event"], e["round"]) for e in map(json.loads, lines)]


def test_kill_9_of_a_client_between_forward_and_backward_and_in_its_upload(network, model):
    server = network.start("serve", "server")
    south = network.start("join", SOUTH)
    south.until(f"training with {SOUTH} waits for 1 more client; it doesn't go on without")
    for place in ("between:1", "upload:2"):
        north = network.start("join", NORTH, falls=place)
        assert north.wait() == -signal.SIGKILL, north.said()
    north = network.start("join", NORTH)
    assert [server.wait(), north.wait(), south.wait()] == [0, 0, 0], (server.said(), north.said(), south.said())
    assert network.model(NORTH) == network.model(SOUTH) == model
    said = north.said()
    assert said.count("falls ") == 2 and "falls between Forward and Backward, round 1, message 3" in said
    sent, whole = map(int, re.findall(r"falls in Upload, round 2, with (\d+) of (\d+) bytes sent", said)[0])
    assert 0 < sent < whole
    assert f"round 2 begins again: {NORTH} came back" in server.said()
    assert f"round 3 begins again: {NORTH} came back" in server.said()
    assert events(network).count(("again", 1)) == events(network).count(("again", 2)) == 1


def test_kill_9_of_the_server_in_a_step_and_in_a_checkpoint_write(network, model):
    """The clients call until it is there again; it goes on after the newest checkpoint that is whole."""
    often = {"checkpoint__every_rounds": 1}
    north, south = network.start("join", NORTH), network.start("join", SOUTH)
    for place in ("step:2", "save:3"):
        server = network.start("serve", "server", falls=place, **often)
        assert server.wait() == -signal.SIGKILL, server.said()
    server = network.start("serve", "server", **often)
    assert [server.wait(), north.wait(), south.wait()] == [0, 0, 0], (server.said(), north.said(), south.said())
    assert network.model(NORTH) == network.model(SOUTH) == model
    said = server.said()
    assert "falls in a step, round 2, step 1" in said and "falls in a checkpoint write: ['3.orbax-checkpoint-tmp" in said
    # The save of round 2 is under way in the background when the server falls for the first time, or it is whole.
    first, second = re.findall(r"resuming after round (\d) of 4", said)
    assert first in "12" and second == "2"
    assert "no answer from the server (" in north.said() and "the server answers again" in north.said()
    # Of the round after which it fell in a write, the journal has nothing yet.
    assert [r for e, r in events(network) if e == "round"] == [0, 1, *([1] if first == "1" else []), 2, 3]


def test_full_disks_a_signal_to_either_side_and_a_damaged_checkpoint(network, model):
    """Each is a sentence, and nobody's work is lost."""
    often = {"checkpoint__every_rounds": 1}
    full = "a file would be larger than is allowed there; raise the limit (ulimit -f) and run the same command again."
    north, south = network.start("join", NORTH), network.start("join", SOUTH)

    server = network.start("serve", "server", falls="full:1", **often)
    assert server.wait() == 2
    assert server.last() == f"error: {network.place('server')}/checkpoints/1 can't be written: {full}"

    server = network.start("serve", "server", falls="term:2", **often)
    assert [server.wait(), north.wait(), south.wait()] == [128 + signal.SIGTERM, 4, 4]
    assert server.said().endswith(
        "ends with the round under way\nstopped after round 3; the same command goes on from there\n"
    )
    stopped = "error: the server has stopped after round 3 of 4; the same command goes on when it is back."
    assert north.last() == south.last() == stopped

    newest = network.place("server") / "checkpoints" / "3"
    largest = max((f for f in newest.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    damaged = bytearray(largest.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    largest.write_bytes(damaged)
    server = network.start("serve", "server", **often)
    north = network.start("join", NORTH, falls="term_client:2")
    south = network.start("join", SOUTH, falls="full_export")
    assert server.wait() == 2
    assert server.last().startswith(f"error: checkpoint {newest} is damaged")
    assert server.last().endswith("; delete that directory to go on from round 2.")
    shutil.rmtree(newest)

    server = network.start("serve", "server", **often)
    assert north.wait() == 128 + signal.SIGTERM
    assert north.last() == "stopped after round 3; the same command goes on from there"
    north = network.start("join", NORTH)
    assert south.wait() == 2
    assert south.last() == f"error: the model can't be written to {network.place(SOUTH)}/hf (File too large (os error 27))."
    south = network.start("join", SOUTH)
    assert [server.wait(), north.wait(), south.wait()] == [0, 0, 0], (server.said(), north.said(), south.said())
    assert network.model(NORTH) == network.model(SOUTH) == model
    assert "Traceback" not in server.said() + north.said() + south.said()


def test_in_turn_all_end_with_one_model(network):
    """Whoever has its turn first holds what others have trained further since."""
    parties = [network.start(task, name, federated__strategy="sequential") for task, name in PARTIES]
    assert [party.wait() for party in parties] == [0, 0, 0], [party.said() for party in parties]
    assert network.model(NORTH) == network.model(SOUTH)
    assert [e for e, _ in events(network)].count("round") == 4 and "again" not in dict(events(network))

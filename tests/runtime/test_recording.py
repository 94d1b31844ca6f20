"""What a server keeps of messages: whole rounds of one epoch each, the newest of them, whatever happens to anybody."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import toy
from safetensors.numpy import save_file
from toy import NAMES, SIZE, STEPS

from fedbert_jax.errors import UserError
from fedbert_jax.runtime.frames import Schema, TensorSpec
from fedbert_jax.runtime.recording import Recorder, read_recorded, recorded_rounds
from fedbert_jax.runtime.service import Service
from fedbert_jax.runtime.session import Session
from fedbert_jax.runtime.turns import Barrier, Compute, Id, Rules

SENT = {"forward": "activations", "backward": "head_gradient", "upload": "trained_segment/x"}
ANSWERED = {"forward": "hidden_states", "backward": "input_gradient", "upload": "segment/x"}
SAID = json.dumps({"members": ["a"], "shares": [1.0], "roster": ["a"], "run": "r"})
# The epoch crosses as a number that no message of a step has.
EPOCH = {"sums": TensorSpec("int32", ())}


class Engine(toy.Work):
    """The toy's arithmetic with the names of the real messages, each of which also says of which epoch it is."""

    def __init__(self, checkpoint: Path | None, rounds: int, every: int, keep: int):
        super().__init__(checkpoint)
        self.roster, self.f = NAMES, SimpleNamespace(rounds=rounds)
        self.s = SimpleNamespace(config=SimpleNamespace(checkpoint=SimpleNamespace(every_rounds=every, keep=keep)))

    @property
    def state(self) -> Any:
        return SimpleNamespace(segment={"x": self.client}, segment_opt=(), body={"y": self.body})

    def schema(self, barrier: Barrier) -> Schema:
        return {SENT[barrier.phase]: toy.X["x"]} | EPOCH

    def compute(self, what: Compute) -> tuple[dict[str, Any], Callable[[], None]]:
        phase = what.barrier.phase
        plain = {c: {"x": m[SENT[phase]]} for c, m in what.messages.items()}
        answers, keep = super().compute(what._replace(messages=plain))
        return {c: {ANSWERED[phase]: answer["x"]} for c, answer in answers.items()}, keep


class Part(toy.Part):
    def run_round(self, held: Any, id: Any, members: Any, me: Any, weight: Any, evaluates: bool, wire: Any) -> Any:
        def post(at: Any, tensors: Any) -> Any:
            phase = "upload" if at.at == 2 * STEPS else ("forward", "backward")[at.at % 2]
            sent = {SENT[phase]: tensors["x"], "sums": np.asarray(at.epoch, np.int32)}
            future = wire.post(at, sent)
            return SimpleNamespace(result=lambda: {"x": future.result()[ANSWERED[phase]]})

        return super().run_round(held, id, members, me, weight, evaluates, SimpleNamespace(post=post))


def serve(folder: Path, rounds: int = 3, every: int = 1, keep: int = 9, checkpoint: Path | None = None) -> Service:
    engine: Any = Engine(checkpoint, rounds, every, keep)
    recorder = Recorder(engine, folder, engine.round, "the run")
    rules = Rules(quorum=3, deadline=20.0, join_grace=20.0)
    epoch = int(time.time() * 1000) % 2**30
    session = Session(NAMES, rounds, rules, lambda round: NAMES, toy.script, epoch=epoch, round=engine.round)
    return Service(session, recorder, toy.HELLO._replace(secret=""), toy.X)


def train(service: Service, **parts: Part) -> dict[str, Any]:
    return toy.run(service, {c: toy.Local(service, c) for c in NAMES}, {c: parts.get(c, Part(c)) for c in NAMES})


def epochs(folder: Path, round: int) -> set[int]:
    return {int(m["sums"]) for m in read_recorded(folder, round).messages.values()}


def test_a_round_is_kept_as_it_came(tmp_path):
    service = serve(tmp_path / "r")
    assert set(train(service).values()) == {None}
    found = read_recorded(tmp_path / "r", 0)
    assert found[:3] == (0, NAMES, NAMES) and found.run == "the run" and sum(found.shares.values()) == pytest.approx(1)
    assert found.messages.keys() == {(c, k, 0) for c in range(3) for k in range(STEPS + 1)}
    for c in range(3):
        h = np.random.default_rng([0, c]).normal(size=(4, SIZE)).astype(np.float32)  # as `toy.Part` draws it
        np.testing.assert_array_equal(found.messages[c, 0, 0]["activations"], h)
        np.testing.assert_array_equal(found.messages[c, 0, 0]["hidden_states"], h)  # plus a body of zeros
        np.testing.assert_array_equal(found.messages[c, 0, 0]["head_gradient"], h / 2)
        assert found.messages[c, STEPS, 0].keys() == {"trained_segment/x", "sums"}
    np.testing.assert_array_equal(found.began["began/segment/x"], np.ones(SIZE))
    np.testing.assert_array_equal(found.began["began/body/y"], np.zeros(SIZE))
    later = read_recorded(tmp_path / "r", 1, ("activations",))
    assert not np.array_equal(later.began["began/body/y"], np.zeros(SIZE))
    assert {name for message in later.messages.values() for name in message} == {"activations"}
    assert (
        later.has("activations")((0, 0, 0))
        and not later.has("activations", "head_gradient")((0, 0, 0))
        and not later.has("activations")((0, STEPS, 0))
    )


def test_kept_are_the_first_round_those_after_checkpoints_and_the_last_as_many_as_checkpoints(tmp_path):
    for keep, kept in ((9, [0, 3, 4]), (2, [3, 4])):
        train(serve(tmp_path / str(keep), rounds=5, every=3, keep=keep))
        assert recorded_rounds(tmp_path / str(keep)) == kept
        assert len([*(tmp_path / str(keep)).iterdir()]) == len(kept)


def test_a_round_that_begins_again_has_nothing_of_its_first_beginning(tmp_path):
    """A client's process dies in the midst of a round, and comes back."""
    service, back = serve(tmp_path / "r"), list[threading.Thread]()

    def dies(phase: str, round: int, step: int) -> None:
        if (phase, round, step) == ("backward", 1, 2) and not back:
            again = toy.participant("adams", toy.Local(service, "adams"), Part("adams"))
            back.append(threading.Thread(target=again.run, daemon=True))
            back[0].start()
            raise RuntimeError("it is killed")

    ends = train(service, adams=Part("adams", dies))
    back[0].join(20)
    assert [str(end) for end in ends.values()].count("it is killed") == 1
    assert "again" in [event["event"] for event in service.session.events]
    found = [epochs(tmp_path / "r", round) for round in recorded_rounds(tmp_path / "r")]
    assert [len(some) for some in found] == [1, 1, 1] and len(set.union(*found)) == 3
    assert len(read_recorded(tmp_path / "r", 1).messages) == 3 * (STEPS + 1)


def test_nothing_is_kept_of_what_did_not_count(tmp_path):
    """A client takes no part when its round begins again, and a result comes too late."""
    engine: Any = Engine(None, rounds=1, every=1, keep=1)
    recorder = Recorder(engine, tmp_path / "r", 0, "the run")

    def forward(epoch: int, who: tuple[str, ...], step: int) -> Callable[[], None]:
        every_other = np.arange(8 * SIZE, dtype=np.float32).reshape(4, -1)[:, ::2]
        messages = {c: {"activations": every_other, "sums": np.asarray(epoch, np.int32)} for c in who}
        return recorder.compute(Compute(Id(epoch, 0, 0), Barrier("forward", step, who), who, messages))[1]

    recorder.begin(0, NAMES, toy.BLOCKS)
    forward(1, NAMES, 0)()
    recorder.begin(0, NAMES[:2], toy.BLOCKS)
    forward(2, NAMES[:2], 0)()
    forward(2, NAMES[:2], 1)  # which nobody keeps
    recorder.finish_round()
    found = read_recorded(tmp_path / "r", 0)
    assert (
        found.messages.keys() == {(0, 0, 0), (1, 0, 0)}
        and found.members == NAMES[:2]
        and found.shares.keys() == set(NAMES[:2])
    )
    assert epochs(tmp_path / "r", 0) == {2}
    np.testing.assert_array_equal(found.messages[0, 0, 0]["activations"][0], np.arange(0, 2 * SIZE, 2))


def test_a_server_that_comes_back_makes_the_rounds_after_its_checkpoint_again(tmp_path):
    folder, checkpoint = tmp_path / "r", tmp_path / "checkpoint"
    first = serve(folder, rounds=2, checkpoint=checkpoint)
    train(first)
    kept = (folder / "round_000000.safetensors").read_bytes()
    (folder / "round_000007.safetensors.new").write_bytes(b"half")
    # It has gone back to the end of round 1, as if it was killed before it saved the end of round 2.
    checkpoint.write_text(checkpoint.read_text().replace('"round": 2', '"round": 1'))
    second = serve(folder, rounds=3, checkpoint=checkpoint)
    assert [path.name for path in folder.iterdir()] == ["round_000000.safetensors"]
    train(second)
    assert recorded_rounds(folder) == [0, 1, 2] and (folder / "round_000000.safetensors").read_bytes() == kept
    assert len(set.union(*(epochs(folder, round) for round in range(3)))) == 3
    assert min(epochs(folder, 1)) > max(epochs(folder, 0)) + 1


def test_what_another_version_recorded_is_one_sentence(tmp_path):
    """Whose messages had other names: that is no client without messages."""
    save_file({"0/0/0/up/h": np.zeros(2, np.float32)}, tmp_path / "round_000000.safetensors", {"said": SAID})
    with pytest.raises(UserError, match=r"was recorded by another version of fedbert_jax: it knows a message 'up'"):
        read_recorded(tmp_path, 0)


def test_a_damaged_file_is_one_sentence(tmp_path):
    (tmp_path / "round_000004.safetensors").write_bytes(b"half of it")
    (tmp_path / "round_x.safetensors").write_bytes(b"")
    assert recorded_rounds(tmp_path) == [4] and recorded_rounds(tmp_path / "none") == []
    with pytest.raises(UserError, match=r"round_000004\.safetensors can't be read: it is damaged or not all there"):
        read_recorded(tmp_path, 4)

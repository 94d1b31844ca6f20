"""Faults of a federation, over function calls and over gRPC: nobody's work is lost, and what is done again ends the same.

Arithmetic stands in for the model (tests/toy.py); everything else is the real thing, processes that are killed included.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import toy
from forking import await_stop, environment, start
from toy import NAMES, ROUNDS, STEPS, Local, Part, same

from fedbert_jax.errors import UserError
from fedbert_jax.runtime.calls import Abort
from fedbert_jax.runtime.frames import TensorSpec, decode, encode
from fedbert_jax.runtime.grpc import Client, Server
from fedbert_jax.runtime.service import Service
from fedbert_jax.runtime.turns import DONE


@pytest.fixture(scope="module")
def quiet() -> toy.Work:
    """The work of a federation in which nothing went wrong."""
    service, work = toy.make()
    ends = toy.run(service, {name: Local(service, name) for name in NAMES})
    assert ends == dict.fromkeys(NAMES) and work.round == ROUNDS
    assert len(work.history) == ROUNDS * (2 * STEPS + 1)
    return work


@pytest.fixture(params=["local", "grpc"])
def connect(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A function that connects clients to a service, by either transport."""
    closing: list[Any] = []

    def call(service: Service) -> dict[str, Any]:
        if request.param == "local":
            return {name: Local(service, name) for name in NAMES}
        server = Server(service, "127.0.0.1", 0)
        clients = {name: Client("127.0.0.1", server.port, name, None, 1 << 20) for name in NAMES}
        closing.extend([*clients.values(), server])
        return clients

    yield call
    for thing in closing:
        thing.close() if isinstance(thing, Client) else thing.stop(0)


def test_it_is_the_same_over_either_transport(connect, quiet):
    service, work = toy.make()
    assert toy.run(service, connect(service)) == dict.fromkeys(NAMES)
    assert same(work, quiet) and work.history == quiet.history


# --- lost replies, crashes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", range(6))
def test_lost_answers_change_nothing(quiet, at):
    service, work = toy.make()
    transports = {name: Local(service, name) for name in NAMES}
    count = 0

    def trouble(phase: str, round: int, step: int) -> None:
        nonlocal count
        count += 1
        if count % 6 == at:
            transports["adams"].lose_answers_of |= {"message", "turn", "segment"}

    ends = toy.run(service, transports, {"adams": Part("adams", trouble)})
    assert ends == dict.fromkeys(NAMES) and same(work, quiet) and work.history == quiet.history


class Crash(Exception):
    """A client's process ends."""


@pytest.mark.parametrize(
    "phase, step", [("forward", 0), ("forward", 2), ("backward", 1), ("upload", STEPS), ("done", STEPS)]
)
def test_a_client_that_crashes_and_comes_back_changes_nothing(connect, quiet, phase, step):
    """Before a message, between forward and backward, in the upload, and after it: the round is done again."""
    service, work = toy.make()
    transports, crashed = connect(service), []

    def trouble(now: str, round: int, k: int) -> None:
        if (now, round, k) == (phase, 1, step) and not crashed:
            crashed.append(True)
            raise Crash

    def again() -> None:
        with pytest.raises(Crash):
            toy.participant("adams", transports["adams"], Part("adams", trouble)).run()
        toy.participant("adams", transports["adams"]).run()

    thread = threading.Thread(target=again, daemon=True)
    thread.start()
    ends = toy.run(service, {name: transports[name] for name in NAMES[1:]})
    thread.join(20)
    assert crashed and ends == dict.fromkeys(NAMES[1:]) and same(work, quiet)


def test_of_two_processes_of_one_name_the_later_one_stays(quiet):
    """The earlier one is told, and ends; the round is done again with the other."""
    service, work = toy.make()
    transports = {name: Local(service, name) for name in NAMES}
    ends: dict[str, Any] = {}

    def run(which: str, part: Part) -> None:
        try:
            toy.participant("adams", transports["adams"], part).run()
            ends[which] = None
        except UserError as error:
            ends[which] = str(error)

    def another(phase: str, round: int, step: int) -> None:
        if (phase, round, step) == ("forward", 1, 1):
            thread = threading.Thread(target=run, args=("later", Part("adams")), daemon=True)
            thread.start()
            while not service.session._replaced:
                time.sleep(0.01)

    thread = threading.Thread(target=run, args=("earlier", Part("adams", another)), daemon=True)
    thread.start()
    others = toy.run(service, {name: transports[name] for name in NAMES[1:]})
    thread.join(20)
    assert others == dict.fromkeys(NAMES[1:]) and same(work, quiet)
    assert "another process has joined as 'adams' since" in ends["earlier"]


def test_the_first_segment_may_be_brought_twice(connect):
    """Two clients are asked for it at the same time, or the answer to one of them gets lost; the first one's stays."""
    large = {"x": TensorSpec("float32", (1 << 17,))}
    made, work = toy.make()
    brought: list[Any] = []
    service = Service(made.session, work, made.hello, toy.X, segment=large, on_segment=brought.append)
    transports = connect(service)
    for name in NAMES:
        meta = toy.HELLO._asdict() | {"incarnation": name, "blocks": 7}
        answer, _ = decode(transports[name].call("join", encode(meta), 5), 1 << 16)
        assert answer["bring"]
    for n, name in enumerate(NAMES):
        transports[name].call("bring", encode({}, {"x": np.full(1 << 17, n, np.float32)}), 5)
    assert len(brought) == 1 and not brought[0]["x"].any()


# --- stragglers, quorum, leaving -------------------------------------------------------------------------------------


def reckoned(members_of: Any) -> tuple[np.ndarray, np.ndarray]:
    """What a federation with this membership ends with, without a session: (round, phase, step) -> who is there."""
    body, client = np.zeros(toy.SIZE, np.float32), np.ones(toy.SIZE, np.float32)
    for round in range(ROUNDS):
        drawn = {c: np.random.default_rng([round, NAMES.index(c)]) for c in NAMES}
        own, start = dict.fromkeys(NAMES, client), members_of(round, "forward", 0)
        for k in range(STEPS):
            h = {c: drawn[c].normal(size=(4, toy.SIZE)).astype(np.float32) * own[c] for c in start}
            z = {c: h[c] + body for c in members_of(round, "forward", k)}
            dz = {c: z[c] * np.float32(0.5) for c in members_of(round, "backward", k)}
            weights = np.array([toy.BLOCKS[c] for c in dz], np.float64)
            total = sum(toy.BLOCKS[c] for c in start)
            weights = (weights / total).astype(np.float32)
            weights /= weights.sum()
            means = np.stack([x.mean(0) for x in dz.values()])
            body = np.float32(0.9) * body + np.float32(0.1) * np.tensordot(weights, means, 1)
            own |= {c: own[c] - np.float32(0.01) * (2 * dz[c]).mean(0) for c in dz}
        there = members_of(round, "upload", STEPS)
        weights = np.array([toy.BLOCKS[c] / sum(toy.BLOCKS[d] for d in start) for c in there], np.float32)
        weights /= weights.sum()
        client = np.tensordot(weights, np.stack([own[c] for c in there]), 1)
    return body, client


def test_the_reckoning_is_the_federations(quiet):
    body, client = reckoned(lambda round, phase, step: NAMES)
    np.testing.assert_allclose(quiet.body, body, rtol=1e-5)
    np.testing.assert_allclose(quiet.client, client, rtol=1e-5)


def test_a_straggler_is_left_out_of_its_round_alone(connect):
    """It equals a run in which it was there until then, and again from the next round on."""
    service, work = toy.make(quorum=2, deadline=1.0)
    held = threading.Event()

    def trouble(phase: str, round: int, step: int) -> None:
        if (phase, round, step) == ("backward", 1, 1):
            held.wait(20)

    def free() -> None:
        while not any(e["event"] == "dropped" for e in service.session.events):
            time.sleep(0.001)
        held.set()

    threading.Thread(target=free, daemon=True).start()
    ends = toy.run(service, connect(service), {"adams": Part("adams", trouble)})
    assert ends == dict.fromkeys(NAMES)
    dropped = [e for e in service.session.events if e["event"] == "dropped"]
    assert [(e["client"], e["round"]) for e in dropped] == [("adams", 1)]

    def members(round: int, phase: str, step: int) -> tuple[str, ...]:
        gone = round == 1 and (step > 1 or (step == 1 and phase == "backward"))
        return NAMES[1:] if gone else NAMES

    assert work.history[9 + 3] == ("backward", 1, NAMES[1:]) and work.history[9 + 2] == ("forward", 1, NAMES)
    body, client = reckoned(members)
    np.testing.assert_allclose(work.body, body, rtol=1e-5)
    np.testing.assert_allclose(work.client, client, rtol=1e-5)


def test_one_leaves_for_good_and_the_others_go_on(connect):
    service, work = toy.make(quorum=2)
    transports = connect(service)

    def trouble(phase: str, round: int, step: int) -> None:
        if (phase, round, step) == ("forward", 1, 2):
            transports["adams"].call("leave", encode({}), 5)
            raise Crash

    ends = toy.run(service, transports, {"adams": Part("adams", trouble)})
    assert isinstance(ends.pop("adams"), Crash) and ends == dict.fromkeys(NAMES[1:])
    assert work.round == ROUNDS and {h[2] for h in work.history[9 + 5 :]} == {NAMES[1:]}
    with pytest.raises(UserError, match="has left this federation for good"):
        toy.participant("adams", transports["adams"]).join()


def test_below_the_quorum_it_waits_and_goes_on_with_who_comes_back(connect, quiet):
    service, work = toy.make(quorum=3, deadline=0.1)
    transports, ready = connect(service), threading.Event()

    def trouble(phase: str, round: int, step: int) -> None:
        if (phase, round, step) == ("backward", 1, 0) and not ready.is_set():
            ready.set()
            raise Crash

    def again() -> None:
        with pytest.raises(Crash):
            toy.participant("adams", transports["adams"], Part("adams", trouble)).run()
        while not any(e["event"] == "waiting" for e in service.session.events):
            time.sleep(0.01)
        toy.participant("adams", transports["adams"]).run()

    thread = threading.Thread(target=again, daemon=True)
    thread.start()
    ends = toy.run(service, {name: transports[name] for name in NAMES[1:]})
    thread.join(20)
    assert ends == dict.fromkeys(NAMES[1:]) and same(work, quiet) and not thread.is_alive()


def test_draining_ends_with_the_round_and_the_next_server_goes_on(connect, quiet, tmp_path):
    service, work = toy.make(tmp_path / "c.json")

    def trouble(phase: str, round: int, step: int) -> None:
        if (phase, round, step) == ("forward", 1, 1):
            service.drain()

    ends = toy.run(service, connect(service), {"adams": Part("adams", trouble)})
    assert ends == dict.fromkeys(NAMES) and work.round == 2 and service.session.state == DONE
    began = time.monotonic()
    service.farewell(60.0)  # all have heard that it stops, and nobody has anything to fetch
    assert time.monotonic() - began < 30
    service, work = toy.make(tmp_path / "c.json")
    toy.run(service, connect(service))
    assert same(work, quiet) and len(work.history) == 2 * STEPS + 1


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "x, words",
    [
        (np.full((4, toy.SIZE), np.nan, np.float32), "not finite"),
        (np.full((4, toy.SIZE), 1e9, np.float32), "too large"),
        (np.zeros((4, toy.SIZE - 1), np.float32), "expected: float32"),
        (np.zeros((4, toy.SIZE), np.int32), "expected: float32"),
    ],
)
def test_a_client_that_sends_nonsense_is_refused_and_changes_nothing(connect, quiet, x, words):
    """It may mend what it sends: nothing of the round is lost."""
    service, work = toy.make()
    transports, said = connect(service), []

    class Odd(Part):
        def run_round(self, held, id, members, me, weight, evaluates, wire):
            if id.round == 1 and not said:
                with pytest.raises(Abort) as refused:
                    wire.post(id, {"x": x}).result()
                said.append(refused.value)
            return super().run_round(held, id, members, me, weight, evaluates, wire)

    assert toy.run(service, transports, {"adams": Odd("adams")}) == dict.fromkeys(NAMES)
    assert said[0].code == "INVALID_ARGUMENT" and words in said[0].text and "forward, step 0 of round 2" in said[0].text
    assert same(work, quiet)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(version="0.0.1"), "fedbert_jax 0.0.1 here, 0 at the server"),
        (dict(config={"federated.rounds": 9}), r"the configs differ: federated\.rounds=9 \(the server has 3\)"),
        (dict(config={"federated.rounds": ROUNDS, "x": 1}), r"the configs differ: x=1 \(the server has None\)"),
        (dict(tokenizer="other"), "the tokenizers differ"),
        (dict(secret="other"), r"privacy\.client_seed differs"),
        (dict(blocks=0), "declares 0 blocks"),
        (dict(blocks="many"), "declares 'many' blocks"),
        (dict(blocks=-1), "declares -1 blocks"),
        (dict(blocks=2**40), "declares 1099511627776 blocks"),  # its weight would leave the others nothing
        (dict(blocks=1.5), r"declares 1\.5 blocks"),
    ],
)
def test_who_does_not_agree_is_refused_when_it_joins(connect, change, words):
    service, _ = toy.make()
    transports = connect(service)
    toy.participant("jefferson", transports["jefferson"]).join()
    one = toy.participant("adams", transports["adams"])
    one.blocks = change.get("blocks", one.blocks)
    one.hello = one.hello._replace(**{key: value for key, value in change.items() if key != "blocks"})
    with pytest.raises(UserError, match=words):
        one.join()
    assert service.session.here() == ("jefferson",)


def test_ids_out_of_order_are_refused_and_an_id_is_answered_once(connect, quiet):
    """Early, late, of another epoch or round, twice with other content: none of it changes what is trained."""
    service, work = toy.make()
    transports, seen, others = connect(service), dict[str, Any](), set[str]()

    class Odd(Part):
        def run_round(self, held, id, members, me, weight, evaluates, wire):
            def send(n: float, **change: int) -> Any:
                """Returns the code of a refusal, or the answer."""
                x = np.full((4, toy.SIZE), n, np.float32)
                try:
                    found = transports[me].call("message", encode({"id": list(id._replace(**change))}, {"x": x}), 20)
                    return decode(found, 1 << 20)[1]["x"]
                except Abort as error:
                    return error.code

            if id.round == 1 and not seen:
                seen.update(future=send(1, at=1), far=send(1, at=99), negative=send(1, at=-1))
                seen.update(old=send(1, epoch=id.epoch - 1), new=send(1, epoch=id.epoch + 1), past=send(1, round=0))
                ended = super().run_round(held, id, members, me, weight, evaluates, wire)
                seen.update(last=send(1, at=2 * STEPS), first=send(1, at=0))
                return ended
            return super().run_round(held, id, members, me, weight, evaluates, wire)

    class Twice(Part):
        """Sends each message a second time, and then with another number in it."""

        def run_round(self, held, id, members, me, weight, evaluates, wire):
            class Both:
                def post(self, id, tensors):
                    first = wire.post(id, tensors).result()
                    again = wire.post(id, tensors)
                    np.testing.assert_array_equal(first["x"], again.result()["x"])
                    with pytest.raises(Abort) as refused:
                        wire.post(id, {"x": tensors["x"] + 1})
                    others.add(refused.value.code)
                    return again

            return super().run_round(held, id, members, me, weight, evaluates, Both())

    ends = toy.run(service, transports, {"adams": Odd("adams"), "jefferson": Twice("jefferson")})
    assert ends == dict.fromkeys(NAMES) and same(work, quiet) and work.history == quiet.history
    assert "ALREADY_EXISTS" in others and others <= {"ALREADY_EXISTS", "ABORTED"}
    assert {seen[key] for key in ("future", "far", "negative")} == {"FAILED_PRECONDITION"}
    assert {seen[key] for key in ("old", "new", "past")} == {"ABORTED"}
    assert seen["last"] in ("ALREADY_EXISTS", "ABORTED") and seen["first"] in ("ABORTED", "FAILED_PRECONDITION")


def test_a_stranger_and_an_unknown_call_are_refused(connect):
    service, _ = toy.make()
    transports = connect(service)
    stranger = toy.participant("adams", transports["adams"])
    stranger.line, stranger.name = toy.Line(Local(service, "hamilton"), 1, 1 << 20, 1.0, 5.0), "hamilton"
    with pytest.raises(UserError, match="'hamilton' is not in the roster"):
        stranger.join()
    for meta in ({}, {"incarnation": 1}, {"incarnation": "x", "patience": "long"}):
        with pytest.raises(Abort, match=r"meta data|has to join") as refused:
            transports["adams"].call("turn", encode(meta), 5)
        assert refused.value.code in ("INVALID_ARGUMENT", "FAILED_PRECONDITION")
    with pytest.raises(Abort, match="no call"):
        service.call("_wait", "adams", encode({}))


def test_what_is_held_stays_flat_over_two_hundred_rounds():
    service, work = toy.make(rounds=200)
    held: list[int] = []
    finish = work.finish_round
    work.finish_round = lambda: (finish(), held.append(service.session.held()), service.session.events.clear())[0]  # type: ignore
    before = threading.active_count()
    assert toy.run(service, {name: Local(service, name) for name in NAMES}) == dict.fromkeys(NAMES)
    assert len(held) == 200 and max(held[20:]) <= max(held[:20]) and threading.active_count() <= before


# --- processes that are killed ---------------------------------------------------------------------------------------


class Processes:
    """A server and clients in processes of their own."""

    def __init__(self, folder: Path):
        self.folder, self.port = folder, 0
        self.running: dict[str, Any] = {}
        self.said: dict[int, IO[str]] = {}  # by each process

    def start(self, kind: str, what: str, **given: Any) -> Any:
        command = [sys.executable, toy.__file__, kind, str(self.port), what, json.dumps(given)]
        said, says = os.pipe()
        with os.fdopen(says, "w") as log, (self.folder / "errors").open("a") as errors:
            process = start(command, environment(), log=log, errors=errors)
        self.said[process.pid] = os.fdopen(said)
        self.running[what] = process
        return process

    def server(self, **given: Any) -> Any:
        process = self.start("server", str(self.folder / "c.json"), **given)
        word, port = self.line(process).split()
        assert word == "UP"
        self.port = int(port)
        return process

    def line(self, process: Any) -> str:
        return self.said[process.pid].readline()

    def end(self) -> None:
        for process in self.running.values():
            process.kill()
            process.wait()
        for said in self.said.values():
            said.close()


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    made = Processes(tmp_path)
    yield made
    made.end()


def result(processes: Processes, server: Any) -> tuple[np.ndarray, np.ndarray, list[Any]]:
    """What a server ends with: body, segment, history."""
    word, _, text = processes.line(server).partition(" ")
    assert word == "END", (word, text)
    body, client, history = json.loads(text)
    return np.float32(body), np.float32(client), [(phase, step, tuple(who)) for phase, step, who in history]


def ended(processes: Processes, server: Any, quiet: toy.Work) -> bool:
    body, client, _ = result(processes, server)
    return np.array_equal(body, quiet.body) and np.array_equal(client, quiet.client)


def kill(process: Any) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("spot", [("forward", 1, 1), ("backward", 1, 1), ("upload", 1, 4)])
def test_kill_9_of_a_client(processes, quiet, spot):
    """Before it sends the message: the others wait, it comes back, and all ends as if nothing had been."""
    server = processes.server()
    victim = processes.start("client", "adams", spot=spot)
    for name in NAMES[1:]:
        processes.start("client", name)
    assert processes.line(victim).startswith("AT")
    kill(victim)
    processes.start("client", "adams")
    assert ended(processes, server, quiet)


@pytest.mark.slow
@pytest.mark.parametrize("spot", [("backward", 1, 1), ("upload", 1, 4), ("checkpoint", 1, 0)])
def test_kill_9_of_the_server(processes, quiet, spot):
    """In a step, in averaging, and while it writes its checkpoint: the next one goes on with the round."""
    server = processes.server(spot=spot)
    for name in NAMES:
        processes.start("client", name)
    assert processes.line(server).startswith("AT")
    kill(server)
    assert ended(processes, processes.server(), quiet)


# --- half-open connections: a process that is there and does nothing -------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("who", ["a client", "the server"])
def test_a_process_that_was_stopped_for_a_while_goes_on(processes, quiet, who):
    """Longer than it takes the others to notice that the connection is dead: they connect anew, and nothing is lost."""
    spot: dict[str, Any] = dict(spot=("backward", 1, 1), goes_on=True)
    server = processes.server(quick=True, **(spot if who == "the server" else {}))
    clients = {
        c: processes.start("client", c, quick=True, **(spot if (who, c) == ("a client", "adams") else {})) for c in NAMES
    }
    stopped = server if who == "the server" else clients["adams"]
    await_stop(stopped)
    if who == "the server":
        assert processes.line(clients["adams"]).startswith("no answer from the server (")
    else:
        time.sleep(3.0)
    stopped.send_signal(signal.SIGCONT)
    body, client, history = result(processes, server)
    assert np.array_equal(body, quiet.body) and np.array_equal(client, quiet.client) and history == quiet.history


@pytest.mark.slow
def test_the_others_go_on_without_a_client_that_was_stopped(processes):
    """With a quorum of two: it ends as a federation of that membership, and the third one gets the result when it wakes."""
    server = processes.server(rules=dict(quorum=2, deadline=2.0))
    stopped = processes.start("client", "adams", spot=("backward", 1, 1), goes_on=True)
    others = [processes.start("client", name) for name in NAMES[1:]]
    await_stop(stopped)
    assert [processes.line(other) for other in others] == ["END\n", "END\n"]
    stopped.send_signal(signal.SIGCONT)
    body, client, history = result(processes, server)
    assert [processes.line(stopped), stopped.wait(20)] == ["END\n", 0]
    there = {(n // (2 * STEPS + 1), phase, step): who for n, (phase, step, who) in enumerate(history)}
    assert len(there) == ROUNDS * (2 * STEPS + 1) and there[1, "backward", 1] == there[2, "upload", STEPS] == NAMES[1:]
    wanted = reckoned(lambda round, phase, step: there[round, phase, step])
    np.testing.assert_allclose(body, wanted[0], rtol=1e-5)
    np.testing.assert_allclose(client, wanted[1], rtol=1e-5)

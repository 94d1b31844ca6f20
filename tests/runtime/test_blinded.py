"""Blinded averaging over a network: the server reads nothing of what it adds up, and who leaves spoils nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from federation import NAMES, Federation, Local
from tiny import assert_trees_close, tiny_config

from fedbert_jax.data.streams import seeds_of
from fedbert_jax.errors import UserError
from fedbert_jax.federated.wire import MESSAGES
from fedbert_jax.privacy.pads import Pads
from fedbert_jax.runtime import frames
from fedbert_jax.runtime.blinded import PADDED, ROUND, SNAPSHOT, SUM
from fedbert_jax.runtime.participant import Participant
from fedbert_jax.runtime.turns import Barrier

SEALED = {f"{name}/{part}" for name in ("segment", "first_segment") for part in (SNAPSHOT, ROUND)}
# What else may cross: of a step, under pads, and sealed.
CLEAR = {"activations", "positions", "lengths", "hidden_states", "head_gradient", "input_gradient", "loss", "norm", "sums"}
CLEAR |= {PADDED, "nonce", SUM, "places", "nonces", "share", SNAPSHOT}
BLINDED = dict(averaging="blinded")
RESET = dict(client_optimizer_state="reset")
GRADIENTS = dict(average="gradients")


class Gone(Exception):
    """A client's process ends."""


class Repeatable(Federation):
    """A federation whose pads are the same each time."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.random = np.random.default_rng(5)
        self.lock = threading.Lock()

    def _bytes(self, count: int) -> bytes:
        with self.lock:
            return self.random.bytes(count)

    def pads(self) -> Pads:
        return Pads(seeds_of(self.config).client, "a run", self._bytes)


def federation(federated: dict[str, Any], rounds: int = 2, blinded: bool = True, **options: Any) -> Federation:
    privacy = dict(privacy=BLINDED) if blinded else {}
    return Repeatable(tiny_config(federated=dict(rounds=rounds) | federated, **privacy), **options)


class Recording(Local):
    """A transport that keeps every frame, either way."""

    def __init__(self, service: Any, name: str, kept: list[tuple[str, str, bytes]]):
        super().__init__(service, name)
        self.kept = kept

    def call(self, method: str, data: bytes, timeout: float) -> bytes:
        answer = super().call(method, data, timeout)
        self.kept += [(f"{method} up", self.name, data), (f"{method} down", self.name, answer)]
        return answer


def tensors_of(tree: Any) -> list[np.ndarray]:
    """The numbers of a pytree, tensor by tensor in the order of their names."""
    return [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]


def correlations(hidden: list[list[np.ndarray]], there: list[list[np.ndarray]]) -> Iterator[tuple[float, int]]:
    """Yields (r, how many numbers it is of) for each tensor, over all times, and for all tensors together.

    Each is compared as it is, with the signs, and rank by rank; all together by ranks alone, since tensors differ in size.
    """
    ranks = lambda x: np.argsort(np.argsort(x)) / len(x)  # noqa: E731
    whole: list[tuple[np.ndarray, np.ndarray]] = []
    for n in range(len(hidden[0])):
        x, y = np.concatenate([xs[n] for xs in hidden]), np.concatenate([ys[n] for ys in there])
        whole.append((ranks(x), ranks(y)))
        for a, b in ((x, y), (x, np.sign(y)), whole[-1]):
            if np.std(b) > 0:  # a LayerNorm's scales are all above 0
                yield float(np.corrcoef(a, b)[0, 1]), len(x)
    x, y = (np.concatenate(side) for side in zip(*whole, strict=True))
    yield float(np.corrcoef(x, y)[0, 1]), len(x)


@pytest.mark.parametrize("federated", [GRADIENTS, RESET])
def test_the_server_holds_and_is_sent_no_segment_no_average_and_no_gradient(federated, monkeypatch):
    f, kept = federation(federated, rounds=8 if "average" in federated else 16), list[tuple[str, str, bytes]]()
    sent: dict[str, list[list[np.ndarray]]] = {name: [] for name in NAMES}
    means: list[list[np.ndarray]] = []
    held: list[Any] = []
    made = f.participant

    def participant(name: str, transport: Any = None, **options: Any) -> Participant:
        found = made(name, Recording(f.service, name, kept), **options)
        blinded = found.member.blinded
        mean = blinded.mean

        def watched(numbers: Any, state: Any, weight: float, *rest: Any) -> Any:
            average, after = mean(numbers, state, weight, *rest)
            sent[name].append(tensors_of(numbers))
            if name == NAMES[0]:
                means.append(tensors_of(average))
            return average, after

        monkeypatch.setattr(blinded, "mean", watched)
        return found

    monkeypatch.setattr(f, "participant", participant)
    f.run(on_round=lambda name, round, ended: held.append(ended.held.segment) if name == NAMES[0] else None)
    ups: dict[str, list[list[np.ndarray]]] = {name: [] for name in NAMES}
    downs: dict[str, list[list[np.ndarray]]] = {name: [] for name in NAMES}
    for method, name, data in kept:
        _, tensors = frames.decode(data, 1 << 26)
        sealed = {n for n in tensors if n.split("/")[0] in ("segment", "first_segment")}
        assert sealed <= SEALED, (method, sorted(tensors))
        assert {n.split("/")[0] for n in tensors.keys() - sealed} <= CLEAR, (method, sorted(tensors))
        assert {MESSAGES[n.split("/")[0]] for n in tensors} <= {"down" if method.endswith("down") else "up"}
        whole = [x.ravel() for n, x in tensors.items() if n.startswith((f"{PADDED}/", f"{SUM}/")) and n.endswith("int32")]
        if whole:
            assert [*map(len, whole)] == [*map(len, means[0])]
            (downs if method.endswith("down") else ups)[name].append(whole)
    ends = [tensors_of(segment) for segment in held]
    per_round = len(means) // len(ends)
    segments = [ends[n // per_round] for n in range(len(means))]
    assert all(len(ups[name]) == len(downs[name]) == len(sent[name]) == len(means) for name in NAMES)
    together: list[tuple[float, int]] = []
    for name in NAMES:
        for there in (sent[name], means, segments):
            for hidden in (ups[name], downs[name]):
                found = [*correlations(hidden, there)]
                together.append(found[-1])
                assert found[-1][1] > 25_000 and abs(found[-1][0]) < 0.01 + 3 / np.sqrt(found[-1][1])
                assert all(abs(r) < 0.01 + 5 / np.sqrt(n) for r, n in found), (
                    name
                )  # of some thousand, one is that far at 5e-7
    rs, counts = zip(*together, strict=True)  # of ranks, whose spread is always the same: so r of all is the mean
    assert sum(counts) > 400_000 and abs(np.average(rs, weights=counts)) < 0.01
    # What is looked for is found where it is: of the sum of what was sent, without the pads, in every tensor.
    some = sent[NAMES[0]]
    for n in range(len(some[0])):
        leaky = [xs[:n] + [np.round(2.0**20 * ys[n])] + xs[n + 1 :] for xs, ys in zip(ups[NAMES[0]], some, strict=True)]
        assert any(abs(r) > 0.01 + 5 / np.sqrt(size) for r, size in correlations(leaky, some)), n
    # The bytes of no tensor of a segment, and of no gradient, move or mean of them, lie in a frame or in the server's state.
    state = f.engine.state
    assert state is not None and sorted(state.segment) == [ROUND, SNAPSHOT] and state.outer == () and state.segment_opt == ()
    memory = b"".join(data for _, _, data in kept) + b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(state))
    for segment in held:
        for path, x in jax.tree_util.tree_leaves_with_path(segment):
            assert np.asarray(x).size < 8 or np.asarray(x).tobytes()[:32] not in memory, path
    looked = 0
    for tensors in [means[0], means[-1], *(own[n] for own in sent.values() for n in (0, -1))]:
        for x in tensors:
            eight = next((x[n : n + 8] for n in range(0, len(x) - 7, 8) if x[n : n + 8].all()), None)  # zeros lie anywhere
            if eight is not None:
                looked += 1
                assert eight.astype(np.float32).tobytes() not in memory
    assert looked > 50


class Leaving(Local):
    """A transport of a client that leaves for good at a message of a round, before it sends it or once it is answered."""

    def __init__(self, service: Any, name: str, round: int, at: int, after: bool):
        super().__init__(service, name)
        self.round, self.at, self.after = round, at, after

    def call(self, method: str, data: bytes, timeout: float) -> bytes:
        meta, _ = frames.decode(data, 1 << 26)
        now = method == "message" and meta["id"][1:] == [self.round, self.at]
        answer = super().call(method, data, timeout) if self.after or not now else b""
        if now:
            self.service.remove(self.name)
            raise Gone(self.name)
        return answer


def ends(f: Federation, name: str, round: int, phase: str, step: int, after: bool) -> Any:
    """The segments with which those end who stay, where one leaves."""
    script = f.engine.script(NAMES, round, False)
    at = next(n for n, b in enumerate(script) if (b.phase, b.step) == (phase, step))
    participants = {n: f.participant(n, Leaving(f.service, n, round, at, after) if n == name else None) for n in NAMES}
    f.train(participants, excused=lambda n, error: isinstance(error, Gone))
    stayed = [n for n in NAMES if n != name]
    segments = [participants[n].held.segment for n in stayed]
    assert_trees_close(segments[1], segments[0], rtol=0, atol=0)
    assert all(participants[n].held.round == f.config.federated.rounds for n in stayed)
    return segments[0]


LEAVES = [
    (GRADIENTS, "forward", 0, False),
    (GRADIENTS, "contribute", 0, False),
    (GRADIENTS, "contribute", 1, True),  # its numbers are in the last sum
    (RESET, "upload", 2, False),
    (RESET, "upload", 2, True),
]


@pytest.mark.parametrize("federated, phase, step, after", LEAVES, ids=str)
def test_who_leaves_in_any_phase_spoils_no_sum(federated, phase, step, after):
    """The one who leaves is not the one that keeps the segment for others, so all goes on as with plain averaging."""
    leave = (NAMES[2], 1, phase, step, after)
    found = ends(federation(federated, quorum=None), *leave)
    wanted = ends(federation(federated, blinded=False, quorum=None), *leave)
    assert_trees_close(jax.device_get(found), jax.device_get(wanted), rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("federated", [GRADIENTS, RESET])
def test_a_round_begins_again_where_nobody_has_left_its_end_with_the_server(federated):
    """The first of those in the last sum leaves the next round's beginning with the server, sealed; here it goes instead."""
    f = federation(federated, quorum=None)
    found = ends(f, NAMES[0], 1, "keep", 2, after=False)
    wanted = ends(federation(federated, blinded=False, quorum=None), NAMES[0], 1, "forward", 0, after=False)
    assert_trees_close(jax.device_get(found), jax.device_get(wanted), rtol=1e-4, atol=2e-6)
    again = [e for e in f.session.events if e["event"] == "again"]
    assert [e["why"] for e in again] == ["the client that was to leave the segment here has gone"]


def test_rounds_that_are_skipped_leave_the_segment_where_it_was():
    """One leaves for good, so that rounds of which it would be the second client have no quorum; the others go on."""
    config = tiny_config(federated=dict(rounds=8, clients_per_round=2) | RESET, privacy=BLINDED)
    f = Repeatable(config, quorum=2)
    noted = f.service._on_round

    def on_round(round: int, members: tuple[str, ...]) -> None:
        noted(round, members)
        if round == 0:
            f.service.remove(NAMES[2])

    f.service._on_round = on_round
    participants = {n: f.participant(n) for n in NAMES}
    f.train(participants, excused=lambda name, error: name == NAMES[2] and isinstance(error, UserError))
    happened = [e["event"] for e in f.session.events if e["event"] in ("skipped", "round")]
    assert "skipped" in happened[:-1] and happened[-1] == "round", happened
    assert_trees_close(participants[NAMES[0]].held.segment, participants[NAMES[1]].held.segment, rtol=0, atol=0)


@pytest.mark.parametrize("blinded", [True, False])
def test_who_missed_a_round_that_was_made_again_goes_on_from_what_it_became(blinded):
    """The server goes back; the third client, who holds what the round had become before, comes for the next one."""
    before = federation(GRADIENTS, rounds=4, blinded=blinded)
    states: dict[int, Any] = {}
    noted = before.service._on_round
    before.service._on_round = lambda round, members: (states.update({round: before.engine.state}), noted(round, members))
    participants = {n: before.participant(n) for n in NAMES}

    def go(f: Federation, names: tuple[str, ...], rounds: int) -> None:
        failures: list[BaseException] = []

        def take_part(name: str) -> None:
            done: list[int] = []
            try:
                participants[name].run(on_round=lambda round, _: done.append(round), stop=lambda: len(done) == rounds)
            except BaseException as error:
                failures.append(error)
                f.service.stop()

        threads = [threading.Thread(target=take_part, args=(n,), daemon=True) for n in names]
        server = threading.Thread(target=f.service.run, daemon=True)
        for thread in (server, *threads):
            thread.start()
        for thread in threads:
            thread.join(60)
        while f.session.round > max(states, default=-1) + 1 and server.is_alive():
            server.join(0.01)
        f.service.stop()
        server.join(60)
        assert not failures, failures

    go(before, NAMES, 2)
    again = federation(GRADIENTS, rounds=4, blinded=blinded, state=states[0], done=1, join_grace=0.0, quorum=2)
    again.session.epoch, again.session.since = 1000, 1
    noted_again = again.service._on_round
    again.service._on_round = lambda round, members: (
        states.update({round: again.engine.state}),
        noted_again(round, members),
    )
    for participant in participants.values():
        participant.line._transport.service = again.service
    states.clear()
    go(again, NAMES[:2], 1)
    assert participants[NAMES[2]].held.round == participants[NAMES[0]].held.round == 2
    last = federation(GRADIENTS, rounds=4, blinded=blinded, state=states[1], done=2)
    last.session.epoch, last.session.since = 2000, again.session.since
    for participant in participants.values():
        participant.line._transport.service = last.service
    states.clear()
    last.service._on_round = lambda round, members: states.update({round: last.engine.state})
    go(last, NAMES, 2)
    first, _, third = (participants[n].held for n in NAMES)
    assert first.round == third.round == 4
    assert_trees_close(third.segment, first.segment, rtol=0, atol=0)
    assert_trees_close(third.opt, first.opt, rtol=0, atol=0)
    assert_trees_close(third.averaging, first.averaging, rtol=0, atol=0)


def test_who_comes_back_has_the_others_optimizer_and_ranges():
    f = federation(GRADIENTS)
    one, other = (f.participant(n).member for n in NAMES[:2])
    held = one.fresh()
    moved = held._replace(
        opt=jax.tree.map(lambda x: x + 3, held.opt), averaging=jax.tree.map(lambda x: x - 5, held.averaging), round=7
    )
    f.engine.begin_with(one.brought(moved))
    found = other.received(f.engine.segment(), None, 9)
    assert found.round == 9  # rounds may have been skipped
    assert_trees_close(
        (found.segment, found.opt, found.averaging), (moved.segment, moved.opt, moved.averaging), rtol=0, atol=0
    )


def test_numbers_beyond_their_range_do_not_turn_a_sum_around():
    f = federation(GRADIENTS)
    p = f.client_programs
    like = jax.tree.map(lambda x: np.full(x.shape, 1e6, np.float32), f.shapes.segment)
    averaging = p.new_averaging(like)
    parts = [jax.device_get(p.whole(like, averaging.ranges, np.float32(share))) for share in (0.5, 0.3, 0.2)]
    total = f.engine.programs.total(jax.tree.map(lambda *x: np.stack(x), *parts), np.array([0.5, 0.3, 0.2], np.float32))
    mean, ranges = p.mean_of(total, averaging.ranges, np.float32(1.0))
    for x in jax.tree.leaves(mean):
        np.testing.assert_allclose(x, 128.0, rtol=2e-3)
    assert set(np.asarray(ranges).tolist()) == {7 + 6}  # so that the next ones may be larger
    _, of_a_few = p.mean_of(total, averaging.ranges, np.float32(0.2))
    assert set(np.asarray(of_a_few).tolist()) == {7 + 6 + 3}


def test_who_comes_without_the_secret_reads_nothing():
    """It is refused when it joins; were it not, it could open neither what a round begins with nor a sum."""
    f = federation(RESET)
    stranger = f.participant(NAMES[0])
    stranger.member.blinded._pads = Pads(seeds_of(f.config).client + 1, "a run")
    f.engine.begin_with(f.participant(NAMES[1]).member.brought(f.participant(NAMES[1]).member.fresh()))
    with pytest.raises(UserError, match="can't be opened"):
        stranger.member.received(f.engine.segment(), None, 0)
    held = f.participant(NAMES[1]).member.received(f.engine.segment(), None, 0)
    assert_trees_close(held.segment, stranger.member.fresh().segment, rtol=0, atol=0)


def test_a_clients_pad_that_repeats_ends_its_part():
    """Its random numbers stand still: the second message would tell the server the difference of two gradients."""
    f = federation(GRADIENTS)
    stuck = Pads(seeds_of(f.config).client, "a run", lambda count: bytes(count))
    made = f.participant

    def participant(name: str, transport: Any = None, **options: Any) -> Participant:
        found = made(name, transport, **options)
        if name == NAMES[1]:
            found.member.blinded._pads = stuck
        return found

    f.participant = participant  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"a pad would be used twice|used a pad twice"):
        f.run()


def test_plain_averaging_takes_no_snapshot():
    """Nor does a server of it take a message as large as one."""
    f = federation(GRADIENTS, blinded=False)
    with pytest.raises(KeyError, match="keep"):
        f.engine.schema(Barrier("keep", 2, NAMES))
    largest = max(frames.size_of(f.engine.schema(b)) for b in f.engine.script(NAMES, 0, True))
    assert f.service.limit("message") < largest + 2**17

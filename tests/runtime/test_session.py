"""The session as a state machine: who is waited for, what is answered twice, and where a round begins again.

All of it without a clock, a thread or a socket: messages and the time are arguments.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedbert_jax.runtime.session import Session
from fedbert_jax.runtime.turns import DONE, ENROLLING, ROUND, Barrier, Id, Refused, Reply, Rules, Turn

NAMES = ("adams", "jefferson", "washington")
STEPS = 2


def together(members: tuple[str, ...], round: int) -> list[Barrier]:
    """Forward and backward in each step, then an upload: `parallel`."""
    steps = [Barrier(phase, k, members) for k in range(STEPS) for phase in ("forward", "backward")]
    return [*steps, Barrier("upload", STEPS, members)]


def in_turn(members: tuple[str, ...], round: int) -> list[Barrier]:
    return [Barrier(phase, k, (c,)) for c in members for k in range(STEPS) for phase in ("forward", "backward")]


def make(rounds: int = 3, script=together, cohort_of=lambda round: NAMES, **rules: Any) -> Session:
    rules = dict(quorum=2, deadline=10.0, join_grace=5.0) | rules
    return Session(NAMES, rounds, Rules(**rules), cohort_of, script)


def enrolled(**options: Any) -> Session:
    session = make(**options)
    for n, name in enumerate(NAMES):
        assert session.join(name, f"{name}-1", 10 + n, now=float(n)) is None
    return session


def here(session: Session, at: int | None = None) -> Id:
    return Id(session.epoch, session.round, session.at if at is None else at)


def compute(session: Session, now: float = 0.0) -> list[str] | None:
    """Computes what is due: the answer to a message is the message and the place, in a string."""
    what = session.due()
    if what is None:
        return None
    replies = {c: f"{m} at {what.id.at}" for c, m in what.messages.items()}
    assert session.computed(what, replies, now)
    return sorted(what.messages)


def barrier(session: Session, now: float = 0.0, leave_out: tuple[str, ...] = ()) -> None:
    """Sends the messages of all who are asked, and computes."""
    id = here(session)
    for c in session._barriers[session.at].who:
        if c in session.members and c not in leave_out:
            assert session.message(c, id, f"{c}'s", "digest", now) is None
    compute(session, now)


def code(found: Any) -> str:
    assert isinstance(found, Refused), found
    return found.code


# --- a round ---------------------------------------------------------------------------------------------------------


def test_a_round_begins_when_all_are_there_and_goes_on_when_all_have_sent():
    session = make()
    assert session.missing() == NAMES and session.state == ENROLLING
    for name in NAMES[:2]:
        session.join(name, "1", 10, now=0.0)
        assert session.state == ENROLLING
    assert session.next_turn("adams", "1", now=0.0) == Turn(ENROLLING, 0, 0, missing=("washington",), within=5.0)
    session.join("washington", "1", 10, now=1.0)
    assert session.state == ROUND and session.next_turn("adams", "1", 1.0) == Turn(ROUND, 1, 0, NAMES)
    id = here(session)
    for c in NAMES[:2]:
        assert session.message(c, id, c, "d", 1.0) is None
        assert session.due() is None and session.poll(c, id) is None
    assert session.late() == ("washington",)
    session.message("washington", id, "washington", "d", 1.0)
    what = session.due()
    assert what is not None and what.barrier.phase == "forward" and what.members == NAMES
    assert list(what.messages) == list(NAMES)  # in the roster's order, whoever came first
    assert session.due() is None  # it is under way
    assert session.poll("adams", id) is None
    session.computed(what, {c: c.upper() for c in NAMES}, 1.0)
    assert session.poll("adams", id) == Reply("ADAMS") and session.at == 1


def test_messages_are_in_the_rosters_order_however_they_arrive():
    session = enrolled()
    for c in ("washington", "adams", "jefferson"):
        session.message(c, here(session), c, "d", 0.0)
    what = session.due()
    assert what is not None and list(what.messages) == list(NAMES)


def test_rounds_follow_one_another_to_the_last():
    session = enrolled(rounds=2)
    for round in range(2):
        assert session.round == round
        for _ in range(2 * STEPS + 1):
            barrier(session)
    assert session.state == DONE and session.round == 2
    assert session.next_turn("adams", "adams-1", 0.0) == Turn(DONE, 2, 2)
    assert [e["round"] for e in session.events if e["event"] == "round"] == [0, 1]
    assert code(session.message("adams", here(session), "x", "d", 0.0)) == "ABORTED"


def test_clients_take_turns():
    session, phases = enrolled(rounds=1, script=in_turn), []
    while session.state == ROUND:
        (client,) = session._barriers[session.at].who
        others = [c for c in NAMES if c != client]
        assert all(code(session.message(c, here(session), "x", "d", 0.0)) == "FAILED_PRECONDITION" for c in others)
        assert session.message(client, here(session), "x", "d", 0.0) is None
        phases.append((client, session._barriers[session.at].phase))
        assert compute(session) == [client]
    assert phases == [(c, phase) for c in NAMES for _ in range(STEPS) for phase in ("forward", "backward")]


def test_a_cohort_is_part_of_the_roster():
    session = enrolled(cohort_of=lambda round: ("washington", "adams") if round else ("jefferson", "adams"))
    assert session.members == ("jefferson", "adams")
    assert session.next_turn("washington", "washington-1", 0.0).state == ENROLLING
    for _ in range(2 * STEPS + 1):
        barrier(session)
    assert session.members == ("washington", "adams") and session.state == ROUND


# --- messages: once, in order ----------------------------------------------------------------------------------------


def test_a_lost_reply_may_be_asked_for_again():
    session = enrolled()
    id = here(session)
    barrier(session)
    assert session.message("adams", id, "adams's", "digest", 0.0) is None  # sent again: taken for the same
    assert session.poll("adams", id) == Reply("adams's at 0") and session.at == 1 and session.due() is None
    assert code(session.message("adams", id, "other", "another digest", 0.0)) == "ALREADY_EXISTS"


def test_the_last_answer_of_a_round_may_be_lost_too():
    session = enrolled()
    for _ in range(2 * STEPS):
        barrier(session)
    last = here(session)
    barrier(session)
    assert session.round == 1 and session.poll("jefferson", last) == Reply(f"jefferson's at {2 * STEPS}")


def test_a_message_sent_twice_while_it_waits_counts_once():
    session = enrolled()
    for _ in range(3):
        assert session.message("adams", here(session), "x", "d", 0.0) is None
    assert code(session.message("adams", here(session), "y", "e", 0.0)) == "ALREADY_EXISTS"
    for c in NAMES[1:]:
        session.message(c, here(session), "x", "d", 0.0)
    assert compute(session) == sorted(NAMES)


@pytest.mark.parametrize(
    "epoch, round, at, wanted",
    [
        (0, 0, 1, "FAILED_PRECONDITION"),  # of a later barrier
        (0, 0, 99, "FAILED_PRECONDITION"),
        (0, 0, -1, "FAILED_PRECONDITION"),
        (0, 1, 0, "ABORTED"),  # of another round
        (1, 0, 0, "ABORTED"),  # of another epoch
        (-1, 0, 0, "ABORTED"),
    ],
)
def test_what_is_out_of_order_is_refused(epoch, round, at, wanted):
    session = enrolled()
    id = Id(session.epoch + epoch, round, at)
    assert code(session.message("adams", id, "x", "d", 0.0)) == wanted and session.expected("adams", id) is None
    assert session.late() == NAMES


def test_a_stale_message_is_refused():
    session = enrolled()
    stale = here(session)
    for _ in range(3):
        barrier(session)
    assert code(session.message("adams", stale, "x", "other", 0.0)) == "FAILED_PRECONDITION"


def test_strangers_and_those_who_have_not_joined_are_refused():
    session = make()
    for call in (
        session.join("hamilton", "1", 3, 0.0),
        session.message("hamilton", Id(0, 0, 0), "x", "d", 0.0),
    ):
        assert code(call) == "PERMISSION_DENIED"
    assert code(session.next_turn("adams", "1", 0.0)) == "FAILED_PRECONDITION"
    session.join("adams", "1", 3, 0.0)
    assert code(session.next_turn("adams", "2", 0.0)) == "FAILED_PRECONDITION"  # another process of that name


def test_microbatches_are_a_window():
    def script(members, round):
        steps = [(phase, part) for phase in ("forward", "backward") for part in (0, 1)]
        return [Barrier(phase, 0, members, part) for phase, part in steps]

    session = enrolled(script=script, window=2)
    first, second, third = (here(session, n) for n in range(3))
    for id in (second, first):
        assert session.expected("adams", id) is not None and session.message("adams", id, f"{id.at}", "d", 0.0) is None
    assert code(session.message("adams", third, "x", "d", 0.0)) == "FAILED_PRECONDITION"
    for c in NAMES[1:]:
        session.message(c, first, "x", "d", 0.0)
    assert compute(session) == sorted(NAMES) and session.at == 1 and session.due() is None
    assert session.poll("adams", first) == Reply("0 at 0") and session.poll("adams", second) is None
    assert session.message("adams", third, "x", "d", 0.0) is None


# --- who is late, gone, or back --------------------------------------------------------------------------------------


def test_who_is_late_is_left_out_and_comes_back_with_the_next_round():
    session = enrolled()
    barrier(session)
    id = here(session)
    for c in NAMES[:2]:
        session.message(c, id, "x", "d", 1.0)
    session.tick(now=9.9)
    assert session.due() is None
    session.tick(now=10.0)
    assert session.members == NAMES[:2] and compute(session, 10.0) == ["adams", "jefferson"]
    assert code(session.message("washington", here(session), "x", "d", 11.0)) == "ABORTED"
    assert session.next_turn("washington", "washington-1", 11.0).state == ENROLLING
    for _ in range(2 * STEPS - 1):
        barrier(session, 11.0)
    assert session.round == 1 and session.members == NAMES
    assert session.next_turn("washington", "washington-1", 11.0).state == ROUND


def test_who_waits_for_an_answer_and_is_not_late_gets_it():
    session = enrolled()
    id = here(session)
    session.message("adams", id, "x", "d", 0.0)
    session.message("jefferson", id, "x", "d", 0.0)
    session.tick(now=12.0)
    compute(session, 12.0)
    assert session.poll("adams", id) == Reply("x at 0")
    assert code(session.poll("washington", id)) == "ABORTED"


def test_each_barrier_has_its_own_deadline():
    session = enrolled()
    for now in (8.0, 16.0, 24.0):
        barrier(session, now)
        session.tick(now + 1)
    assert session.members == NAMES


def test_below_the_quorum_those_who_are_late_are_waited_for():
    session = enrolled()
    session.message("adams", here(session), "x", "d", 0.0)
    for now in (11.0, 22.0, 33.0):
        session.tick(now)
    assert session.members == NAMES and session.due() is None
    assert [e for e in session.events if e["event"] == "waiting"][-1]["clients"] == ("jefferson", "washington")
    for c in NAMES[1:]:
        session.message(c, here(session), "x", "d", 34.0)
    assert compute(session, 34.0) == sorted(NAMES)


def test_a_round_begins_without_those_who_are_not_there_after_their_grace():
    session = make()
    session.join("adams", "1", 1, now=0.0)
    session.tick(100.0)
    assert session.state == ENROLLING  # no quorum
    session.join("jefferson", "1", 1, now=100.0)
    assert session.state == ROUND and session.members == NAMES[:2]  # whose grace has passed
    session.join("washington", "1", 1, now=101.0)
    assert session.members == NAMES[:2]
    for _ in range(2 * STEPS + 1):
        barrier(session, 102.0)
    assert session.members == NAMES


def test_the_grace_begins_anew_with_each_round():
    session = enrolled()
    session.leave("washington", 0.0)
    session = make(join_grace=5.0)
    for name in NAMES[:2]:
        session.join(name, "1", 1, now=0.0)
    session.tick(4.9)
    assert session.state == ENROLLING
    session.tick(5.0)
    assert session.state == ROUND
    for _ in range(2 * STEPS + 1):
        barrier(session, 50.0)
    assert session.state == ENROLLING and session.missing() == ("washington",)
    session.tick(54.9)
    assert session.state == ENROLLING
    session.join("washington", "1", 1, now=54.9)
    assert session.members == NAMES


def test_who_comes_back_from_a_crash_has_the_round_begun_again():
    """What it kept for its next half is lost; the others are told to begin again, too."""
    session = enrolled()
    barrier(session)
    id = here(session)
    session.message("adams", id, "x", "d", 0.0)
    epoch = session.epoch
    session.join("washington", "washington-2", 12, now=1.0)
    assert (session.round, session.at, session.epoch) == (0, 0, epoch + 1) and session.members == NAMES
    assert code(session.poll("adams", id)) == "ABORTED"
    assert session.next_turn("adams", "adams-1", 1.0) == Turn(ROUND, epoch + 1, 0, NAMES)
    assert code(session.message("adams", id, "x", "d", 1.0)) == "ABORTED"
    for _ in range(2 * STEPS + 1):
        barrier(session, 2.0)
    assert session.round == 1


def test_a_result_of_before_the_round_began_again_counts_for_nothing():
    session = enrolled()
    for c in NAMES:
        session.message(c, here(session), "x", "d", 0.0)
    what = session.due()
    assert what is not None
    session.join("adams", "adams-2", 10, now=0.0)
    assert not session.computed(what, dict.fromkeys(NAMES, "late"), 0.0)
    assert session.at == 0 and session.late() == NAMES
    barrier(session)
    assert session.at == 1


def test_who_joins_late_waits_for_the_next_round():
    session = make()
    for name in NAMES[:2]:
        session.join(name, "1", 1, 0.0)
    session.tick(5.0)
    barrier(session, 5.0)
    epoch = session.epoch
    session.join("washington", "1", 1, 6.0)
    assert session.epoch == epoch and session.at == 1 and session.members == NAMES[:2]


def test_who_was_left_out_and_crashed_does_not_disturb_the_round():
    session = enrolled()
    for c in NAMES[:2]:
        session.message(c, here(session), "x", "d", 0.0)
    session.tick(20.0)
    epoch = session.epoch
    session.join("washington", "washington-2", 12, 21.0)
    assert session.epoch == epoch and session.members == NAMES[:2]


def test_of_two_processes_of_one_name_the_later_one_stays():
    session = enrolled()
    session.join("adams", "adams-2", 10, 1.0)
    assert code(session.join("adams", "adams-1", 10, 2.0)) == "PERMISSION_DENIED"
    assert code(session.next_turn("adams", "adams-1", 2.0)) == "FAILED_PRECONDITION"
    assert session.next_turn("adams", "adams-2", 2.0).state == ROUND


def test_joining_twice_is_joining_once_and_text_stays_what_it_was():
    session = enrolled()
    barrier(session)
    assert session.join("adams", "adams-1", 10, 1.0) is None and session.at == 1
    assert code(session.join("adams", "adams-2", 11, 1.0)) == "FAILED_PRECONDITION" and session.at == 1
    assert session.blocks() == {"adams": 10, "jefferson": 11, "washington": 12}


def test_one_leaves_for_good():
    session = enrolled()
    for c in NAMES[:2]:
        session.message(c, here(session), "x", "d", 0.0)
    session.leave("washington", 0.0)
    assert session.members == NAMES[:2] and compute(session) == ["adams", "jefferson"]
    for _ in range(2 * STEPS):
        barrier(session)
    assert session.round == 1 and session.state == ROUND and session.members == NAMES[:2]  # without any grace
    assert code(session.join("washington", "washington-2", 12, 0.0)) == "PERMISSION_DENIED"


def test_who_asks_after_another_has_gone_is_told_with_whom_the_round_began():
    """Shares, and places in the script where clients take turns, are those of the beginning for all."""
    session = enrolled()
    before = session.next_turn("adams", "adams-1", 0.0)
    session.leave("washington", 0.0)
    after = session.next_turn("jefferson", "jefferson-1", 0.0)
    assert isinstance(before, Turn) and isinstance(after, Turn) and before.members == after.members == NAMES
    assert session.cast == {"adams": 10, "jefferson": 11, "washington": 12}
    for _ in range(2 * STEPS + 1):
        barrier(session)
    assert session.round == 1 and session.cast == {"adams": 10, "jefferson": 11}
    later = session.next_turn("adams", "adams-1", 0.0)
    assert isinstance(later, Turn) and before.since == 0 and later.since == before.epoch < later.epoch


def test_a_round_of_which_nothing_comes_begins_again():
    session = enrolled()
    barrier(session)
    for c in NAMES:
        session.message(c, here(session), "x", "d", 0.0)
    what = session.due()
    assert what is not None
    session.lost(what, "nobody has it", 1.0)
    assert (session.at, session.round, session.state, session.members) == (0, 0, ROUND, NAMES)
    assert session.events[-1] == {"event": "again", "round": 0, "why": "nobody has it"}
    assert code(session.poll("adams", what.id)) == "ABORTED"  # type: ignore[arg-type]
    session.lost(what, "again", 2.0)  # of an epoch that is over
    assert session.events[-1]["why"] == "nobody has it"


def test_who_has_left_for_good_is_not_said_to_be_absent_from_every_round():
    session = make(quorum=1)
    session.join("adams", "adams-1", 1, 0.0)
    session.leave("washington", 0.0)
    session.tick(1000.0)
    assert [e["absent"] for e in session.events if e["event"] == "begins"] == [("jefferson",)]


def test_who_had_left_before_the_server_came_back_shortens_nobodys_grace():
    session = make(quorum=1)
    session = Session(NAMES, 3, session.rules, session.cohort_of, session.script, gone={"washington"})
    session.join("adams", "adams-1", 1, 1000.0)
    session.tick(1004.9)
    assert session.state == ENROLLING and session.missing() == ("jefferson",)
    session.tick(1005.1)
    assert session.state == ROUND and session.members == ("adams",)


def test_leaving_below_the_quorum_ends_training():
    session = enrolled(quorum=3)
    barrier(session)
    session.leave("adams", 0.0)
    assert session.state == DONE and session.round == 0


def test_without_a_quorum_all_are_needed_who_have_not_left():
    session = enrolled(quorum=None)
    barrier(session)
    session.tick(1000.0)
    assert session.members == NAMES  # nobody is left out
    session.leave("adams", 1000.0)
    assert session.state == ROUND and session.members == NAMES[1:]
    for _ in range(2 * STEPS):
        barrier(session, 1000.0)
    assert session.round == 1 and session.state == ROUND and session.members == NAMES[1:]
    session.leave("jefferson", 1000.0)
    session.leave("washington", 1000.0)
    assert session.state == DONE


def test_a_round_whose_cohort_has_left_is_skipped():
    session = make(rounds=3, cohort_of=lambda round: NAMES[round : round + 1], quorum=None)
    for name in (NAMES[0], NAMES[2]):
        session.join(name, "1", 1, 0.0)
    session.leave(NAMES[1], 0.0)
    assert session.round == 0
    for _ in range(2 * STEPS + 1):
        barrier(session)
    assert session.round == 2 and session.members == NAMES[2:]


def test_in_turn_who_has_had_its_turn_waits_for_the_next_round():
    """Its messages are forgotten by then, but not that it has sent them: told to begin, it would begin, and be refused."""
    session = enrolled(script=in_turn, window=1)
    for _ in range(2 * STEPS):
        assert session._barriers[session.at].who == ("adams",)
        barrier(session)
    barrier(session)
    barrier(session)
    assert not any(c == "adams" for c, _ in session._mail)
    turn = session.next_turn("adams", "adams-1", 0.0)
    assert isinstance(turn, Turn) and turn.state == ENROLLING and turn.round == 0
    turn = session.next_turn("washington", "washington-1", 0.0)
    assert isinstance(turn, Turn) and turn.state == ROUND


def test_in_turn_a_client_that_is_late_is_passed_over():
    session = enrolled(rounds=1, script=in_turn)
    barrier_of = lambda: session._barriers[session.at].who  # noqa: E731
    assert barrier_of() == ("adams",)
    session.tick(12.0)
    assert barrier_of() == ("jefferson",) and session.members == ("jefferson", "washington")


@pytest.mark.parametrize("why", ["late", "left"])
def test_in_turn_a_turn_that_breaks_off_has_never_been(why):
    # The steps of a turn have moved the body, while its segment is lost with its client: the round begins again without it.
    session = enrolled(rounds=1, script=in_turn)
    for _ in range(2 * STEPS + 1):  # all of adams's turn, and a step of jefferson's
        barrier(session)
    epoch = session.epoch
    if why == "late":
        session.tick(100.0)
    else:
        session.leave("jefferson", 0.0)
    assert session.members == ("adams", "washington") and session.at == 0 and session.epoch == epoch + 1
    assert {"event": "again", "round": 0, "why": "the turn of jefferson broke off"} in session.events
    for _ in range(2 * 2 * STEPS):
        barrier(session)
    assert session.state == DONE


@pytest.mark.parametrize("why", ["late", "left"])
def test_in_turn_without_the_last_one_the_round_ends_all_the_same(why):
    """No message would end it any more, so it begins again with those who are left."""
    session = enrolled(rounds=1, script=in_turn)
    for _ in range(2 * 2 * STEPS):
        barrier(session)
    assert session._barriers[session.at].who == ("washington",)
    epoch = session.epoch
    if why == "late":
        session.tick(100.0)
    else:
        session.leave("washington", 0.0)
    assert session.members == ("adams", "jefferson") and session.at == 0 and session.epoch == epoch + 1
    for _ in range(2 * 2 * STEPS):
        barrier(session)
    assert session.state == DONE and session.events[-1] == {"event": "round", "round": 0, "members": ("adams", "jefferson")}


def test_in_turn_who_leaves_after_its_turn_has_had_it():
    session = enrolled(rounds=1, script=in_turn)
    for _ in range(2 * STEPS + 1):
        barrier(session)
    at, epoch = session.at, session.epoch
    session.leave("adams", 0.0)
    assert (session.at, session.epoch, session.state) == (at, epoch, ROUND) and session.members == (
        "jefferson",
        "washington",
    )


def test_how_long_it_waits_at_most_is_known_where_a_quorum_is_left():
    session = make()
    assert session.within(0.0) is None  # nobody is there, so nothing begins
    session.join("adams", "1", 10, 0.0)
    assert session.within(1.0) is None
    session.join("jefferson", "1", 10, 2.0)
    assert session.within(2.0) == 3.0 and session.within(4.0) == 1.0 and session.within(9.0) == 0.0
    session.tick(5.0)
    assert session.state == ROUND and session.members == NAMES[:2] and session.within(6.0) is None  # all are late
    session.message("adams", here(session), "x", "d", 6.0)
    assert session.late() == ("jefferson",) and session.within(6.0) is None  # without it, one would be left
    session = enrolled()
    session.message("adams", here(session), "x", "d", 3.0)
    session.message("jefferson", here(session), "x", "d", 3.0)
    assert session.late() == ("washington",) and session.within(4.0) == 8.0
    session.drain()
    while session.state == ROUND:
        barrier(session) if session.at else barrier(session, leave_out=NAMES[:2])
    assert session.state == DONE and session.within(4.0) is None
    nobody = make(quorum=None)
    for name in NAMES[:2]:
        nobody.join(name, "1", 10, 0.0)
    assert nobody.within(1.0) is None


def test_draining_ends_with_the_round():
    session = enrolled(rounds=5)
    barrier(session)
    session.drain()
    assert session.state == ROUND
    for _ in range(2 * STEPS):
        barrier(session)
    assert session.state == DONE and session.round == 1
    waiting = make()
    waiting.drain()
    assert waiting.state == DONE


def test_a_server_that_comes_back_goes_on_with_its_round_under_a_new_epoch():
    session = Session(NAMES, 5, Rules(2, 10.0, 5.0), lambda round: NAMES, together, epoch=7, round=3)
    for name in NAMES:
        session.join(name, f"{name}-1", 10, 0.0)
    assert (session.round, session.epoch) == (3, 8)
    assert code(session.message("adams", Id(7, 3, 2), "x", "d", 0.0)) == "ABORTED"


def test_what_is_held_does_not_grow():
    session, held = enrolled(rounds=200, window=2), []
    while session.state == ROUND:
        barrier(session)
        held.append(session.held())
        session.events.clear()
    assert max(held) <= 3 * len(NAMES) and len(held) == 200 * (2 * STEPS + 1)


# --- all of it at once -----------------------------------------------------------------------------------------------


class Member:
    """A client as a state machine, too: it retries what is not answered, and forgets everything in a crash."""

    def __init__(self, name: str):
        self.name, self.lives, self.blocks = name, 0, 10
        self.crash()

    def crash(self) -> None:
        self.lives += 1
        self.turn: Turn | None = None
        self.joined, self.at, self.value, self.waiting = False, 0, 0, False

    @property
    def incarnation(self) -> str:
        return f"{self.name}-{self.lives}"

    def act(self, session: Session, now: float, lost: bool) -> None:
        """Does the next thing; if `lost`, the server has heard it and the client doesn't hear the answer."""
        if not self.joined:
            assert session.join(self.name, self.incarnation, self.blocks, now) is None
            self.joined = not lost
        elif self.turn is None:
            turn = session.next_turn(self.name, self.incarnation, now)
            if not lost and isinstance(turn, Turn) and turn.state == ROUND:
                self.turn, self.at, self.value = turn, 0, 0
        elif self.at == 2 * STEPS + 1:
            self.turn = None
        else:
            id = Id(self.turn.epoch, self.turn.round, self.at)
            mine = f"{self.name} {id.round} {id.at} {self.value}"
            refused = session.message(self.name, id, mine, mine, now)
            answer = refused or session.poll(self.name, id)
            if isinstance(answer, Refused) and not lost:
                assert answer.code == "ABORTED", answer
                self.turn = None
            elif isinstance(answer, Reply) and not lost:
                self.at, self.value = self.at + 1, answer.payload


class Engine:
    """Sums over whatever it is sent, so that anything done twice, never or in another order shows."""

    def __init__(self) -> None:
        self.total = self.begun = 1
        self.epoch = 0
        self.ended: list[int] = []

    def run(self, session: Session, now: float, slow: bool) -> None:
        what = session.due() if not slow else None
        if what is None:
            return
        if what.id.epoch != self.epoch:  # a round begins, or begins again
            self.epoch, self.total = what.id.epoch, self.begun
        new = self.total
        for message in what.messages.values():
            new = (31 * new + sum(map(ord, message))) % 1_000_003
        last = what.id.at == 2 * STEPS
        assert session.computed(what, dict.fromkeys(what.messages, new), now)
        self.total = new
        if last:
            self.begun = new
            self.ended.append(new)


def play(seed: int, faults: float, rounds: int = 4) -> tuple[list[int], Session]:
    rng = np.random.default_rng(seed)
    session, engine, members, now = make(rounds, deadline=1e9, quorum=3), Engine(), [Member(n) for n in NAMES], 0.0
    for _ in range(20_000):
        if session.state == DONE:
            break
        now += float(rng.random())
        member = members[rng.integers(3)]
        if rng.random() < faults / 8:
            member.crash()
        member.act(session, now, lost=rng.random() < faults)
        session.tick(now)
        engine.run(session, now, slow=rng.random() < faults)
    return engine.ended, session


@pytest.mark.parametrize("seed", range(12))
def test_crashes_lost_replies_and_any_order_change_nothing(seed):
    """Everybody crashes now and then, a fifth of the answers gets lost, in an order that is drawn: it ends the same."""
    quiet, _ = play(0, faults=0.0)
    ended, session = play(seed, faults=0.2)
    assert session.state == DONE and ended == quiet and len(quiet) == 4
    assert any(e["event"] == "again" for e in session.events)

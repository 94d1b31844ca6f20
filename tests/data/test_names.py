"""Names from data are shown whole and safely, and no two clients share one."""

from __future__ import annotations

import json

import pytest

from fedbert_jax.data.names import ClientNames, printable, shortened


@pytest.mark.parametrize(
    "name, shown",
    [
        ("caf\udce9", r"caf\xe9"),  # a byte that is not UTF-8, as Python reads folder names
        ("a\x1b[31mb\x00\x7f\x85", r"a\x1b[31mb\x00\x7f\x85"),
        ("two\nlines\tand\u2028more", r"two\nlines\tand\u2028more"),
        ("evil\u202etxt.exe\u2066", r"evil\u202etxt.exe\u2066"),
        ("\ud800", r"\ud800"),
        ("[/i]bold [red]", "[/i]bold [red]"),
        ("שלום مرحبا 北京 👩‍👩‍👧 café", "שלום مرحبا 北京 👩‍👩‍👧 café"),
        (r"CORP\alice", r"CORP\alice"),
    ],
)
def test_what_a_terminal_cannot_show_is_escaped_and_nothing_else(name: str, shown: str) -> None:
    assert printable(name) == shown
    shown.encode()


def test_two_clients_never_get_one_name() -> None:
    names = ClientNames()
    assert [names("caf\udce9"), names(r"caf\xe9"), names("caf\udce9"), names("b")] == [
        r"caf\xe9",
        r"caf\xe9 (2)",
        r"caf\xe9",
        "b",
    ]
    assert names(r"caf\xe9 (2)") not in (r"caf\xe9", r"caf\xe9 (2)")


def test_a_very_long_name_is_cut_and_stays_its_own() -> None:
    names = ClientNames()
    whole, first, second = names("x" * 255), names("x" * 10_000), names("x" * 10_001)
    assert whole == "x" * 255
    assert first == "x" * 250 + "… (2)" and second == "x" * 250 + "… (3)"
    assert names("y" * 256) == "y" * 254 + "…"
    assert max(len(names("\x00" * n)) for n in range(60, 300)) == 255  # the escaped name counts
    json.dumps(first).encode()


def test_many_names_that_differ_only_at_their_end_cost_no_more_each() -> None:
    names = ClientNames()
    assert len({names("x" * 300 + str(i)) for i in range(3000)}) == 3000
    assert sum(names._numbers.values()) == 3000  # tries


def test_a_long_file_name_keeps_both_ends() -> None:
    assert shortened("a" * 100 + ".txt", 21) == "aaaaaaaaaa…aaaaaa.txt"
    assert shortened("short\n.txt") == r"short\n.txt"

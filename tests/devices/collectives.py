"""Counts what devices send one another when a compiled program runs."""

from __future__ import annotations

import re
from collections import Counter

OPS = "all-reduce|all-gather|all-to-all|collective-permute|collective-broadcast|reduce-scatter"


def count_collectives(hlo: str) -> Counter:
    """Counts the collectives that one run of an HLO text executes, by kind.

    A collective in a loop counts once per iteration. One that starts and ends as two operations counts once, however many
    arrays it carries.

    Raises:
      ValueError: if collectives are in a loop of unknown length.
    """
    own: dict[str, Counter] = {}  # computation -> the collectives in it
    calls: dict[str, list[tuple[str, int]]] = {}  # computation -> those it calls, and how often (0: unknown)
    name, entry = "", ""
    for line in hlo.splitlines():
        begins = re.match(r"(ENTRY )?%?([\w.-]+) (?:\(.*\) -> .*)?\{$", line)
        if begins:
            name = begins.group(2)
            entry = name if begins.group(1) else entry
            own[name], calls[name] = Counter(), []
        elif name:
            op = re.search(rf"= .*? ({OPS})(?:-start)?\(", line)
            if op:
                own[name][op.group(1)] += 1
            trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            times = (int(trips.group(1)) if trips else 0) if " while(" in line else 1
            calls[name] += [(called, times) for called in re.findall(r"(?:to_apply|calls|body|condition)=%?([\w.-]+)", line)]

    def executed(name: str) -> Counter:
        total = Counter(own.get(name, {}))
        for called, times in calls.get(name, ()):
            inner = executed(called)
            if inner and not times:
                raise ValueError(f"{called} is a loop of unknown length")
            total.update({op: n * times for op, n in inner.items()})
        return total

    return executed(entry)

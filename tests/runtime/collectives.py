"""What devices say to one another in a compiled program."""

from __future__ import annotations

import re
from collections import Counter

OPS = "all-reduce|all-gather|all-to-all|collective-permute|collective-broadcast|reduce-scatter"


def count_collectives(hlo: str) -> dict[str, Counter]:
    """Counts the collectives of an HLO text by where they are: "round", once, or "step", in the body of a loop.

    One that starts and ends as two operations counts once; how many arrays it carries doesn't count.
    """
    bodies = set(re.findall(r"\bbody=%?([\w.-]+)", hlo))
    calls: dict[str, set[str]] = {}  # computation -> those it calls
    found: dict[str, Counter] = {}
    where, entry = "", ""
    for line in hlo.splitlines():
        begins = re.match(r"(ENTRY )?%?([\w.-]+) (?:\(.*\) )?->.*\{$|(ENTRY )?%?([\w.-]+) \{$", line)
        if begins:
            where = begins.group(2) or begins.group(4)
            entry = where if line.startswith("ENTRY") else entry
            calls[where], found[where] = set(), Counter()
        elif where:
            calls[where] |= set(re.findall(r"(?:to_apply|calls|body|condition)=%?([\w.-]+)", line))
            op = re.search(rf"= .*? ({OPS})(?:-start)?\(", line)
            if op:
                found[where][op.group(1)] += 1
    assert entry, "this is no HLO module"
    counts = {"round": Counter(), "step": Counter()}

    def visit(name: str, place: str) -> None:
        counts[place].update(found.get(name, Counter()))
        for called in calls.get(name, ()):
            visit(called, "step" if called in bodies else place)

    visit(entry, "round")
    return counts

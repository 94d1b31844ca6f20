"""Names that come from data, of clients and of files: text that a terminal, a table and a JSON file can show."""

from __future__ import annotations

import re
from collections import Counter

LONGEST = 255  # characters of a client's name; a longer one is cut

# Control characters and lone surrogates; line separators; marks that are invisible or turn the direction of what follows.
_UNSHOWN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060\u2066-\u2069\ufeff\ud800-\udfff]")


def printable(name: str) -> str:
    r"""Returns the name with its unprintable characters escaped, as in `caf\xe9` for a byte that is not UTF-8."""
    return _UNSHOWN.sub(_escaped, name)


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # where Python keeps a byte of a file's name that it could not decode
        return f"\\x{code - 0xDC00:02x}"
    return match[0].encode("unicode_escape", "backslashreplace").decode("ascii")


def shortened(name: str, length: int = 60) -> str:
    """Returns the name on one line, at most `length` characters of it: the middle is left out of a longer one."""
    half = (length - 1) // 2
    return printable(name if len(name) <= length else f"{name[:half]}…{name[-half:]}")


class ClientNames:
    """Gives each client the name that it is shown by: printable, at most `LONGEST` characters, and no other's."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._taken: set[str] = set()
        self._numbers: Counter[str] = Counter()

    def __call__(self, client: str) -> str:
        if client not in self._names:
            self._names[client] = name = self._free(printable(client))
            self._taken.add(name)
        return self._names[client]

    def given(self) -> list[str]:
        """Returns every name given so far."""
        return list(self._names.values())

    def _free(self, name: str) -> str:
        start = name[:LONGEST]  # others that begin like this, or that are written as another one's escape, get a number
        while True:
            self._numbers[start] += 1
            number = self._numbers[start]
            ending = ("…" if len(name) > LONGEST else "") + (f" ({number})" if number > 1 else "")
            found = start[: LONGEST - len(ending)] + ending
            if found not in self._taken:
                return found

"""Names that come from data, of clients and of files: text that a terminal, a table and a JSON file can show."""

from __future__ import annotations

from collections import Counter

from fedbert_jax.console.output import shown as printable

__all__ = ["ClientNames", "printable", "shortened"]
LONGEST = 255  # characters of a client's name; a longer one is cut


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

"""Names of clients and files, which come from data, as text that a terminal, a table and a JSON file can show."""

from __future__ import annotations

from collections import Counter

from fedbert_jax.console.output import shown as printable

__all__ = ["ClientNames", "printable", "shortened"]
LONGEST = 255  # characters of a client's name; a longer one is cut


def shortened(name: str, length: int = 60) -> str:
    """Returns at most `length` characters of the name, on one line; the middle of a longer name is left out."""
    half = (length - 1) // 2
    return printable(name if len(name) <= length else f"{name[:half]}…{name[-half:]}")


class ClientNames:
    """Gives each client the name that it is shown by: printable, at most `LONGEST` characters, and unique."""

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
        start = name[:LONGEST]  # names that begin alike, or that equal another's escaped form, get a number
        while True:
            self._numbers[start] += 1
            number = self._numbers[start]
            ending = ("…" if len(name) > LONGEST else "") + (f" ({number})" if number > 1 else "")
            found = start[: LONGEST - len(ending)] + ending
            if found not in self._taken:
                return found

"""The table of strategies: who steps with whom, and who holds what. The rest of the package asks the row, not the name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Clients = Literal["together", "pooled", "apart", "in turn"]
Held = Literal["one", "copies", "own"]


@dataclass(frozen=True)
class Arrangement:
    """How the clients of a round train.

    Args:
      clients: `together`, side by side in each step, against one body; `pooled`, side by side, with all their gradients
        making one step of one model; `apart`, each by itself; `in turn`, one after another, each handing its result on.
      client: how the client segment is held. `one`: a single copy, which every step updates. `copies`: a round begins with
        one, each client trains its own, and they are averaged at the end. `own`: each client has its own for good.
      body: how the server's layers are held.
      cut: whether the four messages of a step cross between clients and server. Pooled without a cut is one client that
        holds all text.
    """

    clients: Clients
    client: Held
    body: Held
    cut: bool = True

    def __post_init__(self) -> None:
        possible = {
            "together": (("copies", "own"), ("one",)),
            "pooled": (("one",), ("one",)),
            "apart": (("copies", "own"), ("copies", "own")),
            "in turn": (("one", "own"), ("one",)),
        }
        if self.clients not in possible:
            raise ValueError(f"clients={self.clients!r}: accepted: {', '.join(map(repr, possible))}")
        for name, held, accepted in zip(("client", "body"), (self.client, self.body), possible[self.clients], strict=True):
            if held not in accepted:
                either = " or ".join(map(repr, accepted))
                raise ValueError(f"{name}={held!r}: accepted with clients={self.clients!r}: {either}")
        if not self.cut and self.clients in ("together", "in turn"):
            raise ValueError(f"cut=False: accepted with clients='pooled' or 'apart', not {self.clients!r}")

    @property
    def averages(self) -> bool:
        """Whether copies are averaged at the end of a round."""
        return "copies" in (self.client, self.body)

    @property
    def keeps_own(self) -> bool:
        """Whether clients keep a part of the model for good, so that each has a model of its own."""
        return "own" in (self.client, self.body)

    @property
    def pools_text(self) -> bool:
        """Whether one client holds all text."""
        return self.clients == "pooled" and not self.cut

    @property
    def averages_gradients(self) -> bool:
        """Whether the clients' gradients of their segment are averaged at every step."""
        return self.clients == "pooled" and self.cut

    @property
    def abreast(self) -> bool:
        """Whether several clients are computed side by side."""
        return self.clients != "in turn" and not self.pools_text


# By (federated.strategy, federated.body, federated.average).
ARRANGEMENTS: dict[tuple[str, str, str], Arrangement] = {
    ("parallel", "pooled", "parameters"): Arrangement("together", "copies", "one"),
    ("parallel", "pooled", "gradients"): Arrangement("pooled", "one", "one"),
    ("parallel", "merged", "parameters"): Arrangement("apart", "copies", "copies"),  # SplitFed V1
    ("parallel", "private", "parameters"): Arrangement("apart", "copies", "own"),
    ("sequential", "pooled", "parameters"): Arrangement("in turn", "one", "one"),  # SplitFed V2, with the segment handed on
    ("centralized", "pooled", "parameters"): Arrangement("pooled", "one", "one", cut=False),
    ("fedavg", "pooled", "parameters"): Arrangement("apart", "copies", "copies", cut=False),
    ("local", "pooled", "parameters"): Arrangement("apart", "own", "own", cut=False),
}


def register(name: str, arrangement: Arrangement) -> None:
    """Adds the strategy `federated.strategy=name` in this process; call it before the config is read.

    Raises:
      ValueError: if the name can't be printed, or another strategy has it.
    """
    if not (isinstance(name, str) and name.strip() == name != "" and name.isprintable()):
        raise ValueError(f"a strategy's name is {name!r}: accepted: text that can be printed, without spaces around it")
    key = (name, "pooled", "parameters")
    others = {given for given in ARRANGEMENTS if given[0] == name}
    if others and ARRANGEMENTS.get(key) != arrangement:
        raise ValueError(f"there is a strategy {name!r} already")
    ARRANGEMENTS[key] = arrangement


def rows() -> str:
    """Lists the accepted combinations, one per row."""
    usual = ("pooled", "parameters")
    shown = []
    for strategy, *rest in ARRANGEMENTS:
        named = [
            f"{key}={value!r}"
            for key, value, default in zip(("body", "average"), rest, usual, strict=True)
            if value != default
        ]
        shown.append(f"{strategy!r}" + (f" with {' and '.join(named)}" if named else ""))
    return ", ".join(shown)


def strategy_title(strategy: str, body: str, average: str) -> str:
    """Returns what tables call a strategy: its name and, if it has several rows, which one it is."""
    if sum(name == strategy for name, _, _ in ARRANGEMENTS) < 2:
        return strategy
    return f"{strategy} ({body} body)" if average == "parameters" else f"{strategy} ({average} averaged)"

"""What happens in a federation, told in a line each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedbert_jax.console.output import shown


def line_of(event: Mapping[str, Any], roster: int) -> str:
    """Returns what the server's console says of an event of its session; "" for what isn't worth a line.

    Args:
      event: of `Session.events`.
      roster: how many there are in all.
    """
    client, round = shown(str(event.get("client", ""))), event.get("round", 0) + 1
    several = lambda names: shown(", ".join(names))  # noqa: E731
    match event["event"]:
        case "joined":
            return f"{client} is there ({event['here']} of {roster})"
        case "left":
            return f"{client} has left for good"
        case "dropped":
            return f"round {round} goes on without {client}: {event['why']}"
        case "again":
            return f"round {round} begins again: {shown(event['why'])}"
        case "waiting":
            return f"waiting for {several(event['clients'])}, without whom there is no quorum"
        case "skipped":
            return f"round {round} is left out: too few of its clients are left"
        case "begins" if event["absent"]:
            return f"round {round} begins without {several(event['absent'])}"
    return ""

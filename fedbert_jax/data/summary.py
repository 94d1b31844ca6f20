"""Shows what each client holds in a table, and in sentences who is left out and whose text the tokenizer doesn't know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table
from rich.text import Text

from fedbert_jax.console.output import Name

TABLE_ROWS, TABLE_LARGEST, TABLE_SMALLEST = 40, 10, 5
MUCH_UNKNOWN = 0.01  # share of a client's tokens above which a warning names it


@dataclass(frozen=True)
class ClientSummary:
    """What one client holds."""

    name: str
    documents: int  # including held-out ones, without those that were nothing but repeated text
    words: int  # in these documents, by `count_words`, without repeated text
    train_blocks: int
    heldout_blocks: int
    tokens: int  # in its training blocks
    share: float  # of all training blocks
    js_divergence: float  # bits, between its training tokens (without special ones) and everybody's
    unknown: float  # share of [UNK] among the tokens of its documents, including held-out ones and repeated windows
    dropped_words: int  # left out since they came before in the run; for windows of tokens, in proportion to the tokens


def client_table(clients: Sequence[ClientSummary]) -> Table:
    """Lists the clients, largest first, and their total; of more than 40, only the largest ten and the smallest five."""
    table = Table(title=Text(f"{len(clients):,} clients; of all together, JS and [UNK] are means"))
    table.add_column("client", overflow="fold")
    for column in ("documents", "blocks", "held-out", "share", "JS\n(bits)", "[UNK]", "repeated\nwords"):
        table.add_column(Text(column), justify="right", no_wrap=True)
    ranked = sorted(clients, key=lambda c: (-c.train_blocks, c.name))
    hidden = len(ranked) - TABLE_LARGEST - TABLE_SMALLEST if len(ranked) > TABLE_ROWS else 0

    def add(name: str, members: Sequence[ClientSummary]) -> None:
        counts = {k: sum(getattr(c, k) for c in members) for k in ("documents", "train_blocks", "heldout_blocks")}
        means = {k: float(np.mean([getattr(c, k) for c in members])) for k in ("js_divergence", "unknown")}
        table.add_row(
            Name(name),
            *(f"{n:,}" for n in counts.values()),
            f"{sum(c.share for c in members):.1%}",
            f"{means['js_divergence']:.3f}",
            percent(means["unknown"]),
            f"{sum(c.dropped_words for c in members):,}",
        )

    for place, client in enumerate(ranked):
        if not hidden or not TABLE_LARGEST <= place < TABLE_LARGEST + hidden:
            add(client.name, [client])
        elif place == TABLE_LARGEST:
            table.add_row(f"... {hidden:,} more", *["..."] * 7)
    table.add_section()
    add("all", ranked)
    return table


def percent(share: float) -> str:
    """Formats a share so that it reads 0 only if it is 0."""
    return f"{share:.1%}" if share == 0 or share >= 0.0005 else "<0.1%"


def listed(names: Sequence[str]) -> str:
    """Returns the first five names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")


def describe_left_out(reasons: Mapping[str, Sequence[str]]) -> str:
    """Returns "2 without ...: a, b; 1 with ...: c" for the names by reason."""
    return "; ".join(f"{len(names):,} {reason}: {listed(names)}" for reason, names in reasons.items() if names)


def describe_unknown(clients: Sequence[ClientSummary]) -> str:
    """Returns a warning that names the clients whose text the tokenizer doesn't know; "" if there are none."""
    worst = sorted((c for c in clients if c.unknown > MUCH_UNKNOWN), key=lambda c: (-c.unknown, c.name))
    if not worst:
        return ""
    names = listed([f"{c.name} {c.unknown:.1%}" for c in worst])
    return (
        f"the tokenizer doesn't know more than {MUCH_UNKNOWN:.0%} of the text of {len(worst):,} of the clients; share of "
        f"[UNK] among their tokens: {names}; data.tokenizer=train:SIZE makes one that does, if SIZE is large enough."
    )

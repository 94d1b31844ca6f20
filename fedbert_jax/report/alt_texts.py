"""The plots of a run in words, with their values, for readers who do not see them."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedbert_jax.report.runs import BYTE_UNITS, Run, number, percent, quantity

LONGEST = 80  # characters of a client's name


def alt_texts(run: Run) -> dict[str, str]:
    """Returns one or a few sentences for each plot of `fedbert_jax.report.plots`, by the plot's name."""
    baselines = run.facts.get("baselines") or {}
    unigram, commonest = baselines.get("unigram_loss"), baselines.get("commonest_accuracy")
    scope = f" ({run.scope})" if run.scope else ""
    loss = [_course(run, "train_loss", "training loss"), _course(run, "eval_loss", f"held-out loss{scope}")]
    loss += [] if unigram is None else [f"guessing by frequency has {number(unigram)}"]
    accuracy = [_course(run, "eval_accuracy", f"held-out accuracy{scope}", percent)]
    accuracy += [] if commonest is None else [f"always the commonest token has {percent(commonest)}"]
    return {
        "loss": _sentence(loss),
        "accuracy": _sentence(accuracy),
        "clients": _clients(run),
        "partition": _partition(run),
        "bytes": _traffic(run),
    }


def _name(name: Any) -> str:
    name = str(name)
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


def _sentence(parts: list[str]) -> str:
    text = "; ".join(part for part in parts if part)
    return f"{text[:1].upper()}{text[1:]}." if text else "Nothing yet."


def _course(run: Run, key: str, name: str, show: Any = number) -> str:
    """Says where a curve begins and ends."""
    x, y = run.series(key)
    if not x.size:
        return ""
    if x.size == 1:
        return f"{name} {show(y[0])} at {quantity(x[0])} tokens"
    return f"{name} from {show(y[0])} at {quantity(x[0])} tokens to {show(y[-1])} at {quantity(x[-1])}"


def _clients(run: Run) -> str:
    last: dict[str, Any] = next((row["eval_clients"] for row in run.metrics[::-1] if row.get("eval_clients")), {})
    losses = {name: (scores or {}).get("loss") for name, scores in last.items()}
    known = sorted(((loss, name) for name, loss in losses.items() if loss is not None), reverse=True)
    if not known:
        return "Nothing yet."
    if len(known) <= 12:
        return "Held-out loss at the end: " + ", ".join(f"{_name(name)} {number(loss)}" for loss, name in known) + "."
    (high, worst), (low, best) = known[0], known[-1]
    middle = float(np.median([loss for loss, _ in known]))
    return (
        f"Held-out loss at the end, of {len(known):,} clients: highest {number(high)} ({_name(worst)}), "
        f"median {number(middle)}, lowest {number(low)} ({_name(best)})."
    )


def _partition(run: Run) -> str:
    clients = [client for client in run.facts.get("clients") or [] if client.get("tokens") is not None]
    clients.sort(key=lambda client: -client["tokens"])
    if not clients:
        return "Nothing yet."
    if len(clients) <= 12:
        held = [
            f"{_name(client.get('name', ''))} {quantity(client['tokens'])} ({number(client.get('js_divergence'), 2)})"
            for client in clients
        ]
        return f"Training tokens, and in brackets the divergence from all clients' words: {', '.join(held)}."
    most, least = clients[0], clients[-1]
    return (
        f"Training tokens of {len(clients):,} clients: from {quantity(least['tokens'])} ({_name(least.get('name', ''))}) to "
        f"{quantity(most['tokens'])} ({_name(most.get('name', ''))})."
    )


def _traffic(run: Run) -> str:
    up, down = run.final("uplink_bytes") or 0, run.final("downlink_bytes") or 0
    if not up + down:
        return "Nothing was sent."
    parts = [f"sent to the server {quantity(up, BYTE_UNITS)}, to the clients {quantity(down, BYTE_UNITS)}"]
    each = [
        f"{name.replace('_', ' ')} {way} {quantity(size, BYTE_UNITS)}"
        for way, sizes in run.messages.items()
        for name, size in sizes.items()
    ]
    if each:
        parts.append(f"in one round {', '.join(each)}")
    return _sentence(parts)

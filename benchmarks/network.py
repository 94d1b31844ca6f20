"""`python -m benchmarks.network`: what a federation over a network costs beyond its arithmetic and its bytes.

A server and its clients, each in a process of its own with a core of its own, joined by gRPC over the loopback or a slower
line. A step is measured beside its ingredients: the same programs without a network, and the same frames without programs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.federation import SIZES, Federation, Plan, Sample, Way, credentials
from benchmarks.link import Speed
from benchmarks.pairs import quartiles
from benchmarks.tables import markdown

UNDIVIDED, DIVIDED = 1.25, 1.15  # a step over the larger of its ingredients, at most: with one microbatch, with several
OVERHEAD = 5.0  # milliseconds of a step that are the session's, at most
APART = 0.02  # by how much a socket's bytes may differ from what `traffic` says
AVERAGING = {  # settings whose bytes are counted
    "float32": {},
    "bfloat16": {"wire.codec": "bfloat16"},
    "int8": {"wire.codec": "int8"},
    "int8, moments averaged": {"wire.codec": "int8", "federated.client_optimizer_state": "average"},
    "int8, gradients averaged": {"wire.codec": "int8", "federated.average": "gradients"},
    "int8, gradients averaged in int8": {
        "wire.codec": "int8", "federated.average": "gradients", "wire.gradient_codec": "int8",
    },
}  # fmt: skip


def pipeline(
    parts: int,
    client: dict[str, float],
    server: dict[str, float],
    up: Sequence[float],
    down: Sequence[float],
    delay: float = 0.0,
) -> float:
    """Returns how long a step takes if every message leaves and every program begins as soon as it can.

    Both parties compute one thing at a time and each direction of the line carries one message at a time, so this is the
    least that any transport could do with this order of messages.

    Args:
      parts: microbatches.
      client, server: time of a step, by phase (`parties.PHASES`).
      up, down: time that the line is busy with each of a microbatch's two messages, in each direction.
      delay: time on the way, one way.
    """
    at_client = at_server = line_up = line_down = 0.0
    starts = []
    for _ in range(4):  # the server's update may reach into the next step
        starts.append(at_client)
        at_client += client["draw"]
        there = []  # when each message is
        for _ in range(parts):
            at_client += client["begin"] / parts
            line_up = max(line_up, at_client) + up[0]
            there.append(line_up + delay)
        for phase, mine, size in (("forward", False, down[0]), ("head", True, up[1]), ("backward", False, down[1])):
            came, there = there, []
            for when in came:
                if mine:
                    at_client = max(at_client, when) + client[phase] / parts
                    line_up = max(line_up, at_client) + size
                else:
                    at_server = max(at_server, when) + server[phase] / parts
                    line_down = max(line_down, at_server) + size
                there.append((line_up if mine else line_down) + delay)
        for when in there:
            at_client = max(at_client, when) + client["finish"] / parts
        at_client, at_server = at_client + client["step"], at_server + server["step"]
    return starts[-1] - starts[-2]


def best(way: Way, sample: Sample, frames: dict[str, list[int]]) -> float:
    """Returns `pipeline` of a sample, in milliseconds; its transfer, but for the delay, is shared out by bytes."""
    total = way.parts * sum(map(sum, frames.values()))
    moving = max(sample.transfer - 4 * way.speed.delay, 0.0)
    share = {k: [moving * size / total for size in found] for k, found in frames.items()}
    return pipeline(way.parts, sample.client, sample.server, share["up"], share["down"], way.speed.delay)


def measure(ways: Sequence[Way], plan: Plan, samples: int, hurry: bool = False) -> list[dict[str, Any]]:
    """Measures ways in turn, so that a slow moment of the machine meets all of them; JSON can hold the results.

    Raises:
      RuntimeError: if something was compiled meanwhile.
    """
    with contextlib.ExitStack() as stack:
        started = [stack.enter_context(contextlib.closing(Federation(way, plan))) for way in ways]
        for federation in started:
            for _ in range(2):  # the first ones compile
                federation.sample(False)
        compiled = [federation.still(False) for federation in started]
        for federation in started if hurry else ():
            federation.hurry()
        taken: list[list[Sample]] = [[] for _ in ways]
        for n in range(samples):
            places = list(range(len(ways)))
            for place in reversed(places) if n % 2 else places:
                taken[place].append(started[place].sample(bool(n % 2)))
        if [federation.still(False) for federation in started] != compiled:
            raise RuntimeError("something was compiled during the measurement.")
        return [summary(f.way, found, f.frames) for f, found in zip(started, taken, strict=True)]


def summary(way: Way, taken: Sequence[Sample], frames: dict[str, list[int]]) -> dict[str, Any]:
    """Returns the medians of a way's samples, with quartiles and verdict."""
    median = lambda name: statistics.median(getattr(s, name) for s in taken)  # noqa: E731
    phases = {
        party: {k: statistics.median(getattr(s, party)[k] for s in taken) for k in getattr(taken[0], party)}
        for party in ("client", "server")
    }
    ratios, bests = [s.ratio for s in taken], [best(way, s, frames) for s in taken]
    result: dict[str, Any] = {"way": str(way), "parts": way.parts, "codec": way.codec, "plain": way.speed.plain}
    result |= {f"{name}_ms": median(name) for name in ("step", "compute", "transfer", "still", "overhead")}
    result |= {"best_ms": statistics.median(bests), "phases_ms": phases, "samples": [vars(s) for s in taken]}
    result["best_ratio"] = statistics.median(b / (s.step / s.ratio) for b, s in zip(bests, taken, strict=True))
    result |= {"ratio": statistics.median(ratios), "quartiles": list(quartiles(ratios))}
    result["overhead_quartiles"] = list(quartiles([s.overhead for s in taken]))
    result["target"] = UNDIVIDED if way.parts == 1 else DIVIDED
    return result


def verdict(result: dict[str, Any]) -> str:
    """Returns whether a ratio's target was met, by how much it was missed, or that nobody could meet it."""
    over = result["ratio"] - result["target"]
    if over <= 0:
        return "met"
    return f"missed by {over:.2f}" + (", at best missed" if result["best_ratio"] > result["target"] else "")


def table(results: Sequence[dict[str, Any]]) -> str:
    """Returns the results as Markdown."""
    columns = ("way", "step, ms:", "client alone:", "server alone:", "transfer alone:", "step / max:", "quartiles",
               "at best:", "target", "verdict", "session, ms:", "quartiles")  # fmt: skip
    rows = []
    for r in results:
        alone = [sum(r["phases_ms"][party].values()) for party in ("client", "server")]
        low, high = r["quartiles"]
        least, most = r["overhead_quartiles"]
        # Over a slow line, a step without programs overlaps its messages better than frames that wait for one another.
        session = (f"{r['overhead_ms']:.1f}", f"{least:.1f}–{most:.1f}") if r["plain"] else ("", "")
        rows.append(
            (r["way"], *(f"{ms:.1f}" for ms in (r["step_ms"], *alone, r["transfer_ms"])), f"{r['ratio']:.2f}",
             f"{low:.2f}–{high:.2f}", f"{r['best_ratio']:.2f}", f"≤ {r['target']}", verdict(r), *session)
        )  # fmt: skip
    return markdown(columns, rows)


def count_bytes(plan: Plan) -> list[dict[str, Any]]:
    """Counts a round's bytes at the server's socket, beside what `traffic` says of it; JSON can hold the results."""
    found = []
    for name, settings in AVERAGING.items():
        chosen = Plan(plan.model, plan.clients, plan.cores, plan.credentials, plan.settings | settings)
        way = Way(codec=settings.get("wire.codec", "float32"))
        with contextlib.closing(Federation(way, chosen, counting=True)) as federation:
            counted, said = federation.bytes_of_a_round(), federation.server.call({"do": "traffic"})["bytes"]
        found.append({"setting": name, "counted": counted, "said": said, "apart": counted / said - 1})
    return found


def bytes_table(counts: Sequence[dict[str, Any]]) -> str:
    """Returns counted bytes as Markdown."""
    columns = ("setting", "at the socket, kB:", "`traffic`, kB:", "apart:", "target", "verdict")
    rows = []
    for c in counts:
        met = "met" if abs(c["apart"]) <= APART else f"missed by {abs(c['apart']) - APART:.1%}"
        rows.append((c["setting"], f"{c['counted'] / 1e3:,.1f}", f"{c['said'] / 1e3:,.1f}", f"{c['apart']:+.2%}",
                     f"± {APART:.0%}", met))  # fmt: skip
    return markdown(columns, rows)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line; adds `ways` and `model`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.network", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--size", choices=SIZES, default="tiny", help="fast: for debugging this program")
    add("--rows", type=int, metavar="B", help="sequences of a client's batch (default: the size's)")
    add("--clients", type=int, default=1, metavar="C", help="(default: 1)")
    add("--parts", type=int, nargs="+", default=[1, 2], metavar="N", help="microbatches of a step (default: 1 2)")
    add("--codec", nargs="+", choices=("float32", "bfloat16", "int8"), default=["float32"], help="(default: float32)")
    add("--line", nargs="+", default=["loopback"], metavar="MBIT[:MS]",
        help="what lies between: megabits a second, and milliseconds on the way, one way (default: loopback)")  # fmt: skip
    add("--samples", type=int, default=9, help="(default: 9)")
    add("--tls", action="store_true", help="with certificates")
    add("--share", action="store_true", help="all parties may use all cores, rather than one each")
    add(
        "--hurry", action="store_true", help="real-time priority while it measures (root), on a machine that does other work"
    )
    add("--bytes", action="store_true", help="count bytes at the socket instead of measuring times")
    add("--json", metavar="FILE", type=Path, help="write the results there, too")
    args = parser.parse_args(arguments)
    args.model = SIZES[args.size] | ({"rows": args.rows} if args.rows is not None else {})
    if min(args.model["rows"], args.clients, args.samples, *args.parts) < 1:
        parser.error("--rows, --clients, --parts and --samples: accepted: at least 1")
    if odd := [n for n in args.parts if args.model["rows"] % n]:
        parser.error(f"--parts {odd[0]}: accepted: a divisor of the {args.model['rows']} sequences of a batch")
    try:
        speeds = [Speed() if line == "loopback" else Speed(*map(float, line.split(":"))) for line in args.line]
    except (TypeError, ValueError):
        parser.error("--line: accepted: loopback, or MBIT or MBIT:MS, such as 100:10")
    args.ways = [Way(n, codec, speed) for speed in speeds for codec in args.codec for n in args.parts]
    return args


def main() -> None:
    args = parse()
    all_cores = tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ()
    result: dict[str, Any] = {"benchmark": "network", "machine": machine.facts(len(all_cores) or os.cpu_count() or 1)}
    with credentials(args.clients) if args.tls else contextlib.nullcontext("") as folder:
        plan = Plan(args.model, args.clients, () if args.share else all_cores, folder)
        if args.bytes:
            result["bytes"] = count_bytes(plan)
        else:
            result["ways"] = measure(args.ways, plan, args.samples, args.hurry)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    print(bytes_table(result["bytes"]) if args.bytes else table(result["ways"]))
    m = args.model
    print(
        f"\n{m['preset']}, vocabulary {m['vocabulary']:,}; {args.clients} client{'s' * (args.clients > 1)} x {m['rows']} "
        f"sequences x {m['tokens']} tokens a step; {args.samples} samples of {m['steps']} steps; "
        f"{'mutual TLS' if args.tls else 'in clear'}; {'all cores for all' if args.share else 'a core for each party'}."
    )
    print(machine.describe(result["machine"]))


if __name__ == "__main__":
    main()

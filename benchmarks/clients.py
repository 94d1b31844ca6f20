"""`python -m benchmarks.clients`: what a round costs in time and memory when 10, 1,000 or 10,000 clients exist.

The cohort stays the same. Each number of clients is measured in a process of its own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import machine

# JAX and the package are imported in `measure`, only by the children: Linux hands a parent's peak memory on to its child.

MEAN_BLOCKS, LENGTH, VOCAB = 4, 128, 4096
SIZES: dict[str, dict[str, int]] = {
    "tiny": dict(),  # the preset's 2x128
    "fast": dict(hidden_size=16, num_layers=1, num_heads=2),  # for debugging: its times mean nothing
}


def peak_bytes() -> int:
    """Returns the most memory this process has held so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure(
    num_clients: int,
    rounds: int,
    size: str = "tiny",
    cohort: int = 8,
    at_once: int | None = None,
    strategy: str = "parallel",
) -> dict[str, Any]:
    """Trains in this process with `num_clients` clients; returns times and memory in a form that JSON can hold."""
    import dataclasses

    import jax

    from fedbert_jax import config as config_lib
    from fedbert_jax.data.masking import MaskSpec, num_masked
    from fedbert_jax.devices.mesh import make_mesh
    from fedbert_jax.runtime.simulation import Simulation

    config = config_lib.from_dict(
        dict(
            model=dict(preset="tiny", **SIZES[size]),
            data=dict(seq_len=LENGTH),
            federated=dict(
                strategy=strategy,
                num_clients=num_clients,
                clients_per_round=min(cohort, num_clients),
                clients_at_once=at_once,
                local_steps=4,
                batch_size=4,
                rounds=rounds + 1,
            ),
        )
    )
    config = dataclasses.replace(config, model=config_lib.resolve_model(config.model, VOCAB))
    mask = MaskSpec(num_masked(config.mlm.mask_prob, LENGTH), VOCAB, 4, (0, 1, 2, 3, 4), None)
    imported = peak_bytes()
    train, heldout = synthetic_blocks(num_clients)
    after_data = peak_bytes()

    simulation = Simulation(config, train, heldout, mask, make_mesh(config.mesh))
    state = simulation.init_state()
    seconds = []
    for n in range(rounds + 1):
        start = time.perf_counter()
        state, metrics = simulation.run_round(state, n)
        jax.block_until_ready((state, metrics))
        seconds.append(time.perf_counter() - start)
    after_training = peak_bytes()
    simulation.evaluate(state)
    start = time.perf_counter()
    scores = simulation.evaluate(state)
    eval_seconds = time.perf_counter() - start
    assert scores is not None
    simulation.close()
    return {
        "clients": num_clients,
        "token_bytes": train.tokens.nbytes + heldout.tokens.nbytes,
        "index_bytes": train.offsets.nbytes + heldout.offsets.nbytes,
        "first_round_seconds": seconds[0],
        "round_seconds": seconds[1:],
        "round_median_seconds": statistics.median(seconds[1:]),
        "eval_seconds": eval_seconds,
        "imported_peak_bytes": imported,
        "data_peak_bytes": after_data,
        "training_peak_bytes": after_training,
        "peak_bytes": peak_bytes(),
        "compiled_rounds": simulation.compiled(),
        "train_loss": float(metrics.loss),
        "eval_loss": scores.by_text.loss,
    }


def synthetic_blocks(num_clients: int) -> tuple[Any, Any]:
    """Draws training blocks, unevenly, `MEAN_BLOCKS` per client on average, and one held-out block per client."""
    import numpy as np

    from fedbert_jax.data.blocks import TokenBlocks

    rng = np.random.default_rng(0)
    sizes = rng.geometric(1 / MEAN_BLOCKS, num_clients)  # at least 1

    def draw(blocks_per_client: np.ndarray) -> TokenBlocks:
        tokens = np.empty((int(blocks_per_client.sum()), LENGTH), np.uint16)
        for rows in np.array_split(tokens, 1 + len(tokens) // 4096):  # never holds all in the generator's wider dtype
            rows[:] = rng.integers(5, VOCAB, rows.shape)
        tokens[:, 0] = 2  # [CLS]
        return TokenBlocks(tokens, np.concatenate([[0], np.cumsum(blocks_per_client)]).astype(np.int64))

    return draw(sizes), draw(np.ones(num_clients, np.int64))


def measure_in_child(num_clients: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Runs `measure` in a fresh process; settings are its other arguments."""
    command = [sys.executable, "-m", "benchmarks.clients", "--clients", str(num_clients), "--here"]
    for name, value in settings.items():
        command += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False, text=True, cwd=Path(__file__).parents[1])
    if done.returncode != 0:
        raise SystemExit(f"{num_clients} clients: the child process failed with status {done.returncode}.")
    return json.loads(done.stdout)


def show(result: dict[str, Any], console: Console) -> None:
    """Prints a result as Markdown."""
    table = Table(box=box.MARKDOWN)
    runs = result["runs"]
    smallest = runs[0]["clients"]
    for column in (
        "clients",
        "round, ms",
        f"/ {smallest}",
        "evaluation, ms",
        "tokens, MB",
        "peak after data, MB",
        "peak after training, MB",
        f"/ {smallest}",
        "first round, s",
    ):
        table.add_column(column, justify="right")
    for run in runs:
        mb = lambda key: f"{run[key] / 1e6:.1f}"  # noqa: B023, E731
        slower = run["round_median_seconds"] / runs[0]["round_median_seconds"]
        larger = run["training_peak_bytes"] / runs[0]["training_peak_bytes"]
        table.add_row(
            f"{run['clients']:,}",
            f"{1e3 * run['round_median_seconds']:.0f}",
            f"{slower:.2f}",
            f"{1e3 * run['eval_seconds']:.0f}",
            mb("token_bytes"),
            mb("data_peak_bytes"),
            mb("training_peak_bytes"),
            f"{larger:.2f}",
            f"{run['first_round_seconds']:.1f}",
        )
    console.print(table)
    settings = result["settings"]
    console.print(
        f"{settings['strategy']}, cohort {settings['cohort']}, {settings['at_once'] or 'all'} at once; "
        f"{settings['rounds']} rounds of 4 local steps x 4 sequences x {LENGTH} tokens a client; "
        f"model {settings['size']}, vocabulary {VOCAB}; about {MEAN_BLOCKS} blocks a client.",
        highlight=False,
    )
    console.print(machine.describe(result["machine"]), highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.clients", description=__doc__)
    parser.add_argument(
        "--clients",
        type=int,
        nargs="+",
        default=[10, 1_000, 10_000],
        metavar="N",
        help="how many clients exist (default: 10 1000 10000)",
    )
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds; one more is run first (default: 20)")
    parser.add_argument("--size", choices=SIZES, default="tiny", help="fast: for debugging this program")
    parser.add_argument("--cohort", type=int, default=8, metavar="C", help="clients a round (default: 8)")
    parser.add_argument("--at-once", type=int, metavar="C", help="how many of them side by side (default: all)")
    parser.add_argument("--strategy", choices=["parallel", "fedavg"], default="parallel", help="(default: parallel)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the results there, too")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)  # a child: measure, print JSON
    args = parser.parse_args()
    if min(*args.clients, args.rounds, args.cohort, args.at_once or 1) < 1:
        parser.error("--clients, --rounds, --cohort and --at-once: accepted: at least 1")
    settings = {name: getattr(args, name) for name in ("rounds", "size", "cohort", "at_once", "strategy")}
    if args.here:
        print(json.dumps(measure(args.clients[0], **settings)))
        return
    facts = machine.facts(machine.limit_cores(None))
    runs = []
    for n in args.clients:
        Console(stderr=True).print(f"{n:,} clients ...", style="dim")
        runs.append(measure_in_child(n, settings))
    result = {
        "benchmark": "clients",
        "machine": facts,
        "settings": {"clients": args.clients, **settings},
        "runs": runs,
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    show(result, Console(width=200))


if __name__ == "__main__":
    main()

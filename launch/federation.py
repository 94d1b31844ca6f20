"""A federation on this machine, as `make federation` runs it: a server and three clients, each a process of its own.

Every client has the docstrings of one installed package and never shows them. The vocabulary is made of a fourth one's,
which everybody has. At the end, the same training is simulated in one process, and the difference is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
CLIENTS, VOCABULARY = ("jax", "numpy", "pandas"), "flax"


def prepare(folder: Path) -> None:
    """Writes each client's text and the vocabulary that all of them use, unless they are there."""
    from fedbert_jax.config import DataConfig
    from fedbert_jax.data.corpus import read_documents
    from fedbert_jax.data.tokenizer import save_tokenizer
    from fedbert_jax.data.vocabulary import train_tokenizer

    if (folder / "tokenizer").is_dir():
        return
    texts: dict[str, list[str]] = {}
    for document in read_documents(DataConfig(source="docs:" + ",".join((*CLIENTS, VOCABULARY)))):
        texts.setdefault(document.group, []).append(document.text)
    for name in CLIENTS:
        (folder / "text" / name).mkdir(parents=True, exist_ok=True)
        (folder / "text" / name / "docstrings.txt").write_text("\n\n".join(texts[name]), encoding="utf-8")
    save_tokenizer(train_tokenizer(texts[VOCABULARY], 4096, lowercase=True), folder / "tokenizer")


def command(task: str, workdir: Path, settings: dict[str, object]) -> list[str]:
    """Returns the command of one party, or of the simulation."""
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    config = f"configs/{task}.py"
    return [sys.executable, "-m", "fedbert_jax.main", "--config", config, "--workdir", str(workdir), *flags]


def free_port() -> int:
    """Returns a port of the loopback that nobody has at the moment."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def clients_secret(path: Path) -> int:
    """Returns the secret that the clients share, drawn when there is none yet. Credentials have one, too."""
    if not path.exists():
        path.touch(mode=0o600)
        path.write_text(str(secrets.randbits(256)))
    return int(path.read_text())


def last_scores(workdir: Path) -> dict[str, float]:
    """Returns the last line of a run's metrics that has an evaluation."""
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return next(r for r in reversed(records) if "eval_loss" in r)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the federation; returns the exit code."""
    parser = argparse.ArgumentParser(prog="launch/federation.py", description=__doc__)
    parser.add_argument("--workdir", type=Path, default=Path("runs/federation"), help="(default: runs/federation)")
    parser.add_argument("--rounds", type=int, default=30, help="(default: 30)")
    parser.add_argument(
        "--blinded", action="store_true", help="under privacy.averaging=blinded: the server reads no segment"
    )
    parser.add_argument("--no-simulation", action="store_true", help="end with the federation")
    args = parser.parse_args(arguments)
    root = args.workdir.resolve()
    prepare(root)
    shared: dict[str, object] = {
        "data.tokenizer": root / "tokenizer",
        "federated.rounds": args.rounds,
        "eval.every_rounds": 10,
        "client_optimizer.warmup_steps": 40,
        "server_optimizer.warmup_steps": 40,
    }
    own: dict[str, object] = {}  # what the server isn't told
    if args.blinded:
        shared |= {"privacy.averaging": "blinded", "federated.client_optimizer_state": "reset"}
        own["privacy.client_seed"] = clients_secret(root / "clients-secret")
    port = {"network.port": free_port()}
    os.chdir(ROOT)
    serve = command("serve", root / "server", shared | port | {"federated.num_clients": len(CLIENTS)})
    processes = []
    for name in CLIENTS:
        text = {"data.source": f"text:{root / 'text' / name}"}
        with (root / f"{name}.log").open("w") as log:
            processes.append(
                subprocess.Popen(command("join", root / name, shared | own | port | text), stdout=log, stderr=log)
            )
    server = subprocess.Popen(serve)
    try:
        while server.poll() is None:
            if any(process.poll() for process in processes):  # refused, say: nobody need wait for it
                server.terminate()
            time.sleep(0.5)
        if code := server.wait():
            for process in processes:  # which would wait for it
                process.terminate()
        codes = [process.wait() for process in processes]
    except KeyboardInterrupt:
        server.terminate()
        for process in processes:
            process.terminate()
        print("stopped; the same command goes on from there", file=sys.stderr)
        return 130
    if code or any(codes):
        print(f"a party failed (server {code}, clients {codes}); see {root}/*.log", file=sys.stderr)
        return 1
    for name in CLIENTS:
        print(f"model of {name:<7} {root / name / 'hf'}")
    if args.no_simulation:
        return 0
    print("\nthe same training, simulated in one process:")
    alike = {"data.source": f"text:{root / 'text'}", "data.deduplicate_across": False, "fill_mask": "()"}
    simulated = command("parallel", root / "simulation", shared | own | alike)
    with (root / "simulation.log").open("w") as log:
        if code := subprocess.run(simulated, stdout=log, stderr=log, check=False).returncode:
            print(f"the simulation failed; see {root}/simulation.log", file=sys.stderr)
            return code
    federation, simulation = last_scores(root / "server"), last_scores(root / "simulation")
    a, b = federation["eval_loss"], simulation["eval_loss"]
    print(f"held-out loss {a:.6f} over the network, {b:.6f} simulated: a difference of {abs(a - b):.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

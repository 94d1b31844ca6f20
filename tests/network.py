"""A federation of real processes, as small as it gets: a server and clients, each `python -m fedbert_jax.main`."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

from corpus import write_corpus
from forking import environment, start
from processes import FLAGS, free_port

from fedbert_jax.data.tokenizer import save_tokenizer
from fedbert_jax.data.vocabulary import train_tokenizer

ROOT = Path(__file__).parents[1]
NORTH, SOUTH = "client_0", "client_1"  # as the folders of text are called
SMALL = {
    "data.seq_len": 16,
    "data.eval_fraction": 0.1,
    "model.hidden_size": 16,
    "model.num_layers": 1,
    "model.num_heads": 2,
    "model.intermediate_size": 32,
    "model.max_position_embeddings": 32,
    "federated.rounds": 4,
    "federated.local_steps": 2,
    "federated.batch_size": 2,
    "client_optimizer.warmup_steps": 2,
    "server_optimizer.warmup_steps": 2,
    "eval.every_rounds": 4,
    "eval.batch_size": 4,
    "eval.max_blocks": 4,
}


class Party:
    """One process."""

    def __init__(self, args: list[str], log: Path):
        self.log = log
        with log.open("a") as out:
            env = environment() | {"XLA_FLAGS": FLAGS}
            self.process = start(args, env, ROOT, out)

    def said(self) -> str:
        """What it has printed so far, in all its lives."""
        return self.log.read_text()

    def last(self) -> str:
        """The last line that it has printed."""
        return self.said().splitlines()[-1]

    def wait(self, timeout: float = 900) -> int:
        """Waits for its end; returns its exit code."""
        return self.process.wait(timeout)

    def until(self, words: str, times: int = 1, timeout: float = 900) -> None:
        """Waits until it has said something, so many times."""
        end = time.monotonic() + timeout
        while self.said().count(words) < times:
            assert self.process.poll() is None and time.monotonic() < end, self.said()
            time.sleep(0.02)


class Network:
    """A folder with the text of several clients and a tokenizer, and the parties that run there."""

    def __init__(self, folder: Path, clients: int = 2):
        self.folder, self.port, self.running = folder, free_port(), list[Party]()
        write_corpus(folder, clients, documents=12)
        text = [path.read_text() for path in sorted(folder.glob("text/*/all.txt"))]
        save_tokenizer(train_tokenizer(text, 200, lowercase=True), folder / "tokenizer")

    def args(self, task: str, name: str, **settings: object) -> list[str]:
        """The command line of a party; a client's workdir, and so its name, is that of its text."""
        given = SMALL | {"data.tokenizer": self.folder / "tokenizer", "network.port": self.port}
        if task == "join":
            given["data.source"] = f"text:{self.folder / 'text' / name}"
        given |= {key.replace("__", "."): value for key, value in settings.items()}
        flags = [f"--config.{key}={value}" for key, value in given.items()]
        return ["--config", f"configs/{task}.py", "--workdir", str(self.place(name)), *flags]

    def place(self, name: str) -> Path:
        """A party's workdir."""
        return self.folder / "runs" / name

    def start(self, task: str, name: str, falls: str = "", **settings: object) -> Party:
        """Starts a party; `falls` is where it kills itself (tests/falls.py)."""
        program = [str(Path(__file__).with_name("falls.py")), falls] if falls else ["-m", "fedbert_jax.main"]
        self.place(name).parent.mkdir(exist_ok=True)
        log = self.folder / "runs" / f"{name}.log"
        self.running.append(Party([sys.executable, *program, *self.args(task, name, **settings)], log))
        return self.running[-1]

    def model(self, name: str) -> bytes:
        """A client's model."""
        return (self.place(name) / "hf" / "model.safetensors").read_bytes()

    def end(self) -> None:
        """Ends whoever still runs."""
        for party in self.running:
            if party.process.poll() is None:
                party.process.send_signal(signal.SIGKILL)
            party.process.wait()

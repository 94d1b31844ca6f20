"""Whole parties of a federation, `serve` and `join` with their workdirs, each in a thread, over a transport of a test's."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from corpus import write_corpus

from fedbert_jax import config as config_lib
from fedbert_jax import serve as serve_lib
from fedbert_jax.config import Config, DataConfig
from fedbert_jax.console.output import make_console
from fedbert_jax.data.corpus import read_documents
from fedbert_jax.data.tokenizer import save_tokenizer
from fedbert_jax.data.vocabulary import train_tokenizer
from fedbert_jax.devices.interrupts import Interrupts
from fedbert_jax.join import join
from fedbert_jax.runtime.calls import Abort
from fedbert_jax.serve import serve
from fedbert_jax.workdir.checkpoint import Checkpoints

NAMES = ("client_0", "client_1")


class Hall:
    """A transport that is a function call: who has stopped listening can't be reached."""

    def __init__(self) -> None:
        self.service: Any = None

    def listen(self, service: Any) -> Hall:
        self.service = service
        return self

    where = "the hall"
    use = listen

    def stop(self) -> None:
        self.service.stop()
        self.service = None

    def connect(self, name: str) -> Any:
        hall = self

        class Door:
            where = "the hall"

            def call(self, method: str, data: bytes, timeout: float) -> bytes:
                service = hall.service
                if service is None:
                    raise Abort("UNAVAILABLE", "nobody listens")
                if len(data) > service.limit(method):
                    raise Abort("RESOURCE_EXHAUSTED", f"{method}: {len(data):,} bytes")
                return service.call(method, name, data)

            def close(self) -> None:
                pass

        return Door()


class Party(threading.Thread):
    """A party's process, as a thread; `ended` is its exit code, or what it raised."""

    def __init__(self, run: Callable[[Interrupts, Any], int]):
        super().__init__(daemon=True)
        self._run, self._asked, self.said = run, threading.Event(), io.StringIO()
        self.ended: Any = None
        self.start()

    def run(self) -> None:
        try:
            self.ended = self._run(Interrupts(self._asked.is_set), make_console(file=self.said))
        except BaseException as error:
            self.ended = error

    def interrupt(self) -> None:
        self._asked.set()

    def wait(self) -> Any:
        self.join(900)  # on a busy machine, too
        assert not self.is_alive(), self.said.getvalue()
        return self.ended


def all_end_well(*parties: Party) -> None:
    """Waits for parties; one that doesn't end well ends the test, whoever still waits for it."""
    end = time.monotonic() + 900  # on a busy machine, too
    while waits := [party for party in parties if party.is_alive()]:
        waits[0].join(0.1)
        for party in parties:
            assert party.is_alive() or party.ended == 0, (party.ended, party.said.getvalue())
        assert time.monotonic() < end, [party.said.getvalue() for party in waits]
    assert [party.ended for party in parties] == [0] * len(parties)


class Crash(Exception):
    """The server's process ends."""


class Place:
    """A folder with two clients' texts, the tokenizer and the parties' workdirs."""

    def __init__(self, root: Path, client_seed: int | None = None, **changes: Any):
        """`changes` are to every party's config, beside the `client_seed` of its clients."""
        self.root, self.changes, self.client_seed = root, changes, client_seed
        write_corpus(root, clients=len(NAMES))
        texts = [d.text for d in read_documents(DataConfig(source=f"text:{root / 'text'}"))]
        save_tokenizer(train_tokenizer(texts, 200, lowercase=True), root / "tokenizer")

    def values(self, **changes: Any) -> dict[str, Any]:
        """What is not a default, by dotted keys; a name's two underscores are a dot."""
        return {
            "data.tokenizer": str(self.root / "tokenizer"),
            "data.seq_len": 16,
            "model.hidden_size": 16,
            "model.max_position_embeddings": 32,
            "model.num_layers": 1,
            "federated.rounds": 6,
            "federated.local_steps": 2,
            "federated.batch_size": 2,
            "checkpoint.every_rounds": 2,
            "eval.every_rounds": 3,
            "eval.batch_size": 8,
            "eval.max_blocks": 8,
            "client_optimizer.warmup_steps": 4,
            "server_optimizer.warmup_steps": 4,
        } | {key.replace("__", "."): value for key, value in (self.changes | changes).items()}

    def config(self, **changes: Any) -> Config:
        return config_lib.from_dict(config_lib.to_dict(config_lib.replace(Config(), self.values(**changes))))

    def serve(self, where: str, listen: Any, **changes: Any) -> Party:
        config = self.config(task="serve", federated__num_clients=len(NAMES), **changes)
        return Party(lambda interrupts, console: serve(config, self.root / where / "server", console, listen, interrupts))

    def join(self, where: str, name: str, transport: Any, **changes: Any) -> Party:
        own = dict(data__source=f"text:{self.root / 'text' / name}", privacy__client_seed=self.client_seed)
        config = self.config(task="join", **own | changes)
        return Party(lambda interrupts, console: join(config, self.root / where / name, console, transport, interrupts))

    def leave_and_return(self, where: str) -> str:
        """Trains with a client that stops after two rounds and is started again; returns what it said when it stopped."""
        hall = Hall()
        server = self.serve(where, hall.listen)
        first, second = (self.join(where, name, hall.connect(name)) for name in NAMES)
        lines = self.root / where / NAMES[0] / "metrics.jsonl"
        while first.is_alive() and (not lines.exists() or lines.read_text().count("\n") < 2):
            first.join(0.05)
        first.interrupt()
        assert first.wait() == 143
        again = self.join(where, NAMES[0], hall.connect(NAMES[0]))
        all_end_well(again, second, server)
        return first.said.getvalue()

    def crash_and_return(self, where: str, after: int, monkeypatch: Any) -> str:
        """Trains with a server that crashes once a round is saved and is started again; returns what it then said."""
        hall, crashed = Hall(), []

        class Crashing(Checkpoints):
            def save(self, round: int, state: Any, meta: Any) -> None:
                super().save(round, state, meta)
                if round == after and not crashed:
                    self.wait()
                    crashed.append(round)
                    raise Crash

        monkeypatch.setattr(serve_lib, "Checkpoints", Crashing)
        server = self.serve(where, hall.listen)
        clients = [self.join(where, name, hall.connect(name)) for name in NAMES]
        assert isinstance(server.wait(), Crash)
        again = self.serve(where, hall.listen)
        all_end_well(again, *clients)
        return again.said.getvalue()

    def model(self, where: str, name: str) -> bytes:
        return (self.root / where / name / "hf" / "model.safetensors").read_bytes()

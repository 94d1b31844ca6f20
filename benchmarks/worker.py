"""A side in a process of its own: for its memory, and for when the sides of a pair should not share one process.

The parent writes one JSON object per line to the child's standard input, and reads one per line back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.flops import Flops
from benchmarks.pairs import Side
from benchmarks.sizes import Size

ROOT = Path(__file__).parents[1]


class Worker:
    """The parent's end of a child that holds one side.

    Args:
      spec: the first object that the child reads; its `name` is for messages.
      module: what the child runs.
      checkout: whose code it runs.
    """

    def __init__(self, spec: dict[str, Any], module: str = "benchmarks.worker", checkout: Path = ROOT):
        self._spec, self._module, self._checkout = spec, module, checkout
        self._child: subprocess.Popen[str] | None = None

    def start(self) -> dict[str, Any]:
        """Starts the child and waits until its side is built; returns the side's facts."""
        self.launch()
        return self.answer()

    def launch(self) -> None:
        """Starts the child; its side's facts are read by `answer`."""
        self._child = subprocess.Popen(
            [sys.executable, "-m", self._module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=self._checkout,
        )
        self.ask(self._spec)

    def call(self, request: dict[str, Any]) -> dict[str, Any]:
        """Sends the child a request and returns its reply; raises RuntimeError with its message if it fails."""
        self.ask(request)
        return self.answer()

    def ask(self, request: dict[str, Any]) -> None:
        """Sends the child a request; what it replies is read by `answer`."""
        assert self._child is not None and self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `answer` will say so
            self._child.stdin.write(json.dumps(request) + "\n")
            self._child.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """Reads the child's reply; raises RuntimeError with its message if it fails."""
        assert self._child is not None and self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._spec['name']}: its process ended with status {self._child.wait()}.")
        reply = json.loads(line)
        if "error" in reply:
            raise RuntimeError(reply["error"])
        return reply

    @property
    def running(self) -> bool:
        return self._child is not None

    @property
    def pid(self) -> int:
        assert self._child is not None
        return self._child.pid

    def stop(self) -> None:
        """Ends the child, which frees all it holds."""
        if self._child is not None:
            assert self._child.stdin is not None and self._child.stdout is not None
            with contextlib.suppress(BrokenPipeError):  # it may have ended by itself
                self._child.stdin.close()
            self._child.stdout.close()
            self._child.wait()
            self._child = None


def remote_side(name: str, size: Size, checkout: Path = ROOT) -> Side:
    """Makes a side that lives in a child; when it rests, the child ends, and the next one starts from new weights."""
    fields = {field.name: field.default for field in dataclasses.fields(size)}
    # What has its default is left out: another checkout may not have the field.
    changed = {key: value for key, value in vars(size).items() if value != fields[key]}
    worker = Worker({"name": name, "size": changed}, checkout=checkout)

    def built() -> dict[str, Any]:
        try:
            return worker.start()
        except BaseException:
            worker.stop()
            raise

    facts = built()
    side = Side(
        facts["name"],
        facts["tokens"],
        lambda: 0.0,
        facts["guess"],
        facts["initial_loss"],
        facts["compile_seconds"],
        facts["losses"],
        Flops(*facts["flops"]),
        rest=worker.stop,
        close=worker.stop,
    )

    def run() -> float:
        reply = worker.call({"run": True})
        side.peak_bytes = reply["peak_bytes"]
        return reply["loss"]

    def ready() -> None:
        if not worker.running:
            built()
            run()

    side.run, side.ready = run, ready
    return side


def peak_of(name: str, size: Size) -> int | None:
    """Returns the peak memory of a side that has a process to itself, after two calls."""
    side = remote_side(name, size)
    try:
        side.timed()
        side.timed()
        return side.peak_bytes
    finally:
        side.close()


# --- the child's end ---------------------------------------------------------------------------------------------------


def peak_bytes(family: str, before: int) -> int | None:
    """Returns the most memory the side has held: the GPU's if it runs there, else this process's beyond `before`."""
    if family == "torch":
        import torch

        if torch.cuda.is_initialized():
            return torch.cuda.max_memory_allocated()
    else:
        import jax

        stats = jax.local_devices()[0].memory_stats()
        if stats and jax.default_backend() != "cpu":
            return stats.get("peak_bytes_in_use")
    unit = 1 if sys.platform == "darwin" else 1024
    own = Path("/proc/self/status")
    if own.exists():  # ru_maxrss would begin with the parent's peak
        kib = next(line.split()[1] for line in own.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(kib) - before
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before


def replying() -> Callable[[dict[str, Any]], None]:
    """Returns what sends a reply to the parent; standard output is standard error from now on."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # so that what libraries print is not taken for a reply

    def reply(value: dict[str, Any]) -> None:
        replies.write(json.dumps(value) + "\n")
        replies.flush()

    return reply


def main() -> None:
    reply = replying()
    spec = json.loads(sys.stdin.readline())
    size = Size(**spec["size"])
    try:
        from benchmarks import sides

        family = "jax" if spec["name"] in sides.JAX else "torch"
        sides.load(family)
        if family == "torch" and size.device == "cpu":
            import torch

            torch.set_num_threads(machine.limit_cores(None))
        before = peak_bytes(family, 0) or 0
        side = sides.make_side(spec["name"], size)
        reply(
            {
                "name": side.name,
                "tokens": side.tokens,
                "guess": side.guess,
                "initial_loss": side.initial_loss,
                "compile_seconds": side.compile_seconds,
                "losses": side.losses,
                "flops": side.flops,
            }
        )
        for _ in sys.stdin:
            side.timed()
            reply({"loss": side.losses[-1], "peak_bytes": peak_bytes(family, before)})
    except Exception as e:
        traceback.print_exc()
        reply({"error": f"{spec['name']}: {type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else ''}"})
        raise SystemExit(1) from e


if __name__ == "__main__":
    main()

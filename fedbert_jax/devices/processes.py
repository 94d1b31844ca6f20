"""Several processes, one run: they join, wait for process 0, agree on when to stop, and leave together.

Every process runs the same program on its own devices, and only process 0 writes and prints. Only this module talks to
JAX's coordinator; with one process its functions answer at once.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from fedbert_jax.errors import ConfigError, UserError

OUTCOME, LEFT, SHARED = "fedbert_jax/outcome", "fedbert_jax/left", "fedbert_jax/shared"  # keys at the coordinator
DONE = "done"  # the outcome of a run that went well
GRACE = 5.0  # seconds a process has to end by itself after another has failed
FOREVER = 24 * 3600 * 1000  # milliseconds


class Join(NamedTuple):
    """How to find the other processes; `jax.distributed.initialize` finds out what is None (TPU pods, SLURM, Open MPI)."""

    coordinator: str | None = None  # HOST:PORT of process 0
    processes: int | None = None
    process: int | None = None
    timeout: int = 300  # seconds within which all have to be there


def check_flags(
    distributed: bool, coordinator: str | None, processes: int | None, process: int | None, timeout: int
) -> Join | None:
    """Turns the flags into a `Join`, or None for a single process.

    Raises:
      ConfigError: for a combination or a value that cannot be used.
    """
    flags = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    given = [name for name, value in flags.items() if value is not None]
    if given and not distributed:
        raise ConfigError(f"{given[0]} is for several processes; give --distributed, too.")
    if given and len(given) < len(flags):
        lacking = " and ".join(name for name in flags if name not in given)
        raise ConfigError(f"{' and '.join(given)} without {lacking}; accepted: all three, or none where JAX finds them out.")
    if coordinator is not None and processes is not None and process is not None:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise ConfigError(f"--coordinator={coordinator}: accepted: HOST:PORT.")
        if processes < 1:
            raise ConfigError(f"--processes={processes}: accepted: an integer of at least 1.")
        if not 0 <= process < processes:
            raise ConfigError(f"--process={process}: accepted: 0 to {processes - 1}, with --processes={processes}.")
    if timeout < 1:
        raise ConfigError(f"--join_timeout={timeout}: accepted: seconds, at least 1.")
    return Join(coordinator, processes, process, timeout) if distributed else None


def several() -> bool:
    """Whether this process has joined others. Touches no device."""
    return jax.distributed.is_initialized()


def first() -> bool:
    """Whether this is process 0, which writes and prints; a single process is."""
    return not several() or jax.process_index() == 0


# --- joining and leaving ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def joined(join: Join, tell: Callable[[BaseException], int]) -> Iterator[None]:
    """Joins the other processes; whatever ends one of them early ends all, with the same exit code.

    A process that fails tells the others; since their program may be waiting for it in the middle of a collective, a thread
    there ends the process. A process that gets SIGINT or SIGTERM while nothing else (`Interrupts`) handles them does the
    same. One that is killed can tell nobody; JAX ends the others after 100 s without its heartbeats.

    Args:
      join: how to find the others.
      tell: prints an error for the user and returns its exit code.

    Raises:
      ConfigError: if `join` leaves out what JAX cannot find out.
    """
    _connect(join)
    client, me = _client(), _global_state().process_id
    leaving = threading.Event()
    watch = threading.Thread(target=_watch, args=(client, me, leaving), name="fedbert-watch", daemon=True)
    watch.start()

    def stop(number: int, frame: Any) -> None:
        # Not by an exception, which would be lost inside a library's callback.
        leaving.set()
        print("interrupted", file=sys.stderr)
        _leave(client, me, _told(client, me, 128 + number, f"interrupted by {signal.Signals(number).name}"))

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        yield
        if me == 0:
            client.key_value_set(OUTCOME, DONE)
        watch.join()  # process 0 still has its report to write
    except BaseException as error:
        leaving.set()
        outcome = _outcome(client)
        if outcome is not None and not isinstance(error, UserError):
            _leave(client, me, _tell_of(outcome))  # this process failed because the other was gone
        text = " ".join(str(error).split()) or type(error).__name__
        _leave(client, me, _told(client, me, tell(error), text))


def _connect(join: Join) -> None:
    # If joining takes too long, JAX aborts with a C++ stack trace, so it is given longer than this process waits.
    def give_up() -> None:
        if join.coordinator is None:
            what = "not all processes found one another"
        elif join.process == 0:
            what = f"not all {join.processes} processes came to the coordinator at {join.coordinator}"
        else:
            what = f"process {join.process} did not reach the coordinator, which is process 0, at {join.coordinator}"
        print(f"error: {what} within {join.timeout} s (--join_timeout).", file=sys.stderr, flush=True)
        os._exit(UserError.exit_code)

    timer = threading.Timer(join.timeout, give_up)
    timer.daemon = True
    timer.start()
    # JAX's own handler of SIGTERM would take the signal away from the round loop.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(join.coordinator, join.processes, join.process, initialization_timeout=join.timeout + 60)
    except Exception as e:
        why = (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
        if join.coordinator is None:
            raise ConfigError(
                f"--distributed finds no TPU pod, SLURM or Open MPI job around it ({why}); "
                "give --coordinator, --processes and --process, too."
            ) from e
        raise ConfigError(f"--coordinator={join.coordinator}: process {join.process} can't join ({why}).") from e
    finally:
        timer.cancel()


def _watch(client: Any, me: int, leaving: threading.Event) -> None:
    """Waits for the run's outcome; if another process failed, ends this one unless it does so by itself."""
    while True:
        try:
            if client.blocking_key_value_get(OUTCOME, FOREVER) == DONE:
                return
            break
        except Exception as e:
            if "DEADLINE_EXCEEDED" not in str(e):
                return  # the coordinator has gone: JAX ends this process
    outcome = _outcome(client)
    if outcome is not None and not leaving.wait(0 if outcome["process"] == me else GRACE):
        _leave(client, me, _tell_of(outcome))


def _outcome(client: Any) -> dict[str, Any] | None:
    """Returns the first failure that a process reported; None if there is none."""
    with contextlib.suppress(Exception):
        value = client.key_value_try_get(OUTCOME)
        return None if value == DONE else json.loads(value)
    return None


def _told(client: Any, me: int, code: int, text: str) -> int:
    """Tells the others why this process ends, and returns the exit code of the first process that failed."""
    mine: dict[str, Any] = {"process": me, "code": code, "text": text}
    with contextlib.suppress(Exception):  # another was faster, or the coordinator has gone
        client.key_value_set(OUTCOME, json.dumps(mine))
    return (_outcome(client) or mine)["code"]


def _tell_of(outcome: dict[str, Any]) -> int:
    print(f"error: process {outcome['process']} stopped: {outcome['text']}", file=sys.stderr)
    return int(outcome["code"])


def _leave(client: Any, me: int, code: int) -> None:
    """Ends the process without JAX's barrier at exit, which not all processes would reach.

    Process 0 keeps the coordinator up until the others have gone.
    """
    with contextlib.suppress(Exception):
        client.key_value_set(f"{LEFT}/{me}", "")
        until = time.monotonic() + GRACE + 5
        while me == 0 and len(client.key_value_dir_get(LEFT)) < _global_state().num_processes and time.monotonic() < until:
            time.sleep(0.1)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)


def _global_state() -> Any:
    from jax._src import distributed  # there is no public way to the coordinator's key-value store

    return distributed.global_state


def _client() -> Any:
    return _global_state().client


# --- agreeing --------------------------------------------------------------------------------------------------------

_calls = itertools.count()  # every process runs the same program, so it makes the same calls in the same order


def share(make: Callable[[], str]) -> str:
    """Calls `make` at process 0 and returns its result at every process. The others wait for as long as it takes."""
    if not several():
        return make()
    client, key = _client(), f"{SHARED}/{next(_calls)}"
    if first():
        client.key_value_set(key, value := make())
        return value
    while True:
        try:
            return client.blocking_key_value_get(key, 1000)
        except Exception as e:
            if "DEADLINE_EXCEEDED" not in str(e):  # otherwise ask again: Python handles signals only in between
                raise


def check_same(what: str, values: dict[str, Any]) -> None:
    """Checks that this process was given the same values as process 0.

    Raises:
      ConfigError: naming the keys that differ.
    """
    theirs = json.loads(share(lambda: json.dumps(values)))
    ours = json.loads(json.dumps(values))
    differ = [f"{k} ({theirs.get(k)!r} at process 0, {ours.get(k)!r} here)" for k in ours if theirs.get(k) != ours.get(k)]
    if differ:
        raise ConfigError(f"process {jax.process_index()} has another {what} than process 0: {', '.join(differ)}.")


def await_file(path: Path, content: str | None = None, seconds: float = 5.0) -> bool:
    """Waits until a file that process 0 wrote is visible here with that content; False if it still isn't after `seconds`."""
    until = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError):
            if path.exists() if content is None else path.read_text() == content:
                return True
        if time.monotonic() > until:
            return False
        time.sleep(0.2)


class Consensus:
    """The largest number that any process gave, known to all of them."""

    def __init__(self) -> None:
        mesh = jax.make_mesh((jax.device_count(),), ("all",), axis_types=(AxisType.Auto,))
        self._given = NamedSharding(mesh, P("all"))
        self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))

    def ask(self, value: int) -> jax.Array:
        """Submits a number; the result, int32 [], is for reading later, as the devices reach it after their work so far.

        This is a collective: every process has to call it at the same place in its program.
        """
        given = jax.make_array_from_callback((jax.device_count(),), self._given, lambda _: np.full(1, value, np.int32))
        return self._largest(given)

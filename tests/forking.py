"""Starts the package's commands by forking a process that has imported what they import, which takes seconds each time.

A started command is a process of its own in every other respect: it has its pid, its signals, its environment, and it ends
as Python ends. JAX and gRPC are imported before the fork, but have done nothing yet, and have no threads: the only ones are
OpenBLAS's, which knows forks. All commands of a test process share one seed of Python's hashes, so what may depend on that
is tested with `subprocess`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parents[1]
# What JAX and Hugging Face read when they are imported: where it differs from ours, a command needs a process from scratch.
AT_IMPORT = ("JAX_", "HF_", "TOKENIZERS_", "PYTHON", "GRPC_", "MPL", "OMP_", "OPENBLAS_")


class Forked:
    """A process that was forked; of `subprocess.Popen` what tests use. Its output is in files."""

    def __init__(self, server: Server, pid: int, args: Sequence[str], out: IO[str] | None, err: IO[str] | None):
        self._server, self.pid, self.args, self.stdout, self.stderr = server, pid, args, out, err
        self.returncode: int | None = None

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._server.code(self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            left = 60.0 if end is None else end - time.monotonic()
            if left <= 0:
                raise subprocess.TimeoutExpired(list(self.args), timeout or 0.0)
            self._server.hear(left)
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        self.wait(timeout)
        said = ["", ""]
        for n, file in enumerate((self.stdout, self.stderr)):
            if file is not None:
                with file:
                    said[n] = file.read()
        return said[0], said[1]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Server:
    """The process that forks, as its client sees it."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()], cwd=ROOT, env=environment()
            )
        self._partial, self._codes, self._pids = b"", dict[int, int](), list[int]()
        self._lock = threading.RLock()

    def start(self, args: Sequence[str], env: Mapping[str, str], cwd: str, out: int, err: int) -> int:
        """Forks; returns the process's id."""
        with self._lock:
            request = json.dumps({"args": list(args), "env": dict(env), "cwd": cwd}).encode()
            socket.send_fds(self._socket, [len(request).to_bytes(4, "big")], [out, err])
            self._socket.sendall(request)
            while not self._pids:
                self._hear()
            return self._pids.pop()

    def code(self, pid: int) -> int | None:
        """Returns the exit code of a process, as `subprocess` gives it; None if it runs."""
        self.hear(0)
        return self._codes.get(pid)

    def hear(self, timeout: float) -> None:
        """Waits at most so long for news of any process."""
        with self._lock, selectors.DefaultSelector() as selector:
            selector.register(self._socket, selectors.EVENT_READ)
            while selector.select(timeout):
                self._hear()
                timeout = 0

    def _hear(self) -> None:
        news = self._socket.recv(1 << 16)
        assert news, "the process that forks has ended"
        *lines, self._partial = (self._partial + news).split(b"\n")
        for pid, code in map(json.loads, lines):
            if code is None:
                self._pids.append(pid)
            else:
                self._codes[pid] = code


def environment() -> dict[str, str]:
    """This process's environment, including the tests' compilation cache, so that processes share their programs."""
    return os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "COLUMNS": "120"}


@functools.cache
def server() -> Server:
    return Server()


def await_stop(process: Any) -> None:
    """Returns once a process that was started here has been stopped by a signal."""
    if isinstance(process, Forked):
        while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
            time.sleep(0.002)
    else:
        assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])


def start(
    args: Sequence[str],
    env: Mapping[str, str],
    cwd: Path | str | None = None,
    log: IO[Any] | None = None,
    errors: IO[Any] | None = None,
    merged: bool = False,
) -> Any:
    """Starts `python -m fedbert_jax.NAME ...` or `python FILE ...`, forked where that is the same.

    Args:
      args: the command; anything else than the two forms becomes a process from scratch.
      env: its environment.
      cwd: its folder.
      log: where it writes to; None: into what `communicate` returns.
      errors: where its errors go; None: into `log`, if there is one.
      merged: errors and output are one.

    Returns:
      A `Forked` or a `subprocess.Popen`.
    """
    read = lambda e: {k: v for k, v in e.items() if k.startswith(AT_IMPORT)}  # noqa: E731
    ours = args[0] == sys.executable and ((args[1] == "-m" and args[2].startswith("fedbert_jax")) or args[1].endswith(".py"))
    if not ours or sys.platform != "linux" or read(env) != read(environment()):
        err = errors or log or (subprocess.STDOUT if merged else subprocess.PIPE)
        return subprocess.Popen(args, env=env, cwd=cwd, stdout=log or subprocess.PIPE, stderr=err, text=True)
    files = [] if log else [tempfile.TemporaryFile("w+") for _ in range(1 if merged else 2)]  # noqa: SIM115
    out, err = (log, errors or log) if log else (files[0], files[-1])
    pid = server().start(args, env, str(cwd or Path.cwd()), out.fileno(), err.fileno())
    reads = [open(f"/proc/self/fd/{file.fileno()}") for file in files]  # noqa: SIM115  (with a place of their own)
    for file in files:
        file.close()
    return Forked(server(), pid, args, *(reads + [None, None])[:2])


# --- the process that forks -----------------------------------------------------------------------------------------------


def serve(requests: socket.socket) -> list[str]:
    """Forks once for each request; returns in the forked processes, with their command. It ends with its client."""
    signal.signal(signal.SIGCHLD, lambda *_: None)
    woken, wakes = socket.socketpair()
    wakes.setblocking(False)
    signal.set_wakeup_fd(wakes.fileno())
    say = lambda *news: requests.sendall(json.dumps(news).encode() + b"\n")  # noqa: E731
    with selectors.DefaultSelector() as selector:
        selector.register(requests, selectors.EVENT_READ)
        selector.register(woken, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is woken:
                    woken.recv(4096)
                    with contextlib.suppress(ChildProcessError):
                        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                            say(ended[0], os.waitstatus_to_exitcode(ended[1]))
                    continue
                size, fds, _, _ = socket.recv_fds(requests, 4, 2)
                if not size:
                    sys.exit()
                request = json.loads(b"".join(iter_bytes(requests, int.from_bytes(size, "big"))))
                if pid := os.fork():
                    for fd in fds:
                        os.close(fd)
                    say(pid, None)
                    continue
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for each in (requests, woken, wakes):
                    each.close()
                for n, fd in enumerate(fds, start=1):
                    os.dup2(fd, n)
                    os.close(fd)
                os.environ.clear()
                os.environ.update(request["env"])
                os.chdir(request["cwd"])
                return request["args"]


def iter_bytes(requests: socket.socket, left: int) -> Any:
    """The next `left` bytes, in pieces."""
    while left:
        piece = requests.recv(left)
        left -= len(piece)
        yield piece


if __name__ == "__main__":
    import importlib
    import warnings

    import transformers

    for name in ("matplotlib.backends.backend_agg", "matplotlib.figure", "orbax.checkpoint", "fedbert_jax.cli"):
        importlib.import_module(name)
    for name in ("data.vocabulary", "experiment", "join", "report.page", "serve", "train", "workdir.checkpoint"):
        importlib.import_module(f"fedbert_jax.{name}")
    transformers.BertTokenizerFast  # noqa: B018  (it is imported when it is first asked for)
    warnings.filterwarnings("ignore", "os.fork", RuntimeWarning)
    with socket.socket(fileno=int(sys.argv[1])) as given:
        command = serve(given)
    del sys.path[0]  # the tests'
    if command[1] == "-m":
        sys.path.insert(0, os.getcwd())
        sys.argv = command[2:]
        runpy.run_module(command[2], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(command[1]).parent))
        sys.argv = command[1:]
        runpy.run_path(command[1], run_name="__main__")

"""How commands end: exit codes, one sentence for a mistake, one word for Ctrl-C from the first moment on."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator

import pytest
from forking import environment

from fedbert_jax import cli
from fedbert_jax.errors import ConfigError, DivergedError, UserError


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    handler, hooks = signal.getsignal(signal.SIGINT), (sys.excepthook, sys.unraisablehook)
    yield
    signal.signal(signal.SIGINT, handler)
    sys.excepthook, sys.unraisablehook = hooks


def ends(command) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.run(command)
    return int(stop.value.code or 0)


@pytest.mark.parametrize(
    "error, code, said",
    [
        (UserError("no [bold] caf\udce9\nhere"), 2, "error: no [bold] caf\\xe9\\nhere\n"),
        (ConfigError("config key a=1: accepted: 2."), 2, "error: config key a=1: accepted: 2.\n"),
        (DivergedError("not finite"), 3, "error: not finite\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (SystemExit(7), 7, ""),
    ],
)
def test_what_ends_a_command(error, code, said, capsys):
    def command() -> int:
        raise error

    assert ends(command) == code
    assert capsys.readouterr().err == said


def test_a_command_returns_its_exit_code():
    assert ends(lambda: None) == 0 and ends(lambda: 143) == 143


def test_output_that_cannot_be_written_is_one_sentence(monkeypatch, capsys, tmp_path):
    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(28, "No space left on device")

        def fileno(self) -> int:
            return os.open(tmp_path / "out", os.O_CREAT | os.O_WRONLY)

    monkeypatch.setattr(sys, "stdout", Full())
    assert ends(lambda: None) == 2
    assert capsys.readouterr().err == "error: what the command prints can't be written (No space left on device).\n"
    monkeypatch.setattr(sys, "stdout", None)  # closed from the start
    assert ends(lambda: None) == 0


IMPORTING = """
import sys
sys.argv[0] = "-m"  # as while `python -m fedbert_jax.main` looks for main
import fedbert_jax
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
except BaseException:  # some library's, in its imports
    time.sleep(60)
"""


def test_ctrl_c_while_modules_are_imported_is_one_word():
    done = subprocess.run([sys.executable, "-c", IMPORTING], env=environment(), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr, done.stdout) == (130, "interrupted\n", "")


def test_ctrl_c_in_a_callback_is_not_lost(monkeypatch):
    """Python only prints an exception raised there, with a traceback, and goes on."""
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(os, "write", lambda fd, text: codes.append(text))
    cli.raise_on_interrupt()

    class Thing:
        pass

    def interrupted(_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):
            pass

    thing = Thing()
    reference = weakref.ref(thing, interrupted)
    sys.unraisablehook = sys.unraisablehook  # pytest sets its own hook between tests
    del thing
    assert codes[:2] == [b"interrupted\n", 130] and reference() is None

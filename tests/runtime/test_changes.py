"""Waiting threads are woken by what concerns them."""

from __future__ import annotations

import threading
import time

import pytest

from fedbert_jax.runtime import changes
from fedbert_jax.runtime.changes import Changes


@pytest.mark.parametrize(("told", "woken"), [((1,), {1}), ((2, "other"), {2}), ((), {1, 2})])
def test_a_change_wakes_only_those_whom_it_concerns(monkeypatch, told, woken):
    monkeypatch.setattr(changes, "POLL", 60.0)
    lock, seen = Changes(), set()

    def wait(about: int) -> None:
        with lock:
            lock.wait(about)
            seen.add(about)

    threads = [threading.Thread(target=wait, args=(about,), daemon=True) for about in (1, 2)]
    for thread in threads:
        thread.start()
    while True:
        with lock:
            if len(lock._about) == 2:  # whoever has noted its condition holds the lock until it waits
                lock.tell(*told)
                break
        time.sleep(0.001)
    for about, thread in enumerate(threads, 1):
        thread.join(20 if about in woken else 0.1)
    assert seen == woken
    with lock:
        lock.tell()
        assert not lock._about
    for thread in threads:
        thread.join(20)
    assert seen == {1, 2}


def test_who_is_not_told_looks_after_a_moment():
    lock, start = Changes(), time.monotonic()
    with lock:
        lock.wait("nothing")
    assert time.monotonic() - start < 10

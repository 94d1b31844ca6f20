"""Checkpoints: restored bit for bit, the newest kept, a flipped bit noticed, another mesh accepted."""

from __future__ import annotations

import sys
import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedbert_jax.config import MeshConfig
from fedbert_jax.devices.mesh import make_mesh
from fedbert_jax.errors import UserError
from fedbert_jax.workdir.checkpoint import Checkpoints


def state(scale=1.0):
    return {"w": scale * jax.random.normal(jax.random.key(0), (64, 32)), "count": jnp.int32(7), "none": ()}


@pytest.fixture
def placed():
    here = jax.sharding.NamedSharding(make_mesh(MeshConfig()), jax.sharding.PartitionSpec())
    shapes = jax.eval_shape(state)
    return shapes, jax.tree.map(lambda _: here, shapes)


def test_the_newest_stay_and_come_back_bit_for_bit(tmp_path, placed):
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    for n in (1, 2, 3):
        checkpoints.save(n, state(n), {"round": n})
    checkpoints.close()
    again = Checkpoints(tmp_path / "c")
    assert again.rounds() == [2, 3]
    restored, meta = again.restore(3, *placed)
    assert meta == {"round": 3}
    assert np.array_equal(restored["w"], state(3)["w"]) and restored["count"] == 7


def test_a_state_that_is_overwritten_at_once_is_saved_as_it_was(tmp_path, placed):
    """A round takes over its state's buffers while orbax is still writing."""
    checkpoints = Checkpoints(tmp_path / "c", keep=1)
    now = state()
    expected = np.array(now["w"])
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 + 3, s), donate_argnums=0)
    checkpoints.save(1, now, {})
    overwrite(now)
    checkpoints.close()
    restored, _ = Checkpoints(tmp_path / "c").restore(1, *placed)
    assert np.array_equal(restored["w"], expected)


@pytest.mark.parametrize("damage", ["flip", "cut", "other"])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, placed, damage):
    checkpoints = Checkpoints(tmp_path / "c", keep=3)
    for n in (4, 8):
        checkpoints.save(n, state(n), {})
    checkpoints.close()
    shapes, shardings = placed
    if damage == "other":
        shapes = shapes | {"w": jax.ShapeDtypeStruct((3, 3), jnp.float32)}
    else:
        file = max((f for f in (tmp_path / "c" / "8").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data if damage == "flip" else data[: len(data) // 2])
    with pytest.raises(UserError, match=r"c/8 is damaged.*delete that directory to go on from round 4"):
        Checkpoints(tmp_path / "c").restore(8, shapes, shardings)


def test_nobody_is_told_to_delete_a_checkpoint_of_another_version(tmp_path, placed):
    """Its state has other fields, though they may hold nothing; whoever has the version that wrote it can read it."""
    shapes, shardings = placed
    for saved in (state() | {"outer": ()}, state() | {"outer": state()["w"]}):
        checkpoints = Checkpoints(tmp_path / str(len(saved["outer"])), keep=1)
        checkpoints.save(1, saved, {})
        checkpoints.close()
        checkpoints = Checkpoints(tmp_path / str(len(saved["outer"])))
        with pytest.raises(UserError, match="the version that wrote it can go on with it") as refused:
            checkpoints.restore(1, shapes | {"averaging": ()}, shardings | {"averaging": ()})
        assert "delete that directory" not in str(refused.value)


def test_a_read_that_ends_late_stays_unsaid_and_all_else_is_told(tmp_path, placed, monkeypatch):
    """Reads that are cut short by a damaged one find, some time later, in their own threads, their event loop closed."""
    told = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: told.append(str(error)))
    monkeypatch.setattr(sys, "unraisablehook", lambda given: told.append(str(given.exc_value)))
    checkpoints = Checkpoints(tmp_path / "c", keep=1)
    checkpoints.save(1, state(), {})
    checkpoints.close()
    largest = max((f for f in (tmp_path / "c").rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])

    def speak(*errors: Exception) -> None:
        for error in errors:
            sys.excepthook(type(error), error, None)
            sys.unraisablehook(SimpleNamespace(exc_value=error))

    for _ in range(2):
        with pytest.raises(UserError, match="is damaged"):
            Checkpoints(tmp_path / "c").restore(1, *placed)
        told.clear()
        thread = threading.Thread(target=speak, args=(RuntimeError("Event loop is closed"), RuntimeError("another")))
        thread.start()
        thread.join()
        speak(RuntimeError("Event loop is closed"))  # the main thread's own
        assert told == ["another"] * 2 + ["Event loop is closed"] * 2

"""One-time pads: a sum of hidden numbers is the sum, nothing of a number shows, and no pad is used twice."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedbert_jax.errors import UserError
from fedbert_jax.privacy.pads import Pads

RNG = np.random.default_rng(0)
AT = (7, 2, 5)  # epoch, round, barrier


def numbers() -> dict[str, np.ndarray]:
    """A message with numbers of every size, the smallest and the largest of 32 bits among them."""
    a = RNG.integers(-(2**31), 2**31, (40, 30), dtype=np.int64).astype(np.int32)
    a[0, :2] = -(2**31), 2**31 - 1
    return {"a": a, "b": RNG.integers(-3, 4, 5000).astype(np.int32), "fine": np.float32(0.0)}


def test_clients_take_their_pads_off_the_sum():
    sent = [numbers() for _ in range(3)]
    clients = [Pads(11, "run") for _ in sent]
    hidden = [pads.hide(x, AT, place) for pads, x, place in zip(clients, sent, (0, 4, 2), strict=True)]
    with np.errstate(over="ignore"):
        total = {name: sum((x[name] for x in hidden[1:]), hidden[0][name]) for name in ("a", "b", "fine")}
        plain = {name: sum((x[name] for x in sent[1:]), sent[0][name]) for name in ("a", "b", "fine")}
    nonces = np.stack([x["nonce"] for x in hidden])
    for pads in clients:
        shown = pads.show(total, AT, (0, 4, 2), nonces)
        for name in plain:
            np.testing.assert_array_equal(shown[name], plain[name], err_msg=name)
    for other in (Pads(12, "run"), Pads(11, "another run")):  # who has another secret reads nothing
        assert not np.any(other.show(total, AT, (0, 4, 2), nonces)["a"] == plain["a"])
    assert not np.any(Pads(11, "run").show(total, (7, 2, 6), (0, 4, 2), nonces)["a"] == plain["a"])


def test_a_pad_is_the_stream_of_its_key():
    """RFC 8439's stream under RFC 5869's key, made here from `cryptography` alone."""
    pads = Pads(11, "run", random=lambda n: bytes(range(n)))
    hidden = pads.hide({"x": np.zeros(100, np.int32)}, AT, 3)
    info = b"fedbert_jax/pad/7/2/5/3/run/" + bytes(range(16))
    key = HKDF(hashes.SHA256(), 32, salt=None, info=info).derive(b"11")
    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(400))
    assert hidden["x"].tobytes() == stream and hidden["nonce"].tobytes() == bytes(range(16))


def test_hidden_numbers_are_no_more_alike_than_chance():
    """Every message has a pad of its own: of clients, rounds, steps, epochs and tensors; each byte is as frequent."""
    zero = {"x": np.zeros((200, 200), np.int32), "y": np.zeros((200, 200), np.int32)}
    ids = [(*AT[:2], 5), (*AT[:2], 6), (AT[0], 3, 5), (8, 2, 5)]
    pads = Pads(11, "run")
    found = [pads.hide(zero, id, client)[name] for id in ids for client in (0, 1) for name in "xy"]
    for a, b in itertools.combinations(found, 2):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.03
    counts = np.bincount(np.concatenate([x.ravel() for x in found]).view(np.uint8), minlength=256)
    expected = counts.sum() / 256
    assert np.sum((counts - expected) ** 2 / expected) < 400  # chi-squared with 255 degrees of freedom: 255 +- 23


def test_every_tensor_has_a_pad_however_small():
    zero = {f"x{n}": np.zeros(n, np.int32) for n in (1, 2, 7, 63, 64, 1000)} | {"scalar": np.zeros((), np.int32)}
    hidden = Pads(11, "run").hide(zero, AT, 0)
    for name, x in zero.items():
        assert hidden[name].shape == x.shape and np.all(hidden[name] != 0), name


def test_a_pad_that_would_be_used_twice_is_refused():
    stuck = Pads(11, "run", random=lambda n: bytes(n))
    first = stuck.hide(numbers(), AT, 0)
    with pytest.raises(UserError, match="a pad would be used twice; nothing was sent"):
        stuck.hide(numbers(), AT, 0)
    with pytest.raises(UserError, match="a pad would be used twice"):
        stuck.hide(numbers(), (8, 2, 5), 0)  # the round has begun again
    other, nonces = Pads(11, "run"), first["nonce"][None]
    total = {"a": first["a"]}
    once = other.show(total, AT, [0], nonces)
    np.testing.assert_array_equal(other.show(total, AT, [0], nonces)["a"], once["a"])  # the same answer, asked for again
    with pytest.raises(UserError, match="client 0 of the roster used a pad twice"):
        other.show(total, (7, 2, 8), [0], nonces)
    with pytest.raises(UserError, match="names one twice"):
        other.show(total, (7, 2, 9), [1, 1], np.zeros((2, 16), np.uint8))


def test_what_is_sealed_is_opened_by_clients_of_the_same_run_and_round_only():
    arrays = [np.arange(6, dtype=np.float32).reshape(2, 3), np.int32(7), np.zeros((0, 4), np.float32)]
    pads = Pads(11, "run")
    sealed = pads.seal(arrays, 3)
    assert sealed.dtype == np.uint8 and len(sealed) == 6 * 4 + 4 + 28
    assert arrays[0].tobytes() not in sealed.tobytes()
    for found, x in zip(Pads(11, "run").unseal(sealed, arrays, 3), arrays, strict=True):
        np.testing.assert_array_equal(found, x)
        assert found.dtype == np.asarray(x).dtype
    changed = sealed.copy()
    changed[40] ^= 1
    others = [(Pads(12, "run"), sealed, 3), (Pads(11, "other"), sealed, 3), (pads, sealed, 2), (pads, changed, 3)]
    for other, data, round in others:
        with pytest.raises(UserError, match="can't be opened"):
            other.unseal(data, arrays, round)
    assert not np.array_equal(pads.seal(arrays, 3)[:12], sealed[:12])

"""Frames hold what was put in, and whatever is no frame is refused before memory is taken."""

from __future__ import annotations

import json
import struct

import ml_dtypes
import numpy as np
import pytest
import xxhash

from fedbert_jax.runtime.frames import DTYPES, DamagedError, FrameError, TensorSpec, check, decode, digest, encode, size_of

LIMIT = 1 << 16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 4), (2, 3, 4)])
def test_what_goes_in_comes_out(dtype, shape):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 100, shape).astype(DTYPES[dtype])
    meta, tensors = decode(encode({"id": [1, 2], "name": "Zürich"}, {"x": x, "transposed": x.T}), LIMIT)
    assert meta == {"id": [1, 2], "name": "Zürich"} and list(tensors) == ["x", "transposed"]
    for found, wanted in ((tensors["x"], x), (tensors["transposed"], x.T)):
        assert found.dtype == wanted.dtype and found.shape == wanted.shape and not found.flags.writeable
        np.testing.assert_array_equal(found, wanted)


def test_a_frame_is_a_header_and_raw_bytes():
    """As the module's docstring lays it out, by hand."""
    head = json.dumps({"meta": {"a": 1}, "tensors": [["x", "uint16", [2]]]}, separators=(",", ":")).encode()
    head += b" " * (-(8 + 4 + len(head)) % 16)
    rest = struct.pack("<I", len(head)) + head + b"\x01\x00\x02\x01"
    frame = struct.pack("<Q", xxhash.xxh3_64_intdigest(rest)) + rest
    assert encode({"a": 1}, {"x": np.array([1, 258], np.uint16)}) == frame
    assert decode(frame, LIMIT)[1]["x"].tolist() == [1, 258]


def summed(rest: bytes) -> bytes:
    return struct.pack("<Q", xxhash.xxh3_64_intdigest(rest)) + rest


def frame(header: object, body: bytes = b"") -> bytes:
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return summed(struct.pack("<I", len(head)) + head + body)


GOOD = {"meta": {}, "tensors": [["x", "float32", [2]]]}


@pytest.mark.parametrize(
    "data, words",
    [
        (b"", "no header"),
        (b"\xff\xff\xff\xff", "no header"),
        (summed(b"\xff\xff\xff\xff"), "length is wrong"),
        (summed(struct.pack("<I", 50) + b"{}"), "length is wrong"),
        (frame(b"\x80\x04\x95"), "not one"),  # a pickle
        (frame(b"[" * 60_000), "not one"),
        (frame([]), "not one"),
        (frame({"meta": {}}), "not one"),
        (frame({"meta": [], "tensors": []}), "not one"),
        (frame({"meta": {}, "tensors": [["x", "object", [1]]]}, b"\0" * 8), "not one"),
        (frame({"meta": {}, "tensors": [["x", "float64", [1]]]}, b"\0" * 8), "not one"),
        (frame({"meta": {}, "tensors": [["x", "float32", [-1]]]}), "not one"),
        (frame({"meta": {}, "tensors": [["x", "float32", [True]]]}, b"\0" * 4), "not one"),
        (frame({"meta": {}, "tensors": [["x", "float32", [1.0]]]}, b"\0" * 4), "not one"),
        (frame({"meta": {}, "tensors": [["x", "float32", [1] * 7]]}, b"\0" * 4), "not one"),
        (frame({"meta": {}, "tensors": [["", "uint8", []]] * 4097}, b"\0" * 4097), "at most|not one"),
        (frame({"meta": {}, "tensors": [["x", "uint8", []], ["x", "uint8", []]]}, b"\0\0"), "one name"),
        (frame({"meta": {}, "tensors": [["x", "float32", [2**31 - 1] * 6]]}), "header says"),  # wraps in 64 bits
        (frame(GOOD, b"\0" * 7), "7 bytes of tensors"),
        (frame(GOOD, b"\0" * 9), "9 bytes of tensors"),
        (frame(GOOD, b"\0" * LIMIT), "at most 65,536"),
    ],
)
def test_what_is_no_frame_is_refused(data, words):
    with pytest.raises(FrameError, match=words):
        decode(data, LIMIT)


def test_every_truncation_of_a_frame_is_refused():
    whole = encode({"id": 1}, {"x": np.arange(5, dtype=np.float32)})
    for end in range(len(whole)):
        with pytest.raises(FrameError):
            decode(whole[:end], LIMIT)


def test_every_flipped_bit_of_a_frame_is_noticed():
    """Wherever it is: in a tensor, it would else be trained on, and in the header it could make another message of it."""
    whole = encode({"id": [7, 1, 0]}, {"x": np.arange(5, dtype=np.float32)})
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DamagedError, match="checksum differs"):
            decode(bytes(damaged), LIMIT)


def test_what_may_not_cross_is_not_sent():
    with pytest.raises(FrameError, match="float64"):
        encode({}, {"x": np.zeros(2)})
    with pytest.raises(FrameError, match="object"):
        encode({}, {"x": np.array([{}])})
    with pytest.raises(FrameError, match="a header of"):
        encode({"text": "x" * (1 << 20)})


SCHEMA = {"h": TensorSpec("float32", (2, 3)), "positions": TensorSpec("uint16", (2,))}


@pytest.mark.parametrize(
    "change, words",
    [
        ({}, ""),
        ({"h": np.zeros((2, 4), np.float32)}, "h is float32 [2, 4]; expected: float32 [2, 3]"),
        ({"h": np.zeros((2, 3), ml_dtypes.bfloat16)}, "h is bfloat16 [2, 3]; expected: float32 [2, 3]"),
        ({"tokens": np.zeros(2, np.int32)}, "not expected: tokens"),
        ({"positions": None}, "missing: positions"),
        ({"h": np.full((2, 3), np.nan, np.float32)}, "h holds a number that is not finite"),
        ({"h": np.array([[0, 0, 0], [0, -np.inf, 0]], np.float32)}, "h holds a number that is not finite"),
        ({"h": np.full((2, 3), -1e9, np.float32)}, "h holds a number that is too large"),
    ],
)
def test_a_message_is_what_was_expected(change, words):
    tensors = {"h": np.zeros((2, 3), np.float32), "positions": np.zeros(2, np.uint16)} | change
    assert check({name: x for name, x in tensors.items() if x is not None}, SCHEMA) == words


def test_a_schema_has_a_size_and_a_frame_a_digest():
    assert size_of(SCHEMA) == 2 * 3 * 4 + 2 * 2
    whole, other = (encode({"id": 1}, {"x": np.array([1, n], np.int32)}) for n in (2, 3))
    assert digest(whole) == digest(bytes(bytearray(whole))) != digest(other)


@pytest.mark.parametrize(
    "sizes, words",
    [
        ((16, 16), ""),
        ((32, 32), ""),
        ((24, 24), "h is float32 [2, 24, 3]; expected: float32 [2, (16, 32), 3]"),
        ((16, 32), "scale is float32 [2, 32, 1]; expected: float32 [2, (16, 32), 1]"),
    ],
)
def test_a_size_that_is_left_open_is_one_of_those_and_the_same_in_all_of_a_message(sizes, words):
    schema = {"h": TensorSpec("float32", (2, (16, 32), 3)), "scale": TensorSpec("float32", (2, (16, 32), 1))}
    tensors = {"h": np.zeros((2, sizes[0], 3), np.float32), "scale": np.zeros((2, sizes[1], 1), np.float32)}
    assert check(tensors, schema) == words
    assert check({"h": np.zeros((2, 16), np.float32), "scale": tensors["scale"]}, schema).startswith("h is float32 [2, 16]")
    assert size_of(schema) == 2 * 32 * 4 * 4

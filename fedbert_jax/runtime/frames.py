"""Frames: the bytes that one message of a federation is, and what a receiver demands of them.

A frame is a header and raw tensors: uint64 XXH3 of all that follows it, uint32 length of the header, the header (JSON:
`meta` and a list of name, dtype, shape; spaces, so that the tensors begin at a multiple of 16 bytes), then each tensor's
bytes in C order, little-endian. Decoding makes views, copies nothing and executes nothing. Everything is checked against
caps before memory is taken: a frame comes from another organisation. The checksum finds what was damaged on the way, which
TCP's 16 bits let through now and then; against whoever would change bytes on purpose there is TLS.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import xxhash

# What may cross. Nothing here can hold a Python object.
DTYPES = {
    name: np.dtype(kind)
    for name, kind in {
        "float32": np.float32,
        "bfloat16": ml_dtypes.bfloat16,
        "int8": np.int8,
        "int32": np.int32,
        "uint8": np.uint8,
        "uint16": np.uint16,
        "uint32": np.uint32,
    }.items()
}
CHECKSUM = struct.Struct("<Q")
FIXED = struct.Struct("<QI")  # checksum, length of the header
JSON = json.JSONEncoder(separators=(",", ":"))
ALIGNED = 16  # bytes: numpy reads arrays that lie otherwise several times as slowly
MAX_HEADER = 1 << 20  # bytes
MAX_TENSORS = 4096
MAX_RANK = 6
LARGEST = 1e6  # of an absolute value: no activation, gradient or weight of a training that works comes near it

Tensors = dict[str, np.ndarray]


class FrameError(ValueError):
    """Bytes that are no frame, or a frame that is not the one expected; the message says why."""

    code = "INVALID_ARGUMENT"  # gRPC's


class DamagedError(FrameError):
    """A frame that isn't as it was sent: asked for again, it may come whole."""

    code = "DATA_LOSS"


class TensorSpec(NamedTuple):
    """What a receiver expects of one tensor."""

    dtype: str
    shape: tuple[int | tuple[int, ...], ...]  # several sizes in place of one: any of them, the same in all of a message


Schema = Mapping[str, TensorSpec]


def encode(meta: Mapping[str, Any], tensors: Mapping[str, np.ndarray] | None = None) -> bytes:
    """Returns the frame of a message.

    Args:
      meta: what JSON can hold.
      tensors: arrays of the types in `DTYPES`, by name.
    """
    arrays = {name: np.asarray(x) for name, x in (tensors or {}).items()}
    for name, x in arrays.items():
        if x.dtype.name not in DTYPES:
            raise FrameError(f"{name} is {x.dtype.name}; accepted: {', '.join(DTYPES)}")
    described = [[name, x.dtype.name, list(x.shape)] for name, x in arrays.items()]
    head = JSON.encode({"meta": dict(meta), "tensors": described}).encode()
    head += b" " * (-(FIXED.size + len(head)) % ALIGNED)
    if len(head) > MAX_HEADER:
        raise FrameError(f"a header of {len(head):,} bytes; accepted: at most {MAX_HEADER:,}")
    # `ravel` rather than `ascontiguousarray`, which would make a scalar one-dimensional.
    parts = [x.ravel(order="C").view(np.uint8).data for x in arrays.values()]
    start = struct.pack("<I", len(head)) + head
    checksum = xxhash.xxh3_64(start)
    for part in parts:
        checksum.update(part)
    return b"".join([CHECKSUM.pack(checksum.intdigest()), start, *parts])


def decode(data: bytes | memoryview, limit: int) -> tuple[dict[str, Any], Tensors]:
    """Returns a frame's meta and its tensors, which are read-only views of `data`.

    Args:
      data: the frame.
      limit: bytes that it may have.

    Raises:
      FrameError: if it is none; `DamagedError` if it was one when it was sent.
    """
    if len(data) > limit:
        raise FrameError(f"{len(data):,} bytes; accepted: at most {limit:,}")
    if len(data) < FIXED.size:
        raise DamagedError("it has no header")
    checksum, size = FIXED.unpack_from(data)
    if xxhash.xxh3_64_intdigest(memoryview(data)[CHECKSUM.size :]) != checksum:
        raise DamagedError("its checksum differs: bytes were changed or lost on the way")
    at = FIXED.size + size  # where the tensors begin
    if size > MAX_HEADER or at > len(data):
        raise FrameError("the header's length is wrong")
    try:
        head = json.loads(bytes(data[FIXED.size : at]))
        meta, described = head["meta"], head["tensors"]
        if not isinstance(meta, dict) or not isinstance(described, list) or len(described) > MAX_TENSORS:
            raise ValueError("meta is an object and tensors a list")
        specs = [_spec(*entry) for entry in described]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FrameError(f"the header is not one ({type(error).__name__})") from None
    names = [name for name, _, _ in specs]
    if len(set(names)) != len(names):
        raise FrameError("two tensors have one name")
    sizes = [DTYPES[dtype].itemsize * _count(shape) for _, dtype, shape in specs]
    if at + sum(sizes) != len(data):
        raise FrameError(f"{len(data) - at:,} bytes of tensors, where the header says {sum(sizes):,}")
    tensors = {}
    for (name, dtype, shape), bytes_ in zip(specs, sizes, strict=True):
        array = np.frombuffer(data, DTYPES[dtype], _count(shape), at).reshape(shape)
        array.flags.writeable = False
        tensors[name] = array
        at += bytes_
    return meta, tensors


def check(tensors: Mapping[str, np.ndarray], schema: Schema) -> str:
    """Says what of a message is not as expected: names, types, shapes, or a number that no training makes; "" if nothing."""
    if tensors.keys() != schema.keys():
        extra, lacking = sorted(tensors.keys() - schema.keys()), sorted(schema.keys() - tensors.keys())
        return "; ".join([f"not expected: {name}" for name in extra[:3]] + [f"missing: {name}" for name in lacking[:3]])
    chosen: dict[tuple[int, ...], int] = {}
    for name, spec in schema.items():
        x = tensors[name]
        if x.dtype.name != spec.dtype or not _fits(x.shape, spec, chosen):
            return f"{name} is {x.dtype.name} {list(x.shape)}; expected: {spec.dtype} {list(spec.shape)}"
        if spec.dtype in ("float32", "bfloat16") and x.size:
            with np.errstate(invalid="ignore"):
                x = x.astype(np.float32, copy=False)
                largest = max(float(x.max()), -float(x.min()))  # NaN, if there is one: both are then
            if not largest <= LARGEST:  # NaN, too
                return f"{name} holds a number that is {'not finite' if not np.isfinite(largest) else 'too large'}"
    return ""


def size_of(schema: Schema) -> int:
    """Returns the bytes of the tensors of a schema: the most, where it leaves a size open."""
    most = lambda spec: tuple(n if isinstance(n, int) else max(n) for n in spec.shape)  # noqa: E731
    return sum(DTYPES[spec.dtype].itemsize * _count(most(spec)) for spec in schema.values())


def digest(data: bytes) -> str:
    """Returns what tells a frame that is sent again from another: its checksum, which `decode` has checked, and its size.

    Whoever contrived two frames with one checksum would have the second taken for a repetition of the first, and ignored.
    """
    return f"{FIXED.unpack_from(data)[0]:016x}-{len(data)}"


def _spec(name: Any, dtype: Any, shape: Any) -> tuple[str, str, tuple[int, ...]]:
    whole = isinstance(shape, list) and len(shape) <= MAX_RANK and all(type(n) is int and 0 <= n < 2**31 for n in shape)
    if not isinstance(name, str) or not isinstance(dtype, str) or dtype not in DTYPES or not whole:
        raise ValueError("a name, a known dtype and a shape")
    return name, dtype, tuple(shape)


def _fits(shape: tuple[int, ...], spec: TensorSpec, chosen: dict[tuple[int, ...], int]) -> bool:
    """Whether a shape is one of those expected; `chosen` has the sizes that the message's other tensors have settled."""
    if len(shape) != len(spec.shape):
        return False
    return all(
        n == size if isinstance(size, int) else n in size and chosen.setdefault(size, n) == n
        for n, size in zip(shape, spec.shape, strict=True)
    )


def _count(shape: tuple[int, ...]) -> int:
    count = 1  # in Python's integers, which don't overflow
    for n in shape:
        count *= n
    return count

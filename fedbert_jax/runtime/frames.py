"""Frames: the bytes that one message of a federation is, and what a receiver demands of them.

A frame is a header and raw tensors: uint32 length of the header, the header (JSON: `meta` and a list of name, dtype,
shape), then each tensor's bytes in C order, little-endian. Decoding makes views, copies nothing and executes nothing.
Everything is checked against caps before memory is taken: a frame comes from another organisation.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

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
MAX_HEADER = 1 << 20  # bytes
MAX_TENSORS = 4096
MAX_RANK = 6
LARGEST = 1e6  # of an absolute value: no activation, gradient or weight of a training that works comes near it

Tensors = dict[str, np.ndarray]


class FrameError(ValueError):
    """Bytes that are no frame, or a frame that is not the one expected; the message says why."""


class TensorSpec(NamedTuple):
    """What a receiver expects of one tensor."""

    dtype: str
    shape: tuple[int, ...]


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
    head = json.dumps({"meta": dict(meta), "tensors": described}, separators=(",", ":")).encode()
    if len(head) > MAX_HEADER:
        raise FrameError(f"a header of {len(head):,} bytes; accepted: at most {MAX_HEADER:,}")
    # `ravel` rather than `ascontiguousarray`, which would make a scalar one-dimensional.
    parts = [x.ravel(order="C").view(np.uint8).data for x in arrays.values()]
    return b"".join([struct.pack("<I", len(head)), head, *parts])


def decode(data: bytes | memoryview, limit: int) -> tuple[dict[str, Any], Tensors]:
    """Returns a frame's meta and its tensors, which are read-only views of `data`.

    Args:
      data: the frame.
      limit: bytes that it may have.

    Raises:
      FrameError: if it is none.
    """
    if len(data) > limit:
        raise FrameError(f"{len(data):,} bytes; accepted: at most {limit:,}")
    if len(data) < 4:
        raise FrameError("no header")
    (size,) = struct.unpack_from("<I", data)
    if size > MAX_HEADER or 4 + size > len(data):
        raise FrameError("the header's length is wrong")
    try:
        head = json.loads(bytes(data[4 : 4 + size]))
        meta, described = head["meta"], head["tensors"]
        if not isinstance(meta, dict) or not isinstance(described, list) or len(described) > MAX_TENSORS:
            raise ValueError("meta is an object and tensors a list")
        specs = [_spec(*entry) for entry in described]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise FrameError(f"the header is not one ({type(error).__name__})") from None
    names = [name for name, _ in specs]
    if len(set(names)) != len(names):
        raise FrameError("two tensors have one name")
    sizes = [DTYPES[spec.dtype].itemsize * _count(spec.shape) for _, spec in specs]
    if 4 + size + sum(sizes) != len(data):
        raise FrameError(f"{len(data) - 4 - size:,} bytes of tensors, where the header says {sum(sizes):,}")
    tensors, at = {}, 4 + size
    for (name, spec), bytes_ in zip(specs, sizes, strict=True):
        array = np.frombuffer(data, DTYPES[spec.dtype], _count(spec.shape), at).reshape(spec.shape)
        array.flags.writeable = False
        tensors[name] = array
        at += bytes_
    return meta, tensors


def check(tensors: Mapping[str, np.ndarray], schema: Schema) -> str:
    """Says what of a message is not as expected: names, types, shapes, or a number that no training makes; "" if nothing."""
    if tensors.keys() != schema.keys():
        extra, lacking = sorted(tensors.keys() - schema.keys()), sorted(schema.keys() - tensors.keys())
        return "; ".join([f"not expected: {name}" for name in extra[:3]] + [f"missing: {name}" for name in lacking[:3]])
    for name, spec in schema.items():
        x = tensors[name]
        if x.dtype.name != spec.dtype or x.shape != spec.shape:
            return f"{name} is {x.dtype.name} {list(x.shape)}; expected: {spec.dtype} {list(spec.shape)}"
        if spec.dtype in ("float32", "bfloat16") and x.size:
            with np.errstate(invalid="ignore"):
                largest = float(np.max(np.abs(x.astype(np.float32, copy=False))))
            if not largest <= LARGEST:  # NaN, too
                return f"{name} holds a number that is {'not finite' if not np.isfinite(largest) else 'too large'}"
    return ""


def size_of(schema: Schema) -> int:
    """Returns the bytes of the tensors of a schema."""
    return sum(DTYPES[spec.dtype].itemsize * _count(spec.shape) for spec in schema.values())


def digest(data: bytes) -> str:
    """Returns what tells two frames apart: SHA-256, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def _spec(name: Any, dtype: Any, shape: Any) -> tuple[str, TensorSpec]:
    whole = isinstance(shape, list) and len(shape) <= MAX_RANK and all(type(n) is int and 0 <= n < 2**31 for n in shape)
    if not isinstance(name, str) or not isinstance(dtype, str) or dtype not in DTYPES or not whole:
        raise ValueError("a name, a known dtype and a shape")
    return name, TensorSpec(dtype, tuple(shape))


def _count(shape: tuple[int, ...]) -> int:
    count = 1  # in Python's integers, which don't overflow
    for n in shape:
        count *= n
    return count

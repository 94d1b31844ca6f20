"""What crosses between a client and the server beside tensors: the calls there are, how they are refused, and a greeting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

METHODS = ("enrol", "status", "bye", "join", "bring", "turn", "segment", "message", "transform", "body", "leave")
HEADER = 1 << 16  # bytes that the header of a message may have beside its tensors
PROTOCOL = 2  # grows with what messages are called and mean; parties have the same
POLL = 0.05  # seconds between two looks at the clock


class Abort(Exception):
    """A call that is refused; transports turn it into their own kind of error."""

    def __init__(self, code: str, text: str):
        super().__init__(text)
        self.code, self.text = code, text


class Hello(NamedTuple):
    """What a client says of itself when it joins; both sides must agree in all of it but its text."""

    config: Mapping[str, Any]  # flat, the keys that both sides share
    tokenizer: str  # a digest of its files
    secret: str  # a digest of the clients' secret, which the server doesn't know
    version: str

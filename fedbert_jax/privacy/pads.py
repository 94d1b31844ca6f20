"""One-time pads on what clients send to be averaged, and snapshots that only clients can open.

A client adds a pad to its whole numbers modulo 2**32: a stream of ChaCha20 under a key of that message alone, derived from
the clients' secret, the run, the message's place, the client and a nonce that it draws from the operating system. The server
adds up what it gets and returns the sum with the list of nonces; each client makes the same pads again and subtracts them. A
client that drops out before it has sent is not in the list, and one that drops out afterwards isn't needed any more.

Whoever holds the clients' secret can open everything: one client that colludes with the server is enough. A server that
alters a sum, or the list, is not noticed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fedbert_jax.errors import UserError

NONCE = 16  # bytes
SEAL = 12 + 16  # bytes by which a sealed snapshot is longer: AES-GCM's nonce and tag

Tensors = dict[str, np.ndarray]


class Pads:
    """A client's pads and snapshots.

    Args:
      secret: the clients', a whole number; pads are worth no more than it is hard to guess.
      run: the training's name: another training with the same secret has other pads.
      random: where nonces come from.
    """

    def __init__(self, secret: int, run: str, random: Callable[[int], bytes] = os.urandom):
        self._secret, self._run, self._random = str(secret).encode(), run.encode(), random
        self._round = -1
        self._mine: set[bytes] = set()  # nonces of this round, which this client has used
        self._seen: dict[tuple[int, bytes], Sequence[int]] = {}  # where others have used theirs in this round

    def hide(self, tensors: Mapping[str, np.ndarray], id: Sequence[int], client: int) -> Tensors:
        """Returns tensors with a pad on every int32, and the nonce of that pad, uint8 [16].

        Args:
          tensors: of one message.
          id: the message's place: (epoch, round, barrier).
          client: the sender's place in the roster.

        Raises:
          UserError: if the nonce has been used before: two messages under one pad would show their difference.
        """
        nonce = self._random(NONCE)
        self._begin(id[1])
        if nonce in self._mine:
            raise UserError("the operating system's random numbers repeat: a pad would be used twice; nothing was sent.")
        self._mine.add(nonce)
        hidden = dict(tensors)
        for name, pad in self._pads(tensors, id, client, nonce):
            hidden[name] = (tensors[name].view(np.uint32) + pad).view(np.int32)
        return hidden | {"nonce": np.frombuffer(nonce, np.uint8)}

    def show(
        self, total: Mapping[str, np.ndarray], id: Sequence[int], clients: Sequence[int], nonces: np.ndarray
    ) -> Tensors:
        """Returns the sum of messages without their pads.

        Args:
          total: the sum of what `hide` made, without nonces.
          id: the place of the messages.
          clients: whose messages it is the sum of, by their places in the roster.
          nonces: theirs, uint8 [n, 16].

        Raises:
          UserError: if a client, or a nonce of a client, is in the list twice, or was used for another message.
        """
        self._begin(id[1])
        shown = {name: np.array(x) for name, x in total.items()}
        if len(set(clients)) != len(clients):
            raise UserError("the server's list of clients in a sum names one twice; nothing was learnt from it.")
        for client, row in zip(clients, nonces, strict=True):
            nonce = row.tobytes()
            if self._seen.setdefault((client, nonce), tuple(id)) != tuple(id):
                raise UserError(f"client {client} of the roster used a pad twice; nothing was learnt from the sum.")
            for name, pad in self._pads(total, id, client, nonce):
                shown[name].view(np.uint32)[...] -= pad
        return shown

    def seal(self, arrays: Sequence[np.ndarray], round: int) -> np.ndarray:
        """Returns arrays as bytes that only clients can read or make (AES-256-GCM), uint8 [n]; `round` is what it is of."""
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        nonce, plain = self._random(12), b"".join(np.ascontiguousarray(x).tobytes() for x in arrays)
        sealed = AESGCM(self._key("snapshot")).encrypt(nonce, plain, str(round).encode())
        return np.frombuffer(nonce + sealed, np.uint8)

    def unseal(self, sealed: np.ndarray, like: Sequence[Any], round: int) -> list[np.ndarray]:
        """Returns the arrays that `seal` was given.

        Args:
          sealed: uint8 [n].
          like: arrays, or shapes, as they were.
          round: what it has to be of.

        Raises:
          UserError: if no client of this run has sealed it, or it is of another round.
        """
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        data = sealed.tobytes()
        try:
            plain = AESGCM(self._key("snapshot")).decrypt(data[:12], data[12:], str(round).encode())
        except InvalidTag:
            raise UserError(
                f"the segment of round {round} that the server has can't be opened: it is of another round, or the clients "
                "have different secrets (privacy.client_seed, network.credentials)."
            ) from None
        found, at = [], 0
        for x in like:
            count = int(np.prod(x.shape, dtype=np.int64))
            found.append(np.frombuffer(plain, x.dtype, count, at).reshape(x.shape))
            at += found[-1].nbytes
        return found

    def _begin(self, round: int) -> None:
        """Forgets the nonces of the round before; should it come again, its epoch, which is in the keys, is another."""
        if round != self._round:
            self._round = round
            self._mine.clear()
            self._seen.clear()

    def _pads(self, like: Mapping[str, np.ndarray], id: Sequence[int], client: int, nonce: bytes) -> Any:
        """Yields each int32 tensor's name and pad, uint32 in its shape."""
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

        place = "/".join(map(str, (*id, client)))
        stream = Cipher(algorithms.ChaCha20(self._key(f"pad/{place}", nonce), bytes(16)), mode=None).encryptor()
        for name in sorted(name for name, x in like.items() if x.dtype == np.int32):
            shape = like[name].shape
            pad = np.frombuffer(stream.update(bytes(4 * int(np.prod(shape, dtype=np.int64)))), "<u4")
            yield name, pad.reshape(shape)

    def _key(self, what: str, nonce: bytes = b"") -> bytes:
        """Returns a key of 32 bytes for one use."""
        from cryptography.hazmat.primitives import hashes
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF

        info = b"fedbert_jax/" + what.encode() + b"/" + self._run + b"/" + nonce
        return HKDF(hashes.SHA256(), 32, salt=None, info=info).derive(self._secret)

"""Who is who in a federation: certificates, the signed roster, and the secret that clients share and the server lacks.

A folder of credentials holds `ca.crt`, the party's own `NAME.crt` and `NAME.key`, `roster.json` with its signature, and at a
client `group.sealed`, the clients' secret, sealed for its key. `python -m fedbert_jax.provision` makes them.
"""

from __future__ import annotations

import datetime
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from fedbert_jax.errors import UserError

CLIENT, SERVER = "client", "server"


@dataclass(frozen=True)
class Credentials:
    """A party's certificate with its key, and the authority that both sides trust; PEM."""

    SERVER: ClassVar[str] = "server.fedbert"  # the name in a server's certificate

    authority: bytes
    certificate: bytes
    key: bytes


@dataclass(frozen=True)
class Entry:
    """A party in the roster."""

    name: str
    role: str  # "client" or "server"
    index: int | None  # a client's place in every sum and every draw; None for a server
    fingerprint: str  # SHA-256 of its certificate, in hexadecimal


@dataclass(frozen=True)
class Roster:
    """Who takes part, as the authority has signed it."""

    entries: tuple[Entry, ...]

    @property
    def clients(self) -> tuple[str, ...]:
        """The clients' names, in the order of their indices."""
        own = [e for e in self.entries if e.role == CLIENT]
        return tuple(e.name for e in sorted(own, key=lambda e: e.index or 0))

    def client_of(self, certificate: bytes) -> str | None:
        """Returns the client whose certificate (PEM) this is; None if it is nobody's, or a server's."""
        print_ = fingerprint(certificate)
        return next((e.name for e in self.entries if e.role == CLIENT and e.fingerprint == print_), None)


def fingerprint(certificate: bytes) -> str:
    """Returns the SHA-256 of a certificate (PEM), in hexadecimal."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    return x509.load_pem_x509_certificate(certificate).fingerprint(hashes.SHA256()).hex()


def load_credentials(folder: Path, name: str, role: str | None = None) -> Credentials:
    """Reads a party's credentials, and checks what the other side would refuse in fewer words.

    Args:
      folder: what `python -m fedbert_jax.provision` has made.
      name: the party's.
      role: what its certificate has to be for.

    Raises:
      UserError: if a file is missing or can't be read, the certificate is not good now, or they don't belong together.
    """
    try:
        found = Credentials(*((folder / file).read_bytes() for file in ("ca.crt", f"{name}.crt", f"{name}.key")))
    except OSError as error:
        raise UserError(
            f"config key network.credentials={str(folder)!r}: {error.filename} can't be read ({error.strerror}); accepted: "
            f"a folder of `python -m fedbert_jax.provision` with ca.crt, {name}.crt and {name}.key."
        ) from error
    if why := _wrong_with(found, name, role, datetime.datetime.now(datetime.UTC)):
        raise UserError(f"config key network.credentials={str(folder)!r}: {why}.")
    return found


def _wrong_with(found: Credentials, name: str, role: str | None, now: datetime.datetime) -> str:
    """Says what of a party's credentials is wrong; "" if nothing is."""
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import serialization

    file = f"{name}.crt"
    try:
        authority, own = (x509.load_pem_x509_certificate(pem) for pem in (found.authority, found.certificate))
        key = serialization.load_pem_private_key(found.key, None)
    except (ValueError, TypeError):
        return f"ca.crt, {file} or {name}.key is damaged"
    try:
        own.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return f"{file} is not signed by ca.crt, so one of them is another federation's"
    if key.public_key() != own.public_key():
        return f"{name}.key is not the key of {file}"
    named = [a.value for a in own.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)]
    if named != [name]:
        return f"{file} is the certificate of {', '.join(map(repr, named)) or 'nobody'}"
    if role is not None and role not in roles_of(own):
        return f"{file} is not the certificate of a {role}: that is decided by `provision request --role`"
    for one, what in ((authority, "ca.crt"), (own, file)):
        if one.not_valid_after_utc <= now:
            return (
                f"{what} has expired ({one.not_valid_after_utc:%Y-%m-%d %H:%M} UTC): ask who runs the federation to renew it"
            )
        if one.not_valid_before_utc > now:
            begins = f"{one.not_valid_before_utc:%Y-%m-%d %H:%M} UTC"
            return f"{what} is good from {begins} on, and this machine's clock says {now:%Y-%m-%d %H:%M}"
    return ""


def roles_of(certificate: Any) -> tuple[str, ...]:
    """Returns the roles that a certificate (of `cryptography`) is for."""
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID

    try:
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return ()
    meant = {CLIENT: ExtendedKeyUsageOID.CLIENT_AUTH, SERVER: ExtendedKeyUsageOID.SERVER_AUTH}
    return tuple(role for role, oid in meant.items() if oid in usage)


def expiry(certificate: bytes) -> datetime.datetime:
    """Returns when a certificate (PEM) ends."""
    from cryptography import x509

    return x509.load_pem_x509_certificate(certificate).not_valid_after_utc


def open_group_secret(folder: Path, name: str) -> int:
    """Returns the clients' secret, which was sealed for this client's key.

    Raises:
      UserError: if it is missing, or sealed for another key.
    """
    path = folder / "group.sealed"
    try:
        sealed, key = path.read_bytes(), (folder / f"{name}.key").read_bytes()
        return int.from_bytes(unseal(sealed, key), "big")
    except OSError as error:
        raise UserError(
            f"config key network.credentials={str(folder)!r}: {error.filename} can't be read ({error.strerror})."
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is not sealed for {name}.key: {error}.") from error


def seal(secret: bytes, public_key: Any) -> bytes:
    """Encrypts a secret for an elliptic-curve key: ECDH with a fresh key, HKDF-SHA256, AES-256-GCM (an ECIES)."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    fresh = ec.generate_private_key(ec.SECP256R1())
    point = fresh.public_key().public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
    key = _derived(fresh.exchange(ec.ECDH(), public_key), point)
    return point + AESGCM(key).encrypt(bytes(12), secret, point)  # the key is used once, so the nonce may be zero


def unseal(sealed: bytes, private_key: bytes) -> bytes:
    """Decrypts what `seal` made for this key (PEM).

    Raises:
      ValueError: if it was made for another key, or is damaged.
    """
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    own = serialization.load_pem_private_key(private_key, None)
    if not isinstance(own, ec.EllipticCurvePrivateKey) or len(sealed) < 65 + 16:
        raise ValueError("it is damaged")
    point = sealed[:65]
    theirs = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), point)
    try:
        return AESGCM(_derived(own.exchange(ec.ECDH(), theirs), point)).decrypt(bytes(12), sealed[65:], point)
    except InvalidTag:
        raise ValueError("it is for another key, or damaged") from None


def _derived(shared: bytes, point: bytes) -> bytes:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(hashes.SHA256(), 32, salt=point, info=b"fedbert_jax group secret").derive(shared)


def load_roster(folder: Path) -> Roster:
    """Reads the roster of a folder of credentials, and checks the authority's signature.

    Raises:
      UserError: if it is missing, damaged, or signed by somebody else.
    """
    where = f"config key network.credentials={str(folder)!r}: roster.json"
    try:
        files = [(folder / name).read_bytes() for name in ("roster.json", "roster.sig", "ca.crt")]
    except OSError as error:
        raise UserError(f"{where} can't be checked: {error.filename} can't be read ({error.strerror}).") from error
    try:
        return _signed(*files)
    except ValueError as error:
        raise UserError(f"{where} {error}.") from None


@functools.lru_cache(maxsize=4)
def _signed(text: bytes, signature: bytes, authority: bytes) -> Roster:
    """Returns the roster that an authority (PEM) has signed. A server asks at every call, and the bytes seldom change.

    Raises:
      ValueError: if it is none; the message goes on after the file's name.
    """
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        key = x509.load_pem_x509_certificate(authority).public_key()
    except ValueError:
        raise ValueError("can't be checked: ca.crt is no certificate") from None
    try:
        assert isinstance(key, ec.EllipticCurvePublicKey)
        key.verify(signature, text, ec.ECDSA(hashes.SHA256()))
        found: Any = json.loads(text)
        return Roster(tuple(Entry(e["name"], e["role"], e["index"], e["fingerprint"]) for e in found["parties"]))
    except (InvalidSignature, AssertionError):
        raise ValueError("is not signed by ca.crt: ask who runs the federation for the newest one") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError("is damaged") from None

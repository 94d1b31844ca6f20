"""python -m fedbert_jax.provision init|request|approve|revoke: who takes part in a federation, with what certificates.

  init FOLDER                   whoever runs the federation: an authority, a signed roster, the clients' secret
  request NAME --into FOLDER    each organisation: a key that never leaves it, and a request for a certificate
  approve FOLDER REQUEST        whoever runs it: compares the fingerprint by telephone, and makes the certificate; given
                                again, renews it
  revoke FOLDER NAME            whoever runs it: takes a party out of the roster

What `approve` makes for a party, in FOLDER/issued/NAME, goes beside that party's key. Whoever runs the authority knows
the clients' secret. If the server's operator runs it, too, the server can compute all that clients draw.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedbert_jax import cli
from fedbert_jax.console.output import shown
from fedbert_jax.errors import UserError
from fedbert_jax.runtime.credentials import CLIENT, SERVER, Credentials, Entry, Roster, fingerprint, load_roster, seal

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code.

    Raises:
      UserError: for what the user can mend.
    """
    parser = cli.Parser(
        prog=cli.program("provision"),
        description=cli.usage(__doc__, "provision"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    init = commands.add_parser("init", help="make an authority")
    init.add_argument("folder", type=Path)
    request = commands.add_parser("request", help="make a key, and ask for a certificate")
    request.add_argument("name")
    request.add_argument("--into", type=Path, required=True, metavar="FOLDER", help="the party's folder of credentials")
    request.add_argument("--role", choices=(CLIENT, SERVER), default=CLIENT)
    approve = commands.add_parser("approve", help="make the certificate that a request asks for")
    approve.add_argument("folder", type=Path)
    approve.add_argument("request", type=Path)
    approve.add_argument("--days", type=int, default=365, help="that the certificate is good for (default: 365)")
    revoke = commands.add_parser("revoke", help="take a party out of the roster")
    revoke.add_argument("folder", type=Path)
    revoke.add_argument("name")
    args = parser.parse_args(arguments)
    try:
        {"init": _init, "request": _request, "approve": _approve, "revoke": _revoke}[args.command](args)
    except OSError as error:
        raise UserError(f"{error.filename} can't be read or written ({error.strerror}).") from error
    return 0


def _init(args: argparse.Namespace) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    if args.folder.exists() and any(args.folder.iterdir()):
        raise UserError(f"{args.folder} is not empty; accepted: a new folder.")
    args.folder.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    own = _subject(f"fedbert authority {secrets.token_hex(4)}")
    certificate = (
        _dated(x509.CertificateBuilder().subject_name(own).issuer_name(own).public_key(key.public_key()), 10 * 365)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    _write(args.folder / "ca.crt", _pem(certificate))
    _write_secret(args.folder / "ca.key", _key_pem(key))
    _write_secret(args.folder / "group.secret", secrets.token_bytes(32))
    _write_roster(args.folder, Roster(()), {})
    print(f"authority    {shown(args.folder)}: keep ca.key and group.secret there, and to yourself")


def _request(args: argparse.Namespace) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    _check_name(args.name)
    args.into.mkdir(parents=True, exist_ok=True)
    if (args.into / f"{args.name}.key").exists():
        raise UserError(f"{args.into / args.name}.key is there already; accepted: another folder, or another name.")
    key = ec.generate_private_key(ec.SECP256R1())
    unit = x509.NameAttribute(x509.NameOID.ORGANIZATIONAL_UNIT_NAME, args.role)
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, args.name), unit])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    _write_secret(args.into / f"{args.name}.key", _key_pem(key))
    _write(args.into / f"{args.name}.csr", _pem(request))
    print(f"request      {shown(args.into / args.name)}.csr: send it to whoever runs the federation")
    print(f"fingerprint  {_key_print(request.public_key())}: tell it by another way, such as the telephone")


def _approve(args: argparse.Namespace) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    if args.days < 1:
        raise UserError(f"--days {args.days}: accepted: at least 1.")
    authority, ca = _authority(args.folder)
    try:
        request = x509.load_pem_x509_csr(args.request.read_bytes())
    except ValueError as error:
        raise UserError(f"{args.request} is no request for a certificate.") from error
    names = [a.value for a in request.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    roles = [a.value for a in request.subject.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)]
    right = len(names) == len(roles) == 1 and roles[0] in (CLIENT, SERVER) and request.is_signature_valid
    public = request.public_key()
    if not right or not isinstance(public, ec.EllipticCurvePublicKey):
        raise UserError(f"{args.request} is not a request of `python -m fedbert_jax.provision request`.")
    name, role = str(names[0]), str(roles[0])
    _check_name(name)
    roster, extra = load_roster(args.folder), _extra(args.folder)
    known = next((e for e in roster.entries if e.name == name), None)
    renews = known is not None and known.role == role and _key_of(args.folder / "issued" / name / f"{name}.crt") == public
    if name in extra["revoked"] or (known is not None and not renews):
        raise UserError(
            f"{name!r} is, or was, in the roster of {args.folder}; accepted: another name, or the request with which it "
            "came there, which renews its certificate."
        )
    server = role == SERVER
    usage = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
    known_as = Credentials.SERVER if server else f"{name.lower().replace('_', '-')}.client.fedbert"
    certificate = (
        _dated(x509.CertificateBuilder().subject_name(request.subject).issuer_name(ca.subject).public_key(public), args.days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(known_as)]), critical=False)
        .sign(authority, hashes.SHA256())
    )
    index = known.index if known is not None else None if server else extra["next"]
    entry = Entry(name, role, index, fingerprint(_pem(certificate)))
    extra["next"] += not server and known is None
    others = tuple(e for e in roster.entries if e.name != name)
    _write_roster(args.folder, Roster((*others, entry)), extra)
    out = args.folder / "issued" / name
    out.mkdir(parents=True, exist_ok=True)
    _write(out / f"{name}.crt", _pem(certificate))
    if not server:
        _write(out / "group.sealed", seal((args.folder / "group.secret").read_bytes(), public))
    _publish(args.folder)
    done = "renewed " if renews else "approved"
    print(f"{done}     {name} as {role}{'' if server else f' {index}'}; fingerprint {_key_print(public)}")
    print(f"send         {shown(out)}: its files go beside {name}.key; all others need the new roster.json and roster.sig")


def _revoke(args: argparse.Namespace) -> None:
    _authority(args.folder)
    roster, extra = load_roster(args.folder), _extra(args.folder)
    left = tuple(e for e in roster.entries if e.name != args.name)
    if len(left) == len(roster.entries):
        known = ", ".join(e.name for e in roster.entries) or "nobody"
        raise UserError(f"{args.name!r} is not in the roster of {args.folder}; there: {known}.")
    if next(e for e in roster.entries if e.name == args.name).role == SERVER:
        raise UserError(
            f"{args.name!r} is a server: clients take any server that ca.crt has signed, so its certificate ends with its "
            "date; if its key is in other hands, make a new authority."
        )
    extra["revoked"].append(args.name)
    _write_roster(args.folder, Roster(left), extra)
    shutil.rmtree(args.folder / "issued" / args.name, ignore_errors=True)
    _publish(args.folder)
    print(f"revoked      {args.name}: the server has to have the new roster.json and roster.sig")


# --- files ------------------------------------------------------------------------------------------------------------


def _write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def _write_secret(path: Path, data: bytes) -> None:
    """Writes a file that its owner alone can read, from its first byte on."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)


def _extra(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "roster.json").read_text(encoding="utf-8"))
    return {"next": found["next"], "revoked": found["revoked"]}


def _write_roster(folder: Path, roster: Roster, extra: dict[str, Any]) -> None:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    extra = {"next": 0, "revoked": []} | extra
    text = json.dumps({"parties": [vars(e) for e in roster.entries]} | extra, indent=1).encode()
    authority, _ = _authority(folder)
    _write(folder / "roster.sig", authority.sign(text, ec.ECDSA(hashes.SHA256())))
    _write(folder / "roster.json", text)


def _publish(folder: Path) -> None:
    """Puts the newest roster beside every certificate that was made."""
    for place in (folder / "issued").iterdir():
        for file in ("ca.crt", "roster.json", "roster.sig"):
            shutil.copyfile(folder / file, place / file)


def _key_of(path: Path) -> Any:
    """Returns the public key in a certificate; None if there is none."""
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificate(path.read_bytes()).public_key()
    except (OSError, ValueError):
        return None


def _authority(folder: Path) -> tuple[Any, Any]:
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

    try:
        key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
        return key, x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} is no authority: it has no ca.key; `init` makes one.") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder}/ca.key or ca.crt is damaged.") from error


def _check_name(name: str) -> None:
    if not re.fullmatch(NAME, name):
        raise UserError(f"{name!r}: accepted: up to 63 letters, digits, dots, dashes and underscores.")


def _subject(name: str) -> Any:
    from cryptography import x509

    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])


def _dated(builder: Any, days: int) -> Any:
    from cryptography import x509

    now = datetime.datetime.now(datetime.UTC)
    ends = now + datetime.timedelta(days=days)
    started = builder.not_valid_before(now - datetime.timedelta(minutes=5)).not_valid_after(ends)
    return started.serial_number(x509.random_serial_number())


def _pem(thing: Any) -> bytes:
    from cryptography.hazmat.primitives import serialization

    return thing.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: Any) -> bytes:
    from cryptography.hazmat.primitives import serialization as s

    return key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption())


def _key_print(public: Any) -> str:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives import serialization as s

    digest = hashes.Hash(hashes.SHA256())
    digest.update(public.public_bytes(s.Encoding.DER, s.PublicFormat.SubjectPublicKeyInfo))
    found = digest.finalize().hex()[:32]
    return "-".join(found[n : n + 4] for n in range(0, 32, 4))


if __name__ == "__main__":
    cli.run(main)

"""Credentials for tests, made by the real command, each party's in a folder of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedbert_jax import provision


def provisioned(root: Path, clients: Sequence[str]) -> Path:
    """Makes an authority in `root`/ca, and the folders of a server and of clients beside it; returns `root`."""
    provision.main(["init", str(root / "ca")])
    for name in ("server", *clients):
        request(root, name, "server" if name == "server" else "client")
        provision.main(["approve", str(root / "ca"), str(root / name / f"{name}.csr")])
    for name in ("server", *clients):
        send(root, name)
    return root


def request(root: Path, name: str, role: str = "client") -> None:
    """Makes a party's key and request."""
    provision.main(["request", name, "--role", role, "--into", str(root / name)])


def send(root: Path, name: str) -> None:
    """Puts what the authority has for a party into its folder."""
    for file in (root / "ca" / "issued" / name).iterdir():
        (root / name / file.name).write_bytes(file.read_bytes())

"""python -m fedbert_jax.status HOST:PORT [--credentials FOLDER]: where a federation stands."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from fedbert_jax import cli
from fedbert_jax.console.output import make_console, shown
from fedbert_jax.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code.

    Raises:
      UserError: if the server can't be reached, or refuses.
    """
    parser = cli.Parser(prog=cli.program("status"), description=cli.usage(__doc__, "status"))
    parser.add_argument("address", metavar="HOST:PORT")
    parser.add_argument("--credentials", type=Path, metavar="FOLDER", help="a client's, for a server that has credentials")
    parser.add_argument("--name", help="the client whose certificate it is (default: the only one in FOLDER)")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    args = parser.parse_args(arguments)
    host, _, port = args.address.rpartition(":")
    if not host or not port.isascii() or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"{args.address!r}: accepted: HOST:PORT, such as 127.0.0.1:8476.")

    from fedbert_jax.runtime import frames
    from fedbert_jax.runtime.calls import Abort
    from fedbert_jax.runtime.credentials import CLIENT, load_credentials
    from fedbert_jax.runtime.grpc import Client

    name = args.name or (name_in(args.credentials) if args.credentials else "status")
    credentials = load_credentials(args.credentials, name, CLIENT) if args.credentials else None
    client = Client(host.strip("[]"), int(port), name, credentials, 1 << 20)
    try:
        found, _ = frames.decode(client.call("status", frames.encode({}), timeout=5.0), 1 << 20)
    except Abort as error:
        raise UserError(f"the server at {args.address} doesn't answer ({error.text}).") from error
    finally:
        client.close()
    if args.json:
        print(json.dumps(found))
        return 0
    console = make_console()
    here, roster = found["here"], found.get("roster") or []
    of = f" of {len(roster) or found.get('wanted')}"
    console.print(f"{found['state']}" + (f", round {found['round']} of {found['rounds']}" if "round" in found else ""))
    console.print(f"here ({len(here)}{of}): {shown(', '.join(here)) or 'nobody'}")
    for what in ("members", "late", "missing"):
        if found.get(what):
            console.print(f"{what}: {shown(', '.join(found[what]))}")
    if found.get("within") is not None and (found.get("late") or found.get("missing")):
        console.print(f"it goes on without them in {found['within']:.0f} s")
    return 0


def name_in(folder: Path) -> str:
    """Returns whose certificate lies in a folder of credentials.

    Raises:
      UserError: if there is none, or there are several.
    """
    names = sorted(path.stem for path in folder.glob("*.crt") if path.name != "ca.crt")
    if len(names) != 1:
        raise UserError(f"--credentials {folder}: {len(names)} certificates of clients are there; give one with --name.")
    return names[0]


if __name__ == "__main__":
    cli.run(main)

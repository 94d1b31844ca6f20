"""python launch/nvflare/allow.py FOLDER ...: lets sites of NVFlare run the job of make_job.py.

A FOLDER is a site's, or the server's: what NVFlare's provisioning made for it. The two classes of the job are added to the
`class_allow_list` in its local/resources.json, which is made of resources.json.default if it isn't there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from fedbert_jax import cli
from fedbert_jax.errors import UserError

CLASSES = ("fedbert_jax.nvflare_job.Serve", "fedbert_jax.nvflare_job.Join")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code.

    Raises:
      UserError: if a folder is none of NVFlare's.
    """
    parser = argparse.ArgumentParser(prog="launch/nvflare/allow.py", description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER")
    parser.add_argument("--dry-run", action="store_true", help="say which files would be changed")
    args = parser.parse_args(arguments)
    for folder in args.folders:
        file = folder / "local" / "resources.json"
        source = file if file.is_file() else file.with_name("resources.json.default")
        if args.dry_run:
            print(file)
            continue
        try:
            found = json.loads(source.read_text(encoding="utf-8"))
            listed = found["class_allow_list"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{source} can't be read, or has no class_allow_list; accepted: a site's folder of NVFlare."
            ) from error
        found["class_allow_list"] = [*listed, *(c for c in CLASSES if c not in listed)]
        file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        print(f"allowed  {file}")
    return 0


if __name__ == "__main__":
    cli.run(main)

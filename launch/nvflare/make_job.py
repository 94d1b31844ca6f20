"""python launch/nvflare/make_job.py FOLDER --clients NAME,NAME --config FILE.py --workdir DIR [--config.KEY=VALUE ...]

Writes an NVFlare job that trains what the config says: the server serves, every client joins. FOLDER is submitted with
`nvflare job submit -j FOLDER`.

Config and flags are those of a client (configs/join.py); what the server needs of them, it gets. NVFlare fills in, at each
site, what stands in braces: {SITE_NAME}, {WORKSPACE}, which is the folder of that site's NVFlare, and {$VARIABLE} of its
environment.
A workdir that is no full path is a folder in {WORKSPACE}; another job with the same workdir goes on with its run.

The job holds settings and no code: sites have fedbert_jax installed, and allow it (launch/nvflare/allow.py).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedbert_jax import cli
from fedbert_jax.config import Config, flags, flatten, from_dict, replace, to_dict
from fedbert_jax.errors import ConfigError

COMPONENTS = "fedbert_jax.nvflare_job"
# What is a client's alone, and stands in no job at the server.
CLIENTS_OWN = ("data.source", "network.name")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code.

    Raises:
      ConfigError: for a config that can't be a job's.
    """
    usage = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="launch/nvflare/make_job.py", usage=usage[0], description=usage[2], allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("folder", type=Path, help="the job's; made, or written again")
    parser.add_argument("--clients", required=True, metavar="NAME,NAME", help="who takes part, by their names in NVFlare")
    parser.add_argument("--dry-run", action="store_true", help="print the files in place of writing them")
    args, rest = parser.parse_known_args(arguments)
    given = flags.parse(rest)
    clients = [name.strip() for name in args.clients.split(",")]
    files = job(args.folder.name, clients, flags.load_config(given), given.need("workdir"))
    for name, content in files.items():
        text = json.dumps(content, indent=2) + "\n"
        if args.dry_run:
            print(f"{args.folder / name}:\n{text}")
            continue
        (args.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (args.folder / name).write_text(text, encoding="utf-8")
    if not args.dry_run:
        print(f"job  {args.folder}; submit it with: nvflare job submit -j {args.folder}")
    return 0


def job(name: str, clients: Sequence[str], config: Config, workdir: str) -> dict[str, Any]:
    """Returns a job's files, as what JSON can hold, by their paths.

    Args:
      name: what NVFlare calls it.
      clients: who takes part.
      config: a client's.
      workdir: of every party.

    Raises:
      ConfigError: if it can't be a job's.
    """
    if config.task != "join":
        raise ConfigError(f"config key task={config.task!r}: accepted in a job: 'join', as in configs/join.py.")
    if config.privacy.client_seed is not None:
        raise ConfigError(
            "config key privacy.client_seed: accepted in a job: None. NVFlare's server reads the job; the clients' secret "
            "is in their own network.credentials."
        )
    if len(set(clients)) != len(clients) or not all(clients):
        raise ConfigError(f"--clients {','.join(clients)}: accepted: different names, with commas between them.")
    from_dict(to_dict(replace(config, {"task": "serve", "federated.num_clients": len(clients)})))
    defaults = flatten(to_dict(Config()))
    own = {key: value for key, value in flatten(to_dict(config)).items() if value != defaults[key]}
    del own["task"]  # which is the component's
    served = {key: value for key, value in own.items() if key not in CLIENTS_OWN}
    place = workdir if workdir.startswith(("/", "{")) else f"{{WORKSPACE}}/{workdir}"
    return {
        # Fewer clients than this neither begin the job nor go on with it.
        "meta.json": {
            "name": name,
            "resource_spec": {},
            "min_clients": config.network.quorum or len(clients),
            "deploy_map": {"app": ["server", *clients]},
        },
        "app/config/config_fed_server.json": {
            "format_version": 2,
            "workflows": [
                {"id": "serve", "path": f"{COMPONENTS}.Serve", "args": {"config": served, "workdir": place}},
            ],
        },
        "app/config/config_fed_client.json": {
            "format_version": 2,
            "executors": [
                {"tasks": ["join"], "executor": {"path": f"{COMPONENTS}.Join", "args": {"config": own, "workdir": place}}},
            ],
        },
    }


if __name__ == "__main__":
    cli.run(main)

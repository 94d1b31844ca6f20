"""How long a run is and how often it is saved and judged, worked out from how much text there is."""

from __future__ import annotations

import math
from collections.abc import Collection
from fractions import Fraction

from fedbert_jax.config.changes import WORKED_OUT
from fedbert_jax.config.keys import flatten, replace, to_dict
from fedbert_jax.config.schema import Config
from fedbert_jax.errors import ConfigError


def choose(config: Config, given: Collection[str]) -> Config:
    """Settles which of two keys decides, where one is worked out from the other (`WORKED_OUT`).

    What the command line says comes before what the config file says.

    Args:
      config: as the file and the command line together have it.
      given: the dotted keys that the command line sets.

    Returns:
      The config, in which a key that decides nothing is None.

    Raises:
      ConfigError: if the file sets both, or the command line does.
    """
    values, defaults = flatten(to_dict(config)), flatten(to_dict(Config()))
    changes: dict[str, object] = {}
    for key, source in WORKED_OUT.items():
        if values[source] is None:
            continue
        if key in given and source not in given:
            changes[source] = None
        elif (key in given) or (source not in given and values[key] != defaults[key]):
            raise ConfigError(
                f"config keys {key}={values[key]!r} and {source}={values[source]!r} are both set; accepted: one of them, "
                f"since {key} is worked out from {source}."
            )
        else:
            changes[key] = defaults[key]
    return replace(config, changes)


def as_begun(config: Config, old: Config) -> Config:
    """Returns the config with what was worked out when a workdir was begun, where the key that decides is the same.

    Args:
      config: the one to go on with.
      old: the workdir's.
    """
    before, now = flatten(to_dict(old)), flatten(to_dict(config))
    same = (key for key, source in WORKED_OUT.items() if now[source] is not None and now[source] == before[source])
    return replace(config, {key: before[key] for key in same})


def work_out(config: Config, blocks: int, clients: int, old: Config | None = None) -> Config:
    """Works out rounds, the cohort, the warm-up and how often to save and to judge, where the text decides about them.

    Args:
      config: of the run.
      blocks: how many training blocks all clients have together.
      clients: how many clients there are.
      old: the config that the workdir was begun with, if it was: what it worked out stays.

    Returns:
      The config with numbers; itself where it has them already.
    """
    f = config.federated
    cohort = min(f.clients_per_round or clients, clients)
    if f.clients_per_round is None and f.max_clients_per_round is not None and not f.own_state:
        cohort = min(f.max_clients_per_round, clients)
    rounds = f.rounds
    if f.epochs is not None:
        # By fractions: 0.07 of 100 blocks are 7, and no hair more.
        rounds = math.ceil(Fraction(repr(f.epochs)) * blocks / (cohort * f.local_steps * f.batch_size))
    steps = rounds * f.steps_per_round(cohort)
    found = {
        "federated.rounds": rounds,
        "federated.clients_per_round": f.clients_per_round if cohort == clients else cohort,
        "checkpoint.every_rounds": math.ceil(rounds / (config.checkpoint.times or 1)),
        "eval.every_rounds": math.ceil(rounds / (config.eval.times or 1)),
    }
    for section, optimizer in (("client_optimizer", config.client_optimizer), ("server_optimizer", config.server_optimizer)):
        found[f"{section}.warmup_steps"] = round((optimizer.warmup or 0) * (optimizer.decay_steps or steps))
    values = flatten(to_dict(config))
    config = replace(config, {key: value for key, value in found.items() if values[WORKED_OUT[key]] is not None})
    return as_begun(config, old) if old is not None else config

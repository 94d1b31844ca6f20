"""How long a run is and how often it is saved and evaluated, worked out from the amount of text."""

from __future__ import annotations

import math
from collections.abc import Collection
from fractions import Fraction

from fedbert_jax.config.changes import WORKED_OUT
from fedbert_jax.config.keys import flatten, replace, to_dict
from fedbert_jax.config.schema import Config
from fedbert_jax.errors import ConfigError


def choose(config: Config, given: Collection[str]) -> Config:
    """Settles which of two keys decides, if one is worked out from the other (`WORKED_OUT`).

    The command line takes precedence over the config file.

    Args:
      config: the config file's, changed by the command line.
      given: the dotted keys that the command line sets.

    Returns:
      The config, in which a key still to be worked out has its default, and one that nothing is worked out from is None.

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
    """Returns the config with the values worked out when the workdir was begun, for deciding keys that haven't changed.

    Args:
      config: the one to go on with.
      old: the workdir's.
    """
    before, now = flatten(to_dict(old)), flatten(to_dict(config))
    same = (key for key, source in WORKED_OUT.items() if now[source] is not None and now[source] == before[source])
    return replace(config, {key: before[key] for key in same})


def work_out(config: Config, blocks: int, clients: int, old: Config | None = None) -> Config:
    """Works out rounds, the cohort, the warm-up and how often to save and evaluate, if the amount of text decides them.

    Args:
      config: the run's.
      blocks: how many training blocks all clients have together.
      clients: how many clients there are.
      old: the config that the workdir was begun with, if it was: what it worked out stays.

    Returns:
      The config with the numbers filled in; those that it has already stay.
    """
    f = config.federated
    cohort = min(f.clients_per_round or clients, clients)
    if f.clients_per_round is None and f.max_clients_per_round is not None and not f.own_state:
        cohort = min(f.max_clients_per_round, clients)
    rounds = f.rounds
    if f.epochs is not None:
        # As fractions, so that 0.07 of 100 blocks is exactly 7; in floats it is slightly more.
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

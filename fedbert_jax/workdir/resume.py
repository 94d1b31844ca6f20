"""Whether a run may go on from its newest checkpoint with a given config and its learning rates."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedbert_jax import config as config_lib
from fedbert_jax.config import Config, FederatedConfig, OptimizerConfig
from fedbert_jax.errors import ConfigError
from fedbert_jax.federated import optim
from fedbert_jax.workdir.checkpoint import Checkpoints
from fedbert_jax.workdir.paths import Workdir

Flat = dict[str, Any]


class Made(NamedTuple):
    """The newest checkpoint, from which a run goes on."""

    round: int  # finished rounds; 0 if there is no checkpoint
    config: Flat | None  # the config it was made with, as dotted keys; None if it holds none


def newest(directory: Path) -> Made:
    """Returns the newest checkpoint of a directory, which need not exist.

    Raises:
      UserError: if that checkpoint can't be read.
    """
    checkpoints = Checkpoints(directory) if directory.is_dir() else None
    rounds = checkpoints.rounds() if checkpoints else []
    if not checkpoints or not rounds:
        return Made(0, None)
    config = checkpoints.meta(rounds[-1]).get("config")
    checkpoints.close()
    return Made(rounds[-1], config)


def put_back(workdir: Workdir, made: Made) -> str:
    """Restores a missing config.json from the checkpoint's stamp; returns "yes", or "" if that is impossible or needless."""
    if workdir.exists() or made.config is None:
        return ""
    nested: dict[str, Any] = {}
    for key in config_lib.all_keys():
        if key in made.config:
            *sections, name = key.split(".")
            place = nested
            for section in sections:
                place = place.setdefault(section, {})
            place[name] = made.config[key]
    try:
        workdir.write_config(config_lib.from_dict(nested))
    except ConfigError:  # it may come from a version that accepted other values
        return ""
    return "yes"


def stamp(config: Config) -> Flat:
    """Returns what a checkpoint records of the config it was made with: every key."""
    return config_lib.flatten(config_lib.to_dict(config))


def harmless(config: Config, made: Made) -> frozenset[str]:
    """Returns the keys that a run may change, including those of the optimizers' schedules if these begin anew."""
    anew = 0 < config.federated.schedule_from == made.round
    return config_lib.HARMLESS | config_lib.RESCHEDULED if anew else config_lib.HARMLESS


def check_unedited(path: Path, written: Config, made: Made) -> None:
    """Refuses a config.json that differs from the config that the checkpoint was made with.

    Args:
      path: of config.json.
      written: its content.
      made: the checkpoint.

    Raises:
      ConfigError: naming the keys that differ.
    """
    if changed := _differences(made.config, written, harmless(written, made)):
        raise ConfigError(
            f"{path} is not what the checkpoint of round {made.round} was made with: {changed}; put it back, or delete it, "
            "and the training command puts it back."
        )


def check(config: Config, made: Made, steps_per_round: int, before: Config | None) -> None:
    """Refuses to go on from a checkpoint with a config that would not have made it, or can't go on from it.

    Args:
      config: resolved, to go on with.
      made: the checkpoint.
      steps_per_round: global steps.
      before: the content of config.json; None if there is none.

    Raises:
      ConfigError: for a config that differs from the checkpoint's, fewer rounds than are finished, schedules that begin in
        a later round, or a learning rate that would jump up without having been asked to.
    """
    f = config.federated
    begun = (made.config or {}).get("federated.schedule_from", 0) if made.round else 0
    if f.schedule_from not in (0, begun, made.round):
        raise ConfigError(
            f"config key federated.schedule_from={f.schedule_from}: accepted: {made.round}, the finished rounds"
            + (f", or {begun}, as before." if begun else ".")
        )
    if f.schedule_from and f.schedule_from >= f.rounds:
        raise ConfigError(
            f"config key federated.schedule_from={f.schedule_from}: accepted: less than federated.rounds={f.rounds}."
        )
    if not made.round:
        return
    check_stamp(f"the checkpoint of round {made.round}", made.config, config, harmless(config, made))
    if f.rounds < made.round:
        raise ConfigError(f"config key {_rounds(f)}: accepted: at least {made.round} rounds, which are finished.")
    past = made.config if made.config is not None else stamp(before) if before else None
    if past is not None and f.rounds > made.round:
        _check_rates(config, made.round, past, steps_per_round)


def check_stamp(what: str, stamped: Flat | None, config: Config, harmless: Collection[str]) -> None:
    """Refuses to go on from something that was made with another config.

    Args:
      what: its name, for the message.
      stamped: its `stamp`, or None.
      config: resolved, to go on with.
      harmless: keys that may differ.

    Raises:
      ConfigError: naming the keys that differ and may not.
    """
    if changed := _differences(stamped, config, harmless):
        raise ConfigError(f"{what} was made with another config: {changed}; give another --workdir.")


def _differences(stamped: Flat | None, config: Config, harmless: Collection[str]) -> str:
    """Names the keys that differ and affect results; "" if none. A key that the stamp doesn't know had its default."""
    if stamped is None:
        return ""
    defaults, now = stamp(Config()), stamp(config)
    free = {*config_lib.FREE, *harmless}
    was = {key: stamped.get(key, defaults[key]) for key in now}
    return ", ".join(f"{k} (was {was[k]!r}, now {now[k]!r})" for k in now if k not in free and was[k] != now[k])


def _check_rates(config: Config, done: int, past: Flat, steps_per_round: int) -> None:
    f, before = config.federated, _section(FederatedConfig, past, "federated")
    for name, default in (("schedule_rounds", None), ("schedule_from", 0)):
        if getattr(f, name) not in (default, getattr(before, name)):
            return  # it was asked for
    for section in ("client_optimizer", "server_optimizer"):
        old = _rate(_section(OptimizerConfig, past, section), before, done, steps_per_round)
        new = _rate(getattr(config, section), f, done, steps_per_round)
        if new > old * (1 + 1e-5):
            made_for = before.schedule_rounds or before.rounds - before.schedule_from
            raise ConfigError(
                f"config key {_rounds(f)}: after round {done} the rate of {section} would jump up from {old:.3g} to "
                f"{new:.3g}; federated.schedule_rounds={made_for} leaves the schedule as it was, federated.schedule_from="
                f"{done} warms up and decays anew, federated.schedule_rounds={f.rounds - f.schedule_from} takes the jump."
            )


def _rounds(federated: FederatedConfig) -> str:
    """Returns the key that decides how many rounds there are, and its value."""
    if federated.epochs is None:
        return f"federated.rounds={federated.rounds}"
    return f"federated.epochs={federated.epochs} ({federated.rounds} rounds)"


def _rate(optimizer: OptimizerConfig, federated: FederatedConfig, done: int, steps_per_round: int) -> float:
    """Returns the learning rate of the first step after `done` rounds."""
    schedule = optim.make_schedule(optimizer, *optim.schedule_span(federated, steps_per_round))
    return float(np.asarray(schedule(np.int32(done * steps_per_round))))


def _section(cls: type, flat: Flat, name: str) -> Any:
    """Returns a section of a flat config, without keys that no longer exist."""
    keys = {field.name for field in dataclasses.fields(cls)}
    own = {key.removeprefix(f"{name}."): value for key, value in flat.items() if key.startswith(f"{name}.")}
    return cls(**{key: value for key, value in own.items() if key in keys})

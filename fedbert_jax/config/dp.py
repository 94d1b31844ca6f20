"""What `privacy.dp` needs: settings under which the epsilon that is reported is one, and enough clients."""

from __future__ import annotations

from fedbert_jax.config.keys import flatten, to_dict
from fedbert_jax.config.ranges import Need
from fedbert_jax.config.schema import Config
from fedbert_jax.errors import ConfigError

FEWEST = 100  # clients: with fewer, noise that gives an epsilon worth reporting leaves nothing of the average


def check_dp(config: Config, need: Need) -> None:
    """Checks `privacy.dp` and its keys."""
    p, f = config.privacy, config.federated
    if p.dp == "none":
        given, defaults = flatten(to_dict(config)), flatten(to_dict(Config()))
        for key in ("privacy.dp_clip", "privacy.dp_noise", "privacy.dp_delta"):
            need(given[key] == defaults[key], key, given[key], f"its default, {defaults[key]!r}, with privacy.dp='none'")
        return
    need(config.task == "pretrain", "privacy.dp", p.dp, f"'none' with task={config.task!r}")
    named = f"with federated.strategy={f.strategy!r}, federated.average={f.average!r}"
    need(f.arrangement.averages, "privacy.dp", p.dp, f"'none' {named}, which averages no copies of parameters")
    need(
        f.weighting == "uniform",
        "federated.weighting",
        f.weighting,
        f"'uniform' with privacy.dp={p.dp!r}: other weights tell how much text a client has, and depend on the others'",
    )
    need(
        f.client_optimizer_state != "average",
        "federated.client_optimizer_state",
        f.client_optimizer_state,
        f"'reset' or 'keep' with privacy.dp={p.dp!r}: noise doesn't cover optimizer states that are averaged",
    )
    need(p.averaging == "plain", "privacy.averaging", p.averaging, f"'plain' with privacy.dp={p.dp!r}")
    need(p.dp_clip > 0, "privacy.dp_clip", p.dp_clip, "a number above 0")
    need(1e-6 <= p.dp_noise <= 1e6, "privacy.dp_noise", p.dp_noise, "a number from 1e-6 to 1e6: without noise, no epsilon")
    need(0 < p.dp_delta < 1, "privacy.dp_delta", p.dp_delta, "a number between 0 and 1")
    if f.num_clients is not None:
        check_clients(config, f.num_clients)


def check_clients(config: Config, clients: int) -> None:
    """Raises `ConfigError` if a federation of so many clients is too small for `privacy.dp`."""
    dp = config.privacy.dp
    if dp != "none" and clients < FEWEST:
        raise ConfigError(
            f"config key privacy.dp={dp!r}: accepted: 'none' with {clients} client{'s' * (clients != 1)}: no epsilon is "
            f"computed for fewer than {FEWEST}."
        )

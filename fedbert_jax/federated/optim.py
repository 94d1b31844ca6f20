"""Optimizers: an optax transform by name, clipped per segment, with a schedule over global steps."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fedbert_jax.config import AggregatorConfig, Config, FederatedConfig, OptimizerConfig
from fedbert_jax.errors import ConfigError
from fedbert_jax.models.bert import Params

OptState = Any


class Optimizer(NamedTuple):
    """The optimizer of one segment. The global step is an argument, so that clients that join late have the others' rate."""

    init: Callable[[Params], OptState]
    update: Callable[..., tuple[Params, OptState, jax.Array]]  # (grads, state, params, step) -> (params, state, norm)
    schedule: Callable[[Any], Any]


def make_optimizer(config: OptimizerConfig, section: str, total_steps: int, first_step: int = 0) -> Optimizer:
    """Builds the optimizer of a segment.

    Args:
      config: name, arguments and schedule.
      section: the config's section, for error messages.
      total_steps: number of global steps after which the schedule ends, unless `decay_steps` says otherwise.
      first_step: the global step at which the schedule begins.

    Returns:
      An `Optimizer` whose `update` also returns the global norm of the gradient before clipping.
    """
    # Every accepted optax optimizer ends in `scale by -learning_rate`, so with a rate of 1 the schedule is a factor.
    tx = _optax(config, section, learning_rate=1.0)
    schedule = make_schedule(config, total_steps, first_step)

    @jax.named_scope("update")
    def update(grads: Params, state: OptState, params: Params, step: jax.Array) -> tuple[Params, OptState, jax.Array]:
        norm = global_norm(grads)
        if config.clip_norm is not None:
            scale = jnp.minimum(1.0, config.clip_norm / jnp.maximum(norm, 1e-12))
            grads = jax.tree.map(lambda g: g * scale, grads)
        updates, state = tx.update(grads, state, params)
        rate = schedule(step)
        params = jax.tree.map(lambda p, u: (p + rate * u).astype(p.dtype), params, updates)
        return params, state, norm

    return Optimizer(tx.init, update, schedule)


def global_norm(grads: Params) -> jax.Array:
    """Returns the Euclidean norm of all entries, a float32 scalar.

    The barrier keeps the squares within the pass that sums them. Without it, the compiler shares them with Adam's second
    moment and so writes and reads them once more: for C word tables, half of Adam's cost.
    """
    return optax.tree.norm(jax.lax.optimization_barrier(grads))


def schedule_span(federated: FederatedConfig, steps_per_round: int) -> tuple[int, int]:
    """Returns how many global steps the schedules last, and at which step they begin."""
    start = federated.schedule_from
    rounds = federated.rounds - start if federated.schedule_rounds is None else federated.schedule_rounds
    return rounds * steps_per_round, start * steps_per_round


def make_schedule(config: OptimizerConfig, total_steps: int, first_step: int = 0) -> Callable[[Any], Any]:
    """Returns the learning rate as a function of the global step: linear warm-up from 0, then the decay.

    The warm-up begins at `first_step`, from which `total_steps` and `decay_steps` count; the rate of earlier steps is
    meaningless.
    """
    if first_step:
        begun = make_schedule(config, total_steps)
        return lambda step: begun(step - first_step)
    peak, end, warmup = config.learning_rate, config.end_learning_rate, config.warmup_steps
    steps = max((config.decay_steps or total_steps) - warmup, 1)
    decay: Callable[[Any], Any]
    if config.schedule == "constant":
        decay = optax.constant_schedule(peak)
    elif config.schedule == "cosine":
        decay = optax.cosine_decay_schedule(peak, steps, alpha=end / peak if peak else 0.0)
    else:
        power = config.power if config.schedule == "polynomial" else 1.0
        decay = optax.polynomial_schedule(peak, end, power, steps)
    if not warmup:
        return decay
    # One more than the step, so that the rate of the first step is not 0.
    return optax.join_schedules([lambda n: peak * (n + 1) / warmup, decay], [warmup])


def make_aggregator(config: AggregatorConfig, of_moves: bool = False) -> optax.GradientTransformation | None:
    """Returns the outer optimizer, or None for plain FedAvg, whose new parameters are the average itself.

    With `of_moves` there always is one, since it is the clients' moves that are averaged.
    """
    plain = not of_moves and config.name == "sgd" and config.learning_rate == 1.0 and not config.momentum
    tx = _optax(config, "aggregator", learning_rate=config.learning_rate)
    return None if plain else tx


def check(config: Config) -> None:
    """Raises `ConfigError` for an optimizer argument that its optimizer doesn't take."""
    make_optimizer(config.client_optimizer, "client_optimizer", 1)
    make_optimizer(config.server_optimizer, "server_optimizer", 1)
    make_aggregator(config.aggregator)


def warnings(config: Config, steps_per_round: int) -> list[str]:
    """Returns sentences about schedules that never reach their peak, or are 0 for a part of the run."""
    found: dict[str, list[str]] = {}  # problem -> the sections of the optimizers that have it
    f = config.federated
    total, first = schedule_span(f, steps_per_round)
    steps = f.rounds * steps_per_round - first  # trained on this schedule
    for section in ("client_optimizer", "server_optimizer"):
        o: OptimizerConfig = getattr(config, section)
        if not o.learning_rate:
            continue
        if o.warmup_steps >= steps:
            highest = o.learning_rate * steps / o.warmup_steps
            found.setdefault(
                f"warmup_steps={o.warmup_steps}, but federated.rounds={f.rounds} makes {steps} steps, so that the rate "
                f"only rises, to {highest:.3g} of {o.learning_rate:.3g}",
                [],
            ).append(section)
        end = max(o.decay_steps or total, o.warmup_steps + 1)
        if o.schedule != "constant" and not o.end_learning_rate and end < steps:
            round = (first + end) // steps_per_round + 1
            found.setdefault(
                f"the rate is 0 from round {round} of {f.rounds} on, so that nothing more is learnt", []
            ).append(section)
    return [f"{' and '.join(sections)}: {what}." for what, sections in found.items()]


def decays(params: Params) -> Any:
    """Returns a tree of bools: weight decay acts on matrices, not on biases and LayerNorm scales."""

    def leaf(path: tuple[Any, ...], _: jax.Array) -> bool:
        return str(getattr(path[-1], "key", path[-1])) not in ("bias", "scale")

    return jax.tree_util.tree_map_with_path(leaf, params)


def lamb(
    learning_rate: float, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-6, weight_decay: float = 0.0, mask: Any = None
) -> optax.GradientTransformation:
    """LAMB (You et al. 2020) with a trust ratio for each matrix of each layer.

    `optax.lamb` treats each array as one layer. Here an array stacks all layers, and in attention also three matrices, which
    would all share one ratio.
    """

    def update(updates: Params, state: OptState, params: Params | None = None) -> tuple[Params, OptState]:
        return jax.tree_util.tree_map_with_path(_scale_by_trust_ratio, updates, params), state

    return optax.chain(
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
        optax.add_decayed_weights(weight_decay, mask),
        optax.GradientTransformation(lambda params: optax.EmptyState(), update),
        optax.scale_by_learning_rate(learning_rate),
    )


def _scale_by_trust_ratio(path: tuple[Any, ...], update: jax.Array, param: jax.Array) -> jax.Array:
    names = [str(getattr(part, "key", part)) for part in path]
    scale: Callable[..., jax.Array] = lambda u, p: optax.scale_by_trust_ratio().update(u, optax.EmptyState(), p)[0]  # noqa: E731
    if "qkv" in names:  # [..., 3, D]
        scale = jax.vmap(scale, in_axes=-2, out_axes=-2)
    if "layers" in names:  # [L, ...]
        scale = jax.vmap(scale)
    return scale(update, param)


def _optax(config: OptimizerConfig | AggregatorConfig, section: str, learning_rate: float) -> optax.GradientTransformation:
    factory = lamb if config.name == "lamb" else getattr(optax, config.name)
    accepted = inspect.signature(factory).parameters
    names = ("b1", "b2", "eps", "weight_decay", "momentum", "nesterov")
    given = {n: v for n, v in dataclasses.asdict(config).items() if n in names and v is not None}
    for name, value in given.items():
        if name not in accepted:
            takes = ", ".join(n for n in names if n in accepted)
            key = f"{section}.{name}={value!r}"
            raise ConfigError(f"config key {key}: accepted with {section}.name={config.name!r}: {takes}.")
    if "mask" in accepted:
        given["mask"] = decays
    return factory(learning_rate, **given)

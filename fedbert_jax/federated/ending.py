"""What is made of sums over clients: of copies, at the end of a round, and of gradients, at every step."""

from __future__ import annotations

import jax

from fedbert_jax.data.streams import Stream
from fedbert_jax.federated.average import add_up, outer_update, weighted_average
from fedbert_jax.federated.dp import add_noise, clipped_shares
from fedbert_jax.federated.fixed_point import fixed_point, next_ranges
from fedbert_jax.federated.holding import Holding, merge, only, sent_copies, sides
from fedbert_jax.federated.setting import Setting
from fedbert_jax.federated.state import Averaging, Pair, State
from fedbert_jax.federated.wire import Channel

AT_REST = ("own", "one")
Parts = tuple[Pair, Pair]  # of models and of optimizer states; () for a side that has none


def gradient_channel(s: Setting, averaging: Averaging) -> Channel | None:
    """Returns the channel through which each client's gradient is summed up; None: as it is."""
    return fixed_point(averaging.ranges.client) if s.blinded else s.cut().channels.gradient


def mean_gradient(s: Setting, channel: Channel | None, sums: Pair, averaging: Averaging) -> tuple[Pair, Averaging]:
    """Returns the mean gradient as every client receives it, and what averaging carries on.

    Args:
      s: the setting.
      channel: from `gradient_channel`.
      sums: over clients; the body's is its gradient already.
      averaging: with which they were sent.
    """
    if channel is None:
        return sums, averaging
    back, grads = s.cut().channels.mean, channel.total(sums.client)
    if s.blinded:
        averaging = averaging._replace(ranges=Pair(next_ranges(averaging.ranges.client, sums.client), ()))
    return Pair(grads if back is None else back.receive(back.send(grads, None)), sums.server), averaging


def settle(s: Setting, held: Holding, state: State, model: Pair, opt: Pair, weights: jax.Array) -> tuple[Parts, Parts]:
    """Returns the parts kept as they are at the end of a round, and the sums over clients that make the averages.

    Args:
      s: the setting.
      held: who holds what.
      state: with which the round began.
      model, opt: with which it ended, copies as [C, ...].
      weights: float32 [C].
    """
    ended = only(("copies",), held.model, model)
    if s.outer:
        begun = only(("copies",), held.model, state.model)
        ended = jax.tree.map(lambda x, start: x - start[None], ended, begun)
    shares = clipped_shares(ended, weights, s.config.privacy.dp_clip, s.cohort) if s.noised else weights
    moved = sides(lambda channel, x: add_up(channel, x, shares), _channels(s, held, state), ended)
    sums = (moved, weighted_average(only(("copies",), held.opt, opt), weights))
    return (only(AT_REST, held.model, model), only(AT_REST, held.opt, opt)), sums


def average(s: Setting, held: Holding, state: State, kept: Parts, sums: Parts, round: jax.Array) -> State:
    """Returns the state after a round, from what `settle` has made of it."""
    privacy, channels = s.config.privacy, _channels(s, held, state)
    moved = sides(lambda channel, x: x if channel is None else channel.total(x), channels, sums[0])
    if s.noised:
        moved = add_noise(moved, s.key(Stream.DP_NOISE, round), privacy.dp_noise * privacy.dp_clip / s.cohort)
    new, outer = outer_update(s.outer, only(("copies",), held.model, state.model), moved, state.averaging.outer)
    averaging = state.averaging._replace(outer=outer)
    if s.blinded:
        after = lambda channel, ranges, x: ranges if channel is None else next_ranges(ranges, x)  # noqa: E731
        averaging = averaging._replace(ranges=sides(after, channels, averaging.ranges, sums[0]))
    return State(merge(held.model, new, kept[0]), merge(held.opt, sums[1], kept[1]), averaging)


def _channels(s: Setting, held: Holding, state: State) -> Pair:
    """Returns the channels through which both sides' copies are averaged; None: as they are."""
    if not s.blinded:
        return Pair(None, None)
    sent = sent_copies(held, s.how.cut)
    return sides(lambda sent, ranges: fixed_point(ranges) if sent else None, sent, state.averaging.ranges)

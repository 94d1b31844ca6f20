"""A client's part in a federation: its rounds, step by step, against whatever carries its messages.

It holds the client segment, its optimizer state and what averaging carries on between rounds. A round begins from what it
held then, so a round that is begun again needs nothing but that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from fedbert_jax.federated.evaluation import Exam
from fedbert_jax.federated.setting import Setting
from fedbert_jax.federated.state import Averaging
from fedbert_jax.privacy.pads import Pads
from fedbert_jax.runtime.blinded import Blinded, kept
from fedbert_jax.runtime.frames import Tensors
from fedbert_jax.runtime.parties import ClientPrograms
from fedbert_jax.runtime.payloads import fitted, from_tensors, to_tensors, zeros_like
from fedbert_jax.runtime.script import opt_travels
from fedbert_jax.runtime.shapes import Shapes
from fedbert_jax.runtime.turns import Id


class Wire(Protocol):
    """What carries a client's messages."""

    def post(self, id: Id, tensors: Tensors) -> Future[Tensors]:
        """Sends a message; the future has its answer."""
        ...

    def segment(self, id: Id) -> Tensors:
        """Asks for the segment as it is at a barrier: what a round begins with, or what the turns before have made of it."""
        ...

    def transform(self, tensors: Tensors) -> Tensors:
        """Asks for the body's output, for evaluation."""
        ...


class Held(NamedTuple):
    """What a client holds between rounds."""

    segment: Any
    opt: Any  # () where it is made anew each round
    averaging: Averaging  # what it carries on of it
    round: int  # the round that this is the beginning of
    since: int = 0  # the epoch in which the round before it ended: a server that went back has another past


class Ended(NamedTuple):
    """A round's end at one client."""

    held: Held
    loss: float  # mean over its steps
    sums: np.ndarray | None  # float32, what it has said of its own answers; None if it wasn't asked


class Part(Protocol):
    """A client's arithmetic, as its participant needs it."""

    in_turn: bool  # whether clients take turns

    def fresh(self) -> Held:
        """Returns what a client holds before the first round."""
        ...

    def brought(self, held: Held) -> Tensors:
        """Returns what the server gets of the first segment."""
        ...

    def received(self, tensors: Tensors, held: Held | None, round: int) -> Held:
        """Returns what a client holds that was sent the segment."""
        ...

    def first_message(self, members: Sequence[str], me: str) -> int:
        """Returns the barrier at which this client sends its first message of a round."""
        ...

    def scores_at(self, members: Sequence[str]) -> int:
        """Returns the barrier of a round's evaluation."""
        ...

    def run_round(
        self, held: Held, id: Id, members: Sequence[str], me: str, weight: float, evaluates: bool, wire: Wire
    ) -> Ended:
        """Trains a round."""
        ...


class Member:
    """One client of the real model (`Part`).

    Args:
      s: the setting.
      index: its place in the roster.
      rows: (round) -> what it trains on in that round, [K, B, ...].
      shapes: what crosses (`shapes.shapes_of`).
      exam: what its model is asked at an evaluation.
      parts: microbatches of a step.
      trials: rows [B, ...] of each length that comes up, for which steps are compiled; (): those of the first round.
      pads: what it hides its numbers under, with privacy.averaging=blinded.
      programs: another client's of the same setting in this process, to be compiled once for both.
    """

    def __init__(
        self,
        s: Setting,
        index: int,
        rows: Callable[[int], Any],
        shapes: Shapes,
        exam: Exam,
        parts: int = 1,
        trials: Sequence[Any] = (),
        pads: Pads | None = None,
        programs: ClientPrograms | None = None,
    ):
        assert s.blinded == (pads is not None)
        self.s, self.index, self.rows, self.shapes, self.parts = s, index, rows, shapes, parts
        self.programs = ClientPrograms(s, index, parts) if programs is None else programs.of(index)
        self.exam, self.trials = exam, trials
        self.blinded = Blinded(pads, self.programs, shapes, index) if pads is not None else None
        self.in_turn = s.how.clients == "in turn"
        self.opt_travels = opt_travels(s)
        self._marks = jax.jit(lambda params, z, q, beside: exam.marks(s.segments.predict(params, z), q, beside))

    def fresh(self) -> Held:
        """Returns what a client holds before the first round: the segment that all of them draw."""
        segment = self.programs.new_segment()
        opt = () if self.s.config.federated.client_optimizer_state == "reset" else self.programs.new_optimizer(segment)
        return Held(segment, opt, self.programs.new_averaging(segment), 0)

    def brought(self, held: Held) -> Tensors:
        """Returns what the server gets of the first segment."""
        if self.blinded is None:
            return to_tensors("first_segment", held.segment)
        found = kept(held.segment, held.opt, held.averaging, self.s.how)
        return to_tensors("first_segment", self.blinded.sealed(found, held.round))

    def received(self, tensors: Tensors, held: Held | None, round: int) -> Held:
        """Returns what a client holds that was sent the segment, as it comes or comes back."""
        if self.blinded is not None:
            return self._opened(self.blinded, tensors, held, round)
        segment = from_tensors("segment", self.shapes.segment, tensors)
        if any(name.startswith("segment_optimizer/") for name in tensors):
            opt = from_tensors("segment_optimizer", self.shapes.segment_opt, tensors)
        else:
            opt = held.opt if held is not None else self.programs.new_optimizer(segment)
        averaging = held.averaging if held is not None else self.programs.new_averaging(segment)
        return Held(jax.device_put(segment), jax.device_put(opt), averaging, round)

    def _opened(self, blinded: Blinded, tensors: Tensors, held: Held | None, round: int) -> Held:
        segment, opt, averaging = jax.device_put(blinded.opened(tensors, self.s.how))
        if not self.s.how.averages_gradients:
            opt = held.opt if held is not None else self.fresh().opt
        return Held(segment, opt, averaging, round)

    def compile(self) -> None:
        """Compiles what a step needs, before anybody waits for it."""
        held, zero, grads = self.fresh(), np.int32(0), None
        for rows in self.trials or [jax.tree.map(lambda x: x[0], self.rows(0))]:
            drawn = self.programs.draw(rows, zero, zero)
            up, kept = self.programs.begin(held.segment, drawn, zero)
            z = zeros_like(self.shapes.hidden)
            if not self.shapes.masked_only:
                z = fitted(z, jax.tree.leaves(up.activations)[0].shape[1])
            _, grads, _ = self.programs.head(held.segment, drawn, zero, z)
            grads = self.programs.finish(kept, zeros_like(up.activations), grads)
        opt = held.opt if jax.tree.leaves(held.opt) else self.programs.new_optimizer(held.segment)
        jax.block_until_ready(self.programs.update(grads, opt, held.segment, zero))

    def first_message(self, members: Sequence[str], me: str) -> int:
        """Returns the barrier at which this client sends its first message of a round."""
        place = members.index(me) if self.in_turn else 0
        return place * self._per_turn()

    def scores_at(self, members: Sequence[str]) -> int:
        """Returns the barrier of a round's evaluation."""
        return self._per_turn() * (len(members) if self.in_turn else 1)

    def _per_turn(self) -> int:
        """Returns how many messages a client sends before an evaluation."""
        how, f = self.s.how, self.s.config.federated
        once = self.in_turn or how.client == "copies"
        return f.local_steps * (2 * self.parts + how.averages_gradients) + once + self.s.blinded

    def run_round(
        self, held: Held, id: Id, members: Sequence[str], me: str, weight: float, evaluates: bool, wire: Wire
    ) -> Ended:
        """Trains a round.

        Args:
          held: what it begins from.
          id: the round's first message.
          members: who takes part, in the order of their turns where they take turns.
          me: this client's name.
          weight: its share.
          evaluates: whether the round ends with an evaluation.
          wire: what carries messages.

        Raises:
          whatever `wire` raises; the round has then changed nothing.
        """
        how, f, p = self.s.how, self.s.config.federated, self.programs
        in_turn = self.in_turn
        at = self.first_message(members, me)
        first = id.round * f.steps_per_round(self.s.cohort) + (members.index(me) * f.local_steps if in_turn else 0)
        segment, opt, averaging = held.segment, held.opt, held.averaging
        if not jax.tree.leaves(opt):
            opt = p.new_optimizer(segment)
        rows, losses, norms = self.rows(id.round), [], []
        for k in range(f.local_steps):
            drawn = p.draw(jax.tree.map(lambda x: x[k], rows), np.int32(id.round), np.int32(k))  # noqa: B023
            grads, loss = self._gradient(segment, drawn, id._replace(at=at), wire)
            at += 2 * self.parts
            step = np.int32(first + k)
            if how.averages_gradients:
                grads, averaging = self._mean(grads, averaging, weight, id._replace(at=at), wire)
                at += 1
            segment, opt, norm = p.update(grads, opt, segment, step)
            losses.append(loss)
            norms.append(norm)  # read at the end: whoever waits for an update begins no other step
        norm = np.asarray(np.mean([float(norm) for norm in norms]), np.float32)
        own = () if f.client_optimizer_state == "reset" else opt
        state = to_tensors("trained_segment_optimizer", opt) if self.opt_travels else {}
        if in_turn:
            wire.post(id._replace(at=at), to_tensors("trained_segment", segment) | state | {"norm": norm}).result()
        elif how.client == "copies":
            upload = p.upload(segment, held.segment)
            if self.blinded is not None:
                mean, averaging = self.blinded.mean(upload, averaging, weight, id._replace(at=at), norm, wire)
                segment, outer = p.moved(held.segment, mean, averaging.outer)
                averaging, at = averaging._replace(outer=outer), at + 1
            else:
                message = to_tensors("trained_segment", upload) | state | {"norm": norm}
                answer = wire.post(id._replace(at=at), message).result()
                after = self.received(answer, Held(segment, own, averaging, id.round), id.round + 1)
                segment, own = after.segment, after.opt
        if self.blinded is not None:
            self.blinded.keep(kept(segment, own, averaging, how), id.round + 1, id._replace(at=at), wire)
        sums = None
        if evaluates:
            last = id._replace(at=self.scores_at(members))
            # Where clients take turns, others may have trained the segment further; the server answers when all have.
            ended = self.received(wire.segment(last), held, id.round + 1).segment if in_turn else segment
            sums = self.score(ended, id.round, wire)
            wire.post(last, {"sums": sums}).result()
        return Ended(Held(segment, own, averaging, id.round + 1, id.epoch), float(np.mean(losses)), sums)

    def score(self, segment: Any, round: int, wire: Wire) -> np.ndarray:
        """Asks the model what its exam asks; returns the client's total of the answers, float32.

        What held-out text makes crosses, too, so it is clipped and noised like rows of training.
        """
        marks = []
        for n, (questions, beside) in enumerate(self.exam.questions()):
            asked = {"positions": questions.positions, "lengths": questions.lengths}
            message = {name: np.asarray(x, np.uint16) for name, x in asked.items() if x is not None}
            h = np.asarray(self.programs.ask(segment, questions, round, n))
            z = wire.transform({"activations": h} | message)["hidden_states"]
            marks.append(np.asarray(self._marks(segment, z, questions, beside)))
        return self.exam.total(marks)

    def _gradient(self, segment: Any, drawn: Any, id: Id, wire: Wire) -> tuple[Any, float]:
        """Returns the gradient of a step and its loss; microbatches are on their way while others are computed."""
        p, parts = self.programs, [np.int32(n) for n in range(self.parts)]
        begun, asked, answered, loss, total = [], [], [], 0.0, None
        for n in parts:
            up, kept = p.begin(segment, drawn, n)
            begun.append(kept)
            asked.append(wire.post(id._replace(at=id.at + int(n)), to_tensors("", up)))
        for n in parts:
            z = from_tensors("hidden_states", self.shapes.hidden, asked[n].result())
            value, grads, dz = p.head(segment, drawn, n, z)
            mine = np.asarray(value, np.float32)
            message = to_tensors("head_gradient", dz) | {"loss": mine}
            answered.append((grads, wire.post(id._replace(at=id.at + self.parts + int(n)), message)))
            loss += float(mine)
        for kept, (head_grads, future) in zip(begun, answered, strict=True):
            dh = from_tensors("input_gradient", self.shapes.up.activations, future.result())
            grads = p.finish(kept, dh, head_grads)
            total = grads if total is None else p.add(total, grads)
        return total, loss

    def _mean(self, grads: Any, averaging: Averaging, weight: float, id: Id, wire: Wire) -> tuple[Any, Averaging]:
        """Returns the clients' mean gradient of a step, and what is carried on to the next one."""
        p, norm = self.programs, np.asarray(_norm(grads), np.float32)
        if self.blinded is not None:
            return self.blinded.mean(grads, averaging, weight, id, norm, wire)
        payload, unsent = p.contribution(grads, averaging.unsent, np.float32(weight))
        answer = wire.post(id, to_tensors("segment_gradient", payload) | {"norm": norm}).result()
        mean = p.mean_gradient(from_tensors("mean_gradient", self.shapes.mean, answer))
        return mean, averaging._replace(unsent=unsent)


@jax.jit
def _norm(grads: Any) -> jax.Array:
    return jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(grads)))

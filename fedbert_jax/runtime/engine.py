"""The server's work: computes what the session says is due, and holds the body, the segment and their optimizers.

A round works on a copy of the state, which takes the state's place when the round is over. A round that begins again
begins from the state. Arrays are never overwritten, so the copy costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from fedbert_jax.data.sampling import client_weights
from fedbert_jax.federated.setting import Setting
from fedbert_jax.federated.state import Rows
from fedbert_jax.runtime import blinded
from fedbert_jax.runtime.frames import Schema, Tensors
from fedbert_jax.runtime.parties import ServerPrograms
from fedbert_jax.runtime.payloads import fitted, from_tensors, to_tensors
from fedbert_jax.runtime.script import barriers, expected, opt_travels
from fedbert_jax.runtime.shapes import shapes_of
from fedbert_jax.runtime.slots import Slots
from fedbert_jax.runtime.turns import BACKWARD, CONTRIBUTE, FORWARD, HAND_ON, KEEP, SCORES, UPLOAD, Barrier, Compute
from fedbert_jax.runtime.work import Lost


class ServerState(NamedTuple):
    """All that changes from round to round."""

    segment: Any  # the client segment, as far as the server holds it: under blinded averaging sealed, uint8 [n]
    segment_opt: Any  # its optimizer state; () where it doesn't travel
    body: Any
    body_opt: Any
    outer: Any


class Engine:
    """The server's arithmetic.

    Args:
      s: the setting; `cohort` is C.
      roster: the clients, in the order of their indices.
      rows: the shapes of what one client trains on in one step.
      parts: microbatches of a step.
      lengths: that a client may pad its rows to; (): those of `rows`, always.
      sums: the shape of what a client says of its answers at an evaluation.
    """

    def __init__(
        self,
        s: Setting,
        roster: Sequence[str],
        rows: Rows,
        parts: int = 1,
        lengths: tuple[int, ...] = (),
        sums: tuple[int, ...] = (3,),
    ):
        self.s, self.how, self.f = s, s.how, s.config.federated
        self.roster, self.parts = tuple(roster), parts
        self.in_turn = self.how.clients == "in turn"
        self.cohort = 1 if self.in_turn else s.cohort
        self.programs = ServerPrograms(s, self.cohort)
        self.shapes, self.lengths, self.sums = shapes_of(s, rows, parts), lengths, sums
        self._schemas: dict[str, Schema] = {}
        self.opt_travels = opt_travels(s)
        self.own_update = jax.jit(s.client_tx.update)  # of the server's own copy, where gradients are averaged
        self.state: ServerState | None = None
        self.work: ServerState | None = None
        self.round = 0
        self.slots = Slots((), self.cohort, self.in_turn)

    # --- what a round is ---

    def script(self, members: tuple[str, ...], round: int, evaluates: bool) -> list[Barrier]:
        """Returns the barriers of a round."""
        return barriers(self.s, members, self.parts, evaluates)

    def schema(self, barrier: Barrier) -> Schema:
        """Returns what is expected of a message at a barrier."""
        if barrier.phase not in self._schemas:  # every message asks
            self._schemas[barrier.phase] = expected(self.s, self.shapes, barrier, self.lengths, self.sums)
        return self._schemas[barrier.phase]

    def weights(self, members: Sequence[str], blocks: Mapping[str, int]) -> Sequence[float]:
        """Returns the shares of the clients of a round, by how much text each has; float32, summing to 1."""
        sizes = np.array([blocks[c] for c in members])
        return [float(share) for share in client_weights(sizes, np.arange(len(members)), self.f.weighting)]

    def state_shape(self) -> ServerState:
        """Returns the shapes of a state: what a checkpoint is restored to."""
        return jax.eval_shape(self._first_state, self.first_segment)

    def _first_state(self, segment: Any) -> ServerState:
        body, opt, outer = self.programs.new_body(), (), ()
        if not self.s.blinded:
            keeps = self.opt_travels or self.how.averages_gradients
            opt = self.s.client_tx.init(segment) if keeps else ()
            outer = self.s.outer.init(segment) if self.s.outer else ()
        return ServerState(segment, opt, body, () if self.programs.resets else self.programs.new_optimizer(body), outer)

    @property
    def first_segment(self) -> Any:
        """The shapes of what the first client brings: the segment, or under blinded averaging a snapshot."""
        return blinded.sealed_shapes(self.shapes, self.how) if self.s.blinded else self.shapes.segment

    # --- the work ---

    def begin(self, round: int, members: tuple[str, ...], blocks: Mapping[str, int]) -> None:
        """Begins a round, anew or again."""
        assert self.state is not None
        body, opt = self.state.body, self.state.body_opt
        if self.programs.copies:
            opt = self.programs.new_optimizer(body) if self.programs.resets else opt
            body, opt = map(self.programs.replicate, (body, opt))
        self.work = self.state._replace(body=body, body_opt=opt)
        self.round, self.slots = round, Slots(members, self.cohort, self.in_turn)
        self._share = dict(zip(members, self.weights(members, blocks), strict=True))
        self._kept: list[Any] = []
        self._grads: Any = None
        self._losses: dict[str, list[float]] = {c: [] for c in members}
        self._norms: dict[str, list[tuple[float, jax.Array]]] = {"server": [], "mean": []}  # weighted; read at the end
        self._client_norms: dict[str, list[float]] = {c: [] for c in members}
        self.scores: dict[str, np.ndarray] = {}

    def compute(self, what: Compute) -> tuple[dict[str, Tensors], Callable[[], None]]:
        """Computes a barrier.

        Returns:
          Each client's answer, and what keeps the result: to be called if it counts.
        """
        return {
            FORWARD: self._forward,
            BACKWARD: self._backward,
            CONTRIBUTE: self._contribute,
            UPLOAD: self._upload,
            HAND_ON: self._hand_on,
            SCORES: self._take_scores,
            KEEP: self._keep_snapshot,
        }[what.barrier.phase](what)

    def finish_round(self) -> None:
        """Ends a round: what it worked on becomes the state."""
        assert self.work is not None
        work = self.work
        if self.programs.copies:
            shares = self.slots.at({c: self._share[c] for c in self._there})
            body = self.programs.average_states(work.body, shares)
            opt = () if self.programs.resets else self.programs.average_states(work.body_opt, shares)
            work = work._replace(body=body, body_opt=opt)
        self.state = jax.block_until_ready(work)

    def metrics(self) -> dict[str, float]:
        """Returns the numbers of the round that was computed last: means over steps, and over clients by weight.

        Where gradients are averaged, `grad_norm_client` is of their mean, as in a simulation. Under pads nobody here knows
        that: `grad_norm_each_client` is of the clients' own.
        """
        shares = {c: self._share[c] for c in self._there}
        total = sum(shares.values()) or 1.0
        mean = lambda each: float(sum(shares[c] * np.mean(each[c]) for c in shares if each[c]) / total)  # noqa: E731
        of_steps = lambda norms: sum(w * float(x) for w, x in norms) / (sum(w for w, _ in norms) or 1.0)  # noqa: E731
        client = of_steps(self._norms["mean"]) if self._norms["mean"] else mean(self._client_norms)
        name = "grad_norm_each_client" if self.s.blinded and self.how.averages_gradients else "grad_norm_client"
        return {"train_loss": mean(self._losses), name: client, "grad_norm_server": of_steps(self._norms["server"])}

    def transform(self, tensors: Tensors) -> Tensors:
        """Runs the body on h [B, T, D], for evaluation: without dropout, and keeping nothing."""
        assert self.work is not None
        body = self.work.body
        if self.programs.copies:
            # Another thread may begin the round again meanwhile; then whoever asks is refused with its next message.
            shares = self.slots.at({c: self._share.get(c, 0.0) for c in self._there})
            body = self.programs.average_states(body, shares)
        positions, lengths = tensors["positions"].astype(np.int32), tensors.get("lengths")
        return {"hidden_states": np.asarray(self.programs.transform(body, tensors["activations"], positions, lengths))}

    def segment(self) -> Tensors:
        """Returns what a client that comes, or comes back, begins a round with."""
        assert self.state is not None
        state = self.work if self.in_turn and self.work is not None else self.state
        return to_tensors("segment", state.segment) | to_tensors("segment_optimizer", state.segment_opt)

    def body(self) -> Tensors:
        """Returns the body, as clients get it when training is over."""
        assert self.state is not None
        return to_tensors("body", self.state.body)

    def begin_with(self, tensors: Tensors) -> None:
        """Takes the segment that the clients have drawn, before the first round."""
        self.state = self._first_state(from_tensors("first_segment", self.first_segment, tensors))

    # --- barrier by barrier ---

    def _forward(self, what: Compute) -> tuple[dict[str, Tensors], Callable[[], None]]:
        assert self.work is not None
        given = {c: from_tensors("", self.shapes.up, m) for c, m in what.messages.items()}
        lengths = {c: jax.tree.leaves(up.activations)[0].shape[1] for c, up in given.items()}
        longest = max(lengths.values())
        fit = {c: up._replace(activations=fitted(up.activations, longest)) for c, up in given.items()}
        weights = self._weights_of(what.messages)
        ids = np.array([self.roster.index(c) for c in self.slots.names(what.barrier.who)], np.int32)
        when = np.int32(self.round), np.int32(what.barrier.step)
        z, kept = self.programs.forward(self.work.body, self.slots.fill(fit), weights, *when, ids)
        z = jax.tree.map(np.asarray, z)
        replies = {c: to_tensors("hidden_states", self._hidden(self.slots.of(z, c), lengths[c])) for c in what.messages}

        def keep() -> None:
            self._kept.append((kept, lengths))

        return replies, keep

    def _backward(self, what: Compute) -> tuple[dict[str, Tensors], Callable[[], None]]:
        assert self.work is not None
        (kept, lengths), like = self._kept[0], self.shapes.gradient
        longest = max(lengths.values())
        given = {c: self._hidden(from_tensors("head_gradient", like, m), longest) for c, m in what.messages.items()}
        weights = self._weights_of(what.messages)
        grads, dh = self.programs.backward(kept, self.slots.fill(given), weights)
        if self._grads is not None:
            grads = self.programs.add(self._grads, grads)
        dh = jax.tree.map(np.asarray, dh)
        replies = {c: to_tensors("input_gradient", fitted(self.slots.of(dh, c), lengths[c])) for c in what.messages}
        last = what.barrier.part == self.parts - 1
        after = self.programs.update(grads, self.work.body_opt, self.work.body, self._step(what)) if last else None

        def keep() -> None:
            assert self.work is not None
            self._kept.pop(0)
            self._grads = None if last else grads
            for c, m in what.messages.items():
                if what.barrier.part:
                    self._losses[c][-1] += float(m["loss"])
                else:
                    self._losses[c].append(float(m["loss"]))
            if after is not None:
                body, opt, norm = after
                self.work = self.work._replace(body=body, body_opt=opt)
                norm = self.programs.mean_of(weights, norm) if self.programs.copies else norm
                self._norms["server"].append((self._share[what.barrier.who[0]] if self.in_turn else 1.0, norm))

        return replies, keep

    def _contribute(self, what: Compute) -> tuple[dict[str, Tensors], Callable[[], None]]:
        assert self.work is not None
        if self.s.blinded:
            return self._add_up(what)
        like = self.shapes.contribution
        given = self.slots.fill({c: from_tensors("segment_gradient", like, m) for c, m in what.messages.items()})
        mean = self.programs.gradient(given, self.slots.at({c: self._share[c] for c in what.messages}))
        channel = self.s.cut().channels.mean
        received = mean if channel is None else channel.receive(mean)
        segment, opt, norm = self.own_update(received, self.work.segment_opt, self.work.segment, self._step(what))

        def keep() -> None:
            assert self.work is not None
            self._norms["mean"].append((1.0, norm))
            self.work = self.work._replace(segment=segment, segment_opt=opt)

        return dict.fromkeys(what.messages, to_tensors("mean_gradient", mean)), keep

    def _upload(self, what: Compute) -> tuple[dict[str, Tensors], Callable[[], None]]:
        assert self.work is not None
        if self.s.blinded:
            return self._add_up(what)
        like, shares = self.shapes.segment, self.slots.at({c: self._share[c] for c in what.messages})
        given = self.slots.fill({c: from_tensors("trained_segment", like, m) for c, m in what.messages.items()})
        segment, outer = self.programs.average(self.work.segment, given, shares, self.work.outer)
        opt = self.work.segment_opt
        if self.opt_travels:
            states = self.slots.fill({c: self._opt_of(m) for c, m in what.messages.items()})
            opt = self.programs.average_states(states, shares)
        answer = to_tensors("segment", segment) | (to_tensors("segment_optimizer", opt) if self.opt_travels else {})

        def keep() -> None:
            assert self.work is not None
            self._note_norms(what)
            self.work = self.work._replace(segment=segment, segment_opt=opt, outer=outer)

        return dict.fromkeys(what.messages, answer), keep

    def _add_up(self, what: Compute) -> tuple[dict[str, Tensors], Callable[[], None]]:
        """Adds up numbers under pads, which the server can't take off."""
        shares = {c: self._share[c] for c in what.messages}
        numbers = {c: from_tensors(blinded.PADDED, self.shapes.contribution, m) for c, m in what.messages.items()}
        total = self.programs.total(self.slots.fill(numbers), self.slots.at(shares))
        answer = blinded.answer(total, what.messages, self.roster, self.cohort, list(shares.values()))
        return dict.fromkeys(what.messages, answer), lambda: self._note_norms(what)

    def _keep_snapshot(self, what: Compute) -> tuple[dict[str, Tensors], Callable[[], None]]:
        assert self.work is not None
        found = [m for m in what.messages.values() if m[blinded.SNAPSHOT].size]
        if not found:
            raise Lost("the client that was to leave the segment here has gone")
        sealed = {blinded.SNAPSHOT: np.array(found[0][blinded.SNAPSHOT]), blinded.ROUND: np.int32(self.round + 1)}
        work = self.work._replace(segment=sealed)

        def keep() -> None:
            self.work = work

        return {client: {} for client in what.messages}, keep

    def _hand_on(self, what: Compute) -> tuple[dict[str, Tensors], Callable[[], None]]:
        (message,) = what.messages.values()
        segment = from_tensors("trained_segment", self.shapes.segment, message)
        opt = self._opt_of(message) if self.opt_travels else ()

        def keep() -> None:
            assert self.work is not None
            self._note_norms(what)
            self.work = self.work._replace(segment=segment, segment_opt=opt)

        return {client: {} for client in what.messages}, keep

    def _take_scores(self, what: Compute) -> tuple[dict[str, Tensors], Callable[[], None]]:
        def keep() -> None:
            self.scores = {c: np.asarray(m["sums"], np.float64) for c, m in what.messages.items()}

        return {client: {} for client in what.messages}, keep

    # --- slots ---

    @property
    def _there(self) -> list[str]:
        return [c for c in self.slots.members if self._losses.get(c)]

    def _weights_of(self, there: Mapping[str, Any]) -> np.ndarray:
        """Returns the shares of who is there, summing to 1, at their slots."""
        if self.in_turn:
            return np.ones(1, np.float32)
        weights = self.slots.at({c: self._share[c] for c in there})
        return weights if set(there) == set(self.slots.members) else weights / weights.sum()

    def _opt_of(self, message: Tensors) -> Any:
        return from_tensors("trained_segment_optimizer", self.shapes.segment_opt, message)

    def _hidden(self, x: Any, length: int) -> Any:
        """Pads or cuts hidden states, or their gradient, where they are those of all positions."""
        return x if self.shapes.masked_only else fitted(x, length)

    def _step(self, what: Compute) -> np.int32:
        """Returns the global step, from which the rates follow."""
        per_round = self.f.steps_per_round(self.s.cohort)
        turn = self.slots.members.index(what.barrier.who[0]) * self.f.local_steps if self.in_turn else 0
        return np.int32(self.round * per_round + turn + what.barrier.step)

    def _note_norms(self, what: Compute) -> None:
        for c, m in what.messages.items():
            self._client_norms[c].append(float(m["norm"]))

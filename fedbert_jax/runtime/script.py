"""What a round is over a network: its barriers, one after another, and what is expected of a message at each."""

from __future__ import annotations

from fedbert_jax.federated.setting import Setting
from fedbert_jax.runtime import blinded
from fedbert_jax.runtime.frames import Schema, TensorSpec
from fedbert_jax.runtime.payloads import merged, schema_of
from fedbert_jax.runtime.shapes import Shapes
from fedbert_jax.runtime.turns import BACKWARD, CONTRIBUTE, FORWARD, HAND_ON, KEEP, SCORES, UPLOAD, Barrier

NORM = {"norm": TensorSpec("float32", ())}


def opt_travels(s: Setting) -> bool:
    """Whether the state of the clients' optimizer crosses with their segment."""
    return s.config.federated.client_optimizer_state == "average" and not s.how.averages_gradients


def barriers(s: Setting, members: tuple[str, ...], microbatches: int, evaluates: bool) -> list[Barrier]:
    """Returns the barriers of a round.

    Args:
      s: the setting.
      members: who takes part, in the order of their turns where they take turns.
      microbatches: of a step.
      evaluates: whether the round ends with an evaluation.
    """
    in_turn, k_steps = s.how.clients == "in turn", s.config.federated.local_steps
    script: list[Barrier] = []
    for who in [(c,) for c in members] if in_turn else [members]:
        for k in range(k_steps):
            script += [Barrier(phase, k, who, p) for phase in (FORWARD, BACKWARD) for p in range(microbatches)]
            if s.how.averages_gradients:
                script.append(Barrier(CONTRIBUTE, k, who))
        if in_turn:
            script.append(Barrier(HAND_ON, k_steps, who))
    if s.how.client == "copies":
        script.append(Barrier(UPLOAD, k_steps, members))
    if s.blinded:
        script.append(Barrier(KEEP, k_steps, members))
    return script + ([Barrier(SCORES, k_steps, members)] if evaluates else [])


def expected(s: Setting, sh: Shapes, barrier: Barrier, lengths: tuple[int, ...], sums: tuple[int, ...]) -> Schema:
    """Returns what is expected of a message at a barrier.

    Args:
      s: the setting.
      sh: what crosses.
      barrier: where.
      lengths: that a client may pad its rows to; (): those of its rows, always.
      sums: the shape of what a client says of its answers at an evaluation.

    Raises:
      KeyError: if no round of this setting has such a barrier.
    """
    if barrier.phase == KEEP and not s.blinded:
        raise KeyError(KEEP)
    if barrier.phase == FORWARD:
        return schema_of("", sh.up, lengths)
    if barrier.phase == BACKWARD:
        gradient = schema_of("head_gradient", sh.gradient, () if sh.masked_only else lengths)
        return merged(gradient, {"loss": TensorSpec("float32", ())})
    if barrier.phase == SCORES:
        return {"sums": TensorSpec("float32", sums)}
    if barrier.phase == KEEP:
        return blinded.snapshot_schema(sh, s.how)
    if s.blinded:
        return merged(blinded.message_schema(sh), NORM)
    if barrier.phase == CONTRIBUTE:
        return merged(schema_of("segment_gradient", sh.contribution), NORM)
    state = schema_of("trained_segment_optimizer", sh.segment_opt) if opt_travels(s) else {}
    return merged(schema_of("trained_segment", sh.segment), state, NORM)


def questions(batch: int, length: int, masked: int, hidden: int, dtype: str = "float32") -> Schema:
    """Returns what is expected of B blocks of T tokens that are evaluated, with M positions; `dtype` is that of h."""
    h, positions = TensorSpec(dtype, (batch, length, hidden)), TensorSpec("uint16", (batch, masked))
    return {"activations": h, "positions": positions}

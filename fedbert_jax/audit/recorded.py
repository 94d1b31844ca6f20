"""What a federation's server has recorded, as a round to attack, with the truth from the clients' workdirs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fedbert_jax.audit import replay as made
from fedbert_jax.audit.clients import open_clients
from fedbert_jax.audit.replay import Replay
from fedbert_jax.audit.source import Source, drawn
from fedbert_jax.audit.views import Aggregate, Messages, Truth
from fedbert_jax.data.masking import MaskedBatch
from fedbert_jax.data.tokenizer import special_ids, vocab_size
from fedbert_jax.devices.mesh import make_mesh
from fedbert_jax.errors import UserError
from fedbert_jax.federated.split import Up
from fedbert_jax.federated.state import Averaging, Pair, State
from fedbert_jax.finished import elsewhere
from fedbert_jax.jobs import open_job
from fedbert_jax.models.bert import ClientParams
from fedbert_jax.models.layers import take_positions
from fedbert_jax.privacy.pads import Pads
from fedbert_jax.runtime.blinded import opened, sealed_shapes
from fedbert_jax.runtime.frames import Tensors
from fedbert_jax.runtime.parties import Drawn
from fedbert_jax.runtime.payloads import from_tensors, schema_of
from fedbert_jax.runtime.recording import Recorded, read_recorded, recorded_rounds
from fedbert_jax.runtime.shapes import shapes_of
from fedbert_jax.workdir.paths import Workdir

CALLED = {"activations": "h", "hidden_states": "z", "head_gradient": "dz"}  # messages, and what attacks call them
Rows = dict[str, np.ndarray]  # of blocks, by what it is: as in `replay`
ALIKE = 0.1  # of a row's length: how far it may lie from the row made anew, on another device, and rounded by a codec


class Recordings:
    """A server's recorded rounds, and the clients whose text is here.

    Args:
      root: the server's workdir.
      round: which recorded round is attacked, by how many were finished when it began; None: the newest.
      clients: the workdirs of the clients that are attacked.

    Raises:
      UserError: if there are no clients or no such round, or a client's workdir is none of this training.
    """

    def __init__(self, root: Path, round: int | None, clients: Sequence[Path]):
        workdir = Workdir(root)
        self._folder, rounds = workdir.recorded, recorded_rounds(workdir.recorded)
        if not rounds:
            raise UserError(f"{root} has no recorded rounds: a server records messages with --config.audit.record=True.")
        if round is not None and round not in rounds:
            raise UserError(f"--round {round}: it is not recorded; accepted: {', '.join(map(str, rounds))}.")
        if not clients:
            raise UserError(
                f"{root} has what the server received, and scoring needs the text behind it, from the clients' workdirs "
                "(--clients DIR,DIR,...): so only a rehearsal, with all parties on machines of one owner, can be audited."
            )
        at = rounds[-1] if round is None else round
        self._round = found = read_recorded(self._folder, at)
        job = open_job(elsewhere(workdir.read_config()))
        config, count = job.config, len(found.roster)
        cohort = min(config.federated.clients_per_round or count, count)
        self._clients = open_clients(clients, found.roster, found.run, cohort)
        self._parts = config.wire.microbatches
        one = next(iter(self._clients.values()))
        secret = None if one.secret == config.seed else one.secret  # None: it follows from `seed`
        job.config = config = dataclasses.replace(
            config,
            privacy=dataclasses.replace(config.privacy, client_seed=secret),
            data=dataclasses.replace(config.data, source=self._told()),
        )
        self._setting = setting = job.setting(count, cohort)
        self._shapes, self._cut = shapes_of(setting, job.batch(), self._parts), setting.cut()
        fresh = jax.eval_shape(setting.fresh)
        self._segment = self._held(found, "segment", fresh.client)
        body = self._held(found, "body", fresh.server)
        opt = self._held(found, "opt", self._shapes.segment_opt)

        def old() -> ClientParams | str:
            found = read_recorded(self._folder, self._before[0], ()) if self._before else None
            held = None if found is None else self._held(found, "segment", fresh.client)
            return "there is no earlier recorded round with one" if held is None else held

        def checkpoint() -> ClientParams | str:
            if not config.model.init_from:
                return "training began with random numbers"
            return job.fill(*jax.jit(setting.fresh)())[0]

        self._before = tuple(n for n in reversed(rounds) if n < at)
        self.source = Source(
            config=config,
            setting=setting,
            mesh=make_mesh(config.mesh),
            tokenizer=job.tokenizer,
            vocab_size=vocab_size(job.tokenizer),
            special_ids=tuple(special_ids(job.tokenizer)),
            text=tuple(tokens for client in self._clients.values() for tokens in client.text),
            state=State(Pair(self._segment, body), Pair(() if opt is None else opt, ()), Averaging()),
            round=at,
            segments={
                "segment": lambda: "the server holds none" if self._segment is None else self._segment,
                "old_segment": old,
                "checkpoint": checkpoint,
                "seed": lambda: drawn(config, setting),
            },
            clients=found.roster,
            replayed=at,
            before=self._before or (at,),
        )

    def _told(self) -> str:
        """Returns the clients' `data.source`; of several on docstrings, all packages."""
        sources = [client.source for client in self._clients.values()]
        packages = [source.removeprefix("docs:") for source in sources if source.startswith("docs:")]
        return "docs:" + ",".join(packages) if len(packages) == len(sources) else sources[0]

    def _held(self, found: Recorded, name: str, like: Any) -> Any:
        """Returns what the server held as a round began; None if it held no such thing."""
        there = schema_of(f"began/{name}", like).keys() <= found.began.keys()
        return from_tensors(f"began/{name}", like, found.began) if there and jax.tree.leaves(like) else None

    def replay(self) -> Replay:
        """Returns the round that is attacked, as `replay.replay` does, of the clients that are here."""
        rows = self._rows(self._round, *CALLED)
        if not rows:
            raise UserError(f"--clients: none of these took part in round {self._round.round + 1}, which was recorded.")
        joined = self._joined(rows)
        return Replay(made.messages_of(joined), made.truth_of(self.source, joined), self._aggregate(self._round, rows))

    def log(self, blocks: int) -> tuple[Messages, Truth]:
        """Returns message 1 of blocks of the rounds recorded before, the last one first, as `replay.log` does.

        They are as they came: the segments that embedded them are those of their rounds. Where no earlier round is recorded,
        it is the attacked one.
        """
        rows: list[Rows] = []
        for round in self.source.before:
            if sum(len(part["h"]) for part in rows) >= blocks:
                break
            names = (*Up._fields, "trained_segment")
            found = self._round if round == self._round.round else read_recorded(self._folder, round, names)
            rows += self._rows(found, "activations")
        if not rows:
            rows = self._rows(self._round, "activations")
        joined = self._joined(rows)
        joined = {name: x[:blocks] for name, x in joined.items()}
        return made.messages_of(joined), made.truth_of(self.source, joined)

    def describe_log(self, blocks: int) -> str:
        """Says of which rounds a log of so many blocks is."""
        if not self._before:
            return f"no earlier round is recorded: the log is the {blocks:,} blocks of the attacked one"
        rounds = ", ".join(str(n) for n in self._before)
        return f"the log is of {blocks:,} blocks, from the rounds recorded after {rounds}, as their segments made them"

    def _joined(self, rows: list[Rows]) -> Rows:
        """Returns rows [R, ...] of all batches."""
        length = self.source.config.data.seq_len
        return {name: np.concatenate([made.padded(name, part[name], length) for part in rows]) for name in rows[0]}

    def _rows(self, found: Recorded, *names: str) -> list[Rows]:
        """Returns a round's batches by step, then client: what crossed, of messages of these names, and the truth.

        Raises:
          UserError: if the text that is here isn't what was recorded.
        """
        rows, there = [], found.has(*names)
        own = [c for c in map(found.roster.index, found.members) if c in self._clients]
        data = {c: self._clients[c].rows(found.round) for c in own}
        for k in range(self.source.config.federated.local_steps):
            for c in own:
                places = [(c, k, part) for part in range(self._parts)]
                if all(map(there, places)):  # otherwise it was left out of the rest of the round
                    step = jax.tree.map(lambda x: x[k], data[c])  # noqa: B023
                    drawn = self._clients[c].programs.draw(step, np.int32(found.round), np.int32(k))
                    crossed = self._crossed([found.messages[at] for at in places], drawn.batch, names)
                    self._check(found, c, k, drawn, crossed)
                    owner = np.full(len(drawn.batch.tokens), c)
                    rows.append(jax.device_get(made.rows_of(drawn.batch)) | crossed | {"client": owner})
        return rows

    def _crossed(self, messages: Sequence[Tensors], batch: MaskedBatch, names: Sequence[str]) -> Rows:
        """Returns what a client's messages of a step held, its microbatches one after another, as they are decoded."""
        shapes, channels, found = self._shapes, self._cut.channels, dict[str, np.ndarray]()
        join = lambda parts: np.concatenate([np.asarray(x) for x in parts])  # noqa: E731
        ups = [from_tensors("", shapes.up, message) for message in messages]
        found["h"] = join(made.received(self._cut, up.activations) for up in ups)
        if ups[0].lengths is not None:
            found["lengths"] = join(up.lengths for up in ups)
        if ups[0].positions is not None:
            found["positions"] = join(up.positions for up in ups)
        elif (positions := made.asked(self._setting, batch)) is not None:  # the zeros of dz show them
            found["positions"] = np.asarray(positions)
        for name, like, channel in (
            ("hidden_states", shapes.hidden, channels.hidden_states),
            ("head_gradient", shapes.gradient, channels.head_gradient),
        ):
            if name in names:
                x = join(channel.receive(from_tensors(name, like, message)).astype(jnp.float32) for message in messages)
                asked = x if self._cut.masked_only else np.asarray(take_positions(jnp.asarray(x), batch.positions))
                found[CALLED[name]] = asked
        return found

    # --- the truth ---

    def _check(self, found: Recorded, client: int, step: int, drawn: Drawn, crossed: Rows) -> None:
        """Raises UserError if a client's text isn't what it sent, as far as that can be told."""
        mine, batch = self._clients[client], drawn.batch
        same = crossed["h"].shape[:2] == batch.tokens.shape
        for name, own in (("positions", batch.positions), ("lengths", batch.lengths)):
            if same and own is not None and name in crossed:
                same = np.array_equal(crossed[name], np.asarray(own))
        begun = self._begun(found, client) if step == 0 else None
        if same and begun is not None:
            parts = [mine.programs.begin(begun, drawn, np.int32(part))[0].activations for part in range(self._parts)]
            h = np.concatenate([np.asarray(made.received(self._cut, part)) for part in parts])
            apart, size = (np.linalg.norm(x, axis=-1) for x in (h - crossed["h"], h))
            same = bool((apart <= ALIKE * size).all())
        if not same:
            raise UserError(f"--clients {mine.root}: the text there isn't what was recorded of round {found.round + 1}.")
        if step == 0 and begun is None and not self._cut.masked_only:
            raise UserError(
                f"--clients {mine.root}: nothing that was recorded tells whether the text there is what was sent."
            )

    def _begun(self, found: Recorded, client: int) -> ClientParams | None:
        """Returns the segment that a client began a round with, if that was recorded."""
        segment: ClientParams | None = self._held(found, "segment", self._shapes.segment)
        if self._setting.blinded:  # the server can't open it; the clients, who are here, can
            sealed = from_tensors("began/segment", sealed_shapes(self._shapes, self._setting.how), found.began)
            segment = opened(Pads(self._clients[client].secret, found.run), sealed, self._shapes, self._setting.how)[0]
        if self._setting.how.clients != "in turn":
            return segment
        before = found.members[: found.members.index(found.roster[client])]
        steps = self.source.config.federated.local_steps
        places = [(found.roster.index(name), steps, 0) for name in before]
        if not places:
            return segment
        ended = [found.messages[at] for at in places if found.has("trained_segment")(at)]
        return from_tensors("trained_segment", self._shapes.segment, ended[-1]) if ended else None

    # --- whoever adds up ---

    def _aggregate(self, found: Recorded, rows: list[Rows]) -> Aggregate | None:
        """Returns what whoever adds up sees of all clients; the truth is that of those that are here."""
        s, shapes, steps = self._setting, self._shapes, self.source.config.federated.local_steps
        if self._segment is None:
            return None
        averages = s.how.averages_gradients
        kind = "segment_gradient" if averages else "trained_segment"
        at = range(steps) if averages else (steps,)
        whole = [c for c in map(found.roster.index, found.members) if all(found.has(kind)((c, k, 0)) for k in at)]
        held = np.zeros((len(whole), self.source.vocab_size), bool)
        for n, c in enumerate(whole):
            for row in (row for row in rows if row["client"][0] == c):
                held[n] |= made.held_words(self.source, jax.tree.map(lambda x: x[None], row))[0]
        like = shapes.contribution if averages else shapes.segment
        word = lambda c, k: np.asarray(  # noqa: E731
            made.word_table(self._added(from_tensors(kind, like, found.messages[c, k, 0]), found.shares[found.roster[c]]))
        )
        if averages:
            norms = np.array([[np.linalg.norm(word(c, k), axis=-1) for k in at] for c in whole])
            return made.aggregate_of(self.source, steps, norms, {}, held)
        words = np.stack([word(c, steps) for c in whole])
        if s.outer is not None and s.how.client == "copies":  # what is sent is how far it has moved
            words += np.asarray(made.word_table(self._segment))
        moments = None
        if all(found.has("trained_segment_optimizer")((c, steps, 0)) for c in whole):
            messages = [found.messages[c, steps, 0] for c in whole]
            states = [from_tensors("trained_segment_optimizer", shapes.segment_opt, message) for message in messages]
            each = [made.moments_of(state) for state in states]
            moments = None if each[0] is None else np.stack([np.asarray(x) for x in each])
        return made.aggregate_of(self.source, steps, None, {"word": words, "moments": moments}, held)

    def _added(self, payload: Any, share: float) -> Any:
        """Returns a client's own part of an average, as it was before its share was multiplied in."""
        how, channel = self._setting.how, self._cut.channels.gradient
        if how.clients == "in turn" or (channel is None and not how.averages_gradients):
            return payload
        whole = payload if channel is None else channel.total(channel.receive(payload))
        return jax.tree.map(lambda x: x / share, whole)

"""Fine-tuning in one process: some seeds of a task side by side, by any strategy that ends in one model."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fedbert_jax.config import Config
from fedbert_jax.data.masking import MaskedBatch
from fedbert_jax.data.partition import assign
from fedbert_jax.data.sampling import client_weights, turn_order
from fedbert_jax.data.streams import Secrets, Seeds, secrets, seeds_of
from fedbert_jax.devices.mesh import make_mesh, tree_shardings
from fedbert_jax.devices.tuning import compute_dtype
from fedbert_jax.errors import ConfigError, DivergedError
from fedbert_jax.federated import finite
from fedbert_jax.federated.joined import joined_logits
from fedbert_jax.federated.metrics import RoundMetrics
from fedbert_jax.federated.rounds import make_strategy
from fedbert_jax.federated.setting import make_setting, slices
from fedbert_jax.federated.state import Cohort, Pair, State
from fedbert_jax.glue.examples import TaskData, check_pairs
from fedbert_jax.glue.scores import score
from fedbert_jax.glue.sequences import ExampleStream, Sequences, eval_batches, padded_length, take
from fedbert_jax.models.bert import Params, Segments, make_segments

Start = Callable[[Params, Params], tuple[Params, Params, list[str]]]


class Finetuning:
    """One task's fine-tuning for some seeds side by side: compiled programs, data order, evaluation.

    Args:
      config: with `model` resolved.
      data: the task.
      start: (client_params, server_params) -> (the same filled from a checkpoint, names that it lacked); None is a random
        start.
      seeds: each trains a model of its own; with several, all in one program.
    """

    def __init__(self, config: Config, data: TaskData, start: Start | None, seeds: tuple[int, ...]):
        f = config.federated
        self.config, self.data, self.start, self.seeds = config, data, start, seeds
        check_pairs(config, data)
        self.clients = self._deal(1 if f.arrangement.pools_text else f.num_clients or 1)
        self.per_step = len(self.clients) * f.batch_size  # examples
        self.steps = math.ceil(config.finetune.epochs * len(data.train) / self.per_step)  # per client
        self.rounds = math.ceil(self.steps / f.local_steps)  # the last may be short
        steps = self.steps * (len(self.clients) if f.arrangement.clients == "in turn" else 1)
        optimizers = [
            dataclasses.replace(o, warmup_steps=int(config.finetune.warmup * steps), decay_steps=None)
            for o in (config.client_optimizer, config.server_optimizer)
        ]
        self.setting = make_setting(
            dataclasses.replace(config, client_optimizer=optimizers[0], server_optimizer=optimizers[1]),
            make_segments(config.model, compute_dtype(config), data.task.num_outputs),
            prepare=lambda _, batch: batch,  # the batches are ready
            num_clients=len(self.clients),
            cohort=len(self.clients),
            span=(steps, 0),
        )
        sizes = np.array([len(own) for own in self.clients])
        self.weights = client_weights(sizes, np.arange(len(sizes)), f.weighting)
        self.streams = self._streams()
        self.segments: Segments = self.setting.segments
        self.mesh = make_mesh(config.mesh)
        count, size = slices(len(self.clients), f.clients_at_once, self.mesh.shape["data"])
        if count > 1 and count * size != len(self.clients):  # the cohort is not padded here
            raise ConfigError(
                f"config key federated.clients_at_once={f.clients_at_once}: accepted with task='finetune' on "
                f"{self.mesh.shape['data']} devices (mesh.data): None, or what divides {len(self.clients)} clients there."
            )
        with jax.set_mesh(self.mesh):
            self.state_shape = jax.eval_shape(self._fresh_state)  # [S, ...]
            self.state_sharding = tree_shardings(self.state_shape, self.mesh)
            everywhere = NamedSharding(self.mesh, P())
            round = jax.vmap(self._one_round, (0, 0, None, None, 0))
            self._round = jax.jit(round, donate_argnums=0, out_shardings=(self.state_sharding, everywhere))
            self._predict = jax.jit(jax.vmap(self._one_predict, (0, None)), out_shardings=everywhere)

    def epochs(self, rounds: int) -> float:
        """Returns how many epochs the first `rounds` rounds make."""
        steps = min(rounds * self.config.federated.local_steps, self.steps)
        return steps * self.per_step / len(self.data.train)

    def for_seeds(self, seeds: tuple[int, ...]) -> Finetuning:
        """Returns the same for other seeds, with the same compiled programs if they are as many as here."""
        if len(seeds) != len(self.seeds):
            return Finetuning(self.config, self.data, self.start, seeds)
        other = copy.copy(self)
        other.seeds = seeds
        other.streams = other._streams()
        return other

    def _streams(self) -> list[list[ExampleStream]]:
        f, lengths = self.config.federated, self.data.train.lengths
        return [
            [ExampleStream(seeds, c, lengths[own], f.local_steps, f.batch_size) for c, own in enumerate(self.clients)]
            for seeds in self._seeds_of_each()
        ]

    def _seeds_of_each(self) -> list[Seeds]:
        client = seeds_of(self.config).client - self.config.seed
        return [Seeds(seed, seed + client) for seed in self.seeds]

    def _secrets(self) -> Secrets:
        """Returns the secrets of the seeds side by side, [S]."""
        return jax.tree.map(lambda *keys: jnp.stack(keys), *map(secrets, self._seeds_of_each()))

    def _deal(self, count: int) -> list[np.ndarray]:
        train, partition = self.data.train, self.config.data.partition
        if count == 1:
            return [np.arange(len(train))]
        labels = np.round(train.labels).astype(int)  # scores of a regression are rounded to integers
        _, owned = assign([str(x) for x in labels], np.ones(len(train)), partition, count, seeds_of(self.config))
        empty = [n for n, own in enumerate(owned) if not len(own)]
        if empty:
            raise ConfigError(
                f"config key data.partition.alpha={partition.alpha}: client {empty[0]} of {count} gets no example; "
                "accepted: a larger alpha, or fewer clients."
            )
        return owned

    def _fresh_state(self) -> State:
        strategy = make_strategy(self.setting)
        make = lambda of: strategy.init(dataclasses.replace(self.setting, secrets=of).fresh())  # noqa: E731
        return jax.vmap(make)(self._secrets())

    def init_state(self) -> tuple[State, list[str]]:
        """Returns the states before the first round [S, ...], and the names that the checkpoint lacked."""
        if self.start is None:
            with jax.set_mesh(self.mesh):
                return jax.jit(self._fresh_state, out_shardings=self.state_sharding)(), []
        strategy, states = make_strategy(self.setting), []
        missing: list[str] = []
        for seeds in self._seeds_of_each():
            fresh = jax.jit(dataclasses.replace(self.setting, secrets=secrets(seeds)).fresh)()
            client, server, missing = self.start(*fresh)
            states.append(strategy.init(Pair(client, server)))
        return jax.device_put(jax.tree.map(lambda *leaves: jnp.stack(leaves), *states), self.state_sharding), missing

    def _one_round(
        self, state: State, batches: MaskedBatch, clients: jax.Array, round: jax.Array, of: Secrets
    ) -> tuple[State, RoundMetrics]:
        s = dataclasses.replace(self.setting, secrets=of)
        cohort = Cohort(batches, clients, jnp.asarray(self.weights)[clients], round)
        return make_strategy(s).round(state, cohort)

    def order(self, round: int) -> np.ndarray:
        """Returns the clients [C] in their order in a round: that of their turns, if they take turns."""
        f, count = self.config.federated, len(self.clients)
        shuffled = f.arrangement.clients == "in turn" and f.order == "shuffled"
        return turn_order(seeds_of(self.config), round, count) if shuffled else np.arange(count)

    def batches(self, round: int) -> MaskedBatch:
        """Returns a round's batches [S, K, C, B, ...]: functions of (seed, round, client). The last round may be short."""
        local_steps = self.config.federated.local_steps
        index = np.stack(
            [
                np.stack([self.clients[c][streams[c].round(round)] for c in self.order(round)], axis=1)
                for streams in self.streams
            ]
        )[:, : self.steps - round * local_steps]
        longest = int(self.data.train.lengths[index].max())
        return take(self.data.train, index, padded_length(longest, self.config.data.seq_len))

    def step(self, state: State, round: int) -> tuple[State, RoundMetrics]:
        """Dispatches a round; `state` is used up. Metrics are [S]."""
        seeds, data = len(self.seeds), self.mesh.shape["data"]
        # Seeds are spread over `data` if it divides their number, else each step's sequences are: [S, K, C, B, ...].
        spec = P("data") if seeds % data == 0 else P(None, None, None, "data")
        rows = seeds if seeds % data == 0 else self.config.federated.batch_size
        batches = jax.device_put(self.batches(round), self._spread(spec, rows))
        with jax.set_mesh(self.mesh):
            clients = jnp.asarray(self.order(round), jnp.int32)
            return self._round(state, batches, clients, jnp.int32(round), self._secrets())

    def check_round(self, round: int, metrics: RoundMetrics) -> None:
        """Requires every seed's loss and gradients in a round, from 0, to be finite."""
        loss, client_norm, server_norm, failed = map(np.asarray, metrics[:4])  # [S], the last [S, C]
        for s, seed in enumerate(self.seeds):
            places = finite.first_to_fail(failed[s], self.config.federated.arrangement)
            first = [str(self.order(round)[place]) for place in places]
            problem = finite.in_round(float(loss[s]), float(client_norm[s]), float(server_norm[s]), first)
            finite.require(f"of seed {seed}, {problem}" if problem else "")

    def _spread(self, spec: P, rows: int) -> NamedSharding:
        """Spreads an axis of `rows` over the devices; each device holds all of it if `data` doesn't divide it."""
        return NamedSharding(self.mesh, spec if rows % self.mesh.shape["data"] == 0 else P())

    def _one_predict(self, model: Pair, batch: MaskedBatch) -> jax.Array:
        return joined_logits(self.segments, model.client, model.server, batch)[:, 0]

    def logits(self, model: Pair, data: Sequences) -> np.ndarray:
        """Returns the outputs of models [S, ...] for all sequences, float32 [S, n, outputs].

        Raises:
          DivergedError: if an output is not finite.
        """
        models = jax.tree.leaves(model)[0].shape[0]
        result = np.zeros((models, len(data), self.data.task.num_outputs), np.float32)
        sharding = self._spread(P("data"), self.config.eval.batch_size)
        for index, batch in eval_batches(data, self.config.eval.batch_size, self.config.data.seq_len):
            with jax.set_mesh(self.mesh):
                outputs = self._predict(model, jax.device_put(batch, sharding))
            result[:, index] = np.asarray(outputs)[:, : len(index)]
        bad = np.flatnonzero(~np.isfinite(result).all(axis=(1, 2)))
        if bad.size:
            whose = f" of {finite.listed([str(self.seeds[s]) for s in bad], 'seed')}" if models == len(self.seeds) else ""
            raise DivergedError(f"{self.data.task.name}: a model's outputs{whose} are not finite; lower the learning rates.")
        return result

    def predictions(self, logits: np.ndarray) -> np.ndarray:
        """Turns outputs [..., outputs] into class ids, or scores of a regression."""
        return logits[..., 0] if self.data.task.regression else logits.argmax(-1)

    def scores(self, state: State) -> list[dict[str, dict[str, float]]]:
        """Returns the official metrics of each seed, by dev split."""
        found = {split: self.predictions(self.logits(state.model, d)) for split, d in self.data.dev.items()}
        return [
            {split: score(self.data.task, p[s], self.data.dev[split].labels) for split, p in found.items()}
            for s in range(len(self.seeds))
        ]

"""Simulates every client: compiles a strategy's round and feeds it, on whatever devices there are.

Several processes simulate together: each runs this same program, and gathers the token blocks of its own devices alone.
"""

from __future__ import annotations

import dataclasses
import functools
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from fedbert_jax.config import Config
from fedbert_jax.data import sampling
from fedbert_jax.data.blocks import TokenBlocks
from fedbert_jax.data.masking import MaskSpec, mask_blocks, num_masked
from fedbert_jax.errors import ConfigError
from fedbert_jax.federated.evaluation import (
    EvalSet,
    Evaluation,
    evaluation,
    log_frequencies,
    make_evaluate,
    make_evaluate_frequencies,
    plan_evaluation,
)
from fedbert_jax.federated.metrics import RoundMetrics
from fedbert_jax.federated.rounds import make_strategy
from fedbert_jax.federated.setting import Setting, slices
from fedbert_jax.federated.state import Cohort, Pair, State
from fedbert_jax.federated.traffic import round_traffic
from fedbert_jax.finite import first_to_fail
from fedbert_jax.models.bert import make_segments
from fedbert_jax.optim import make_aggregator, make_optimizer, schedule_span
from fedbert_jax.sharding import place, put, tree_shardings
from fedbert_jax.streams import Stream, generator, seeds_of

ON_DEVICE_LIMIT = 2**30  # bytes of token blocks that `data.store=auto` puts on the device


def compute_dtype(config: Config) -> Any:
    """Returns the arithmetic's type: `auto` is bfloat16 on accelerators, float32 on CPU."""
    name = config.precision.compute_dtype
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def resolve_attention(config: Config) -> Config:
    """Returns the config with `model.attention` "xla" or "cudnn": "auto" becomes cudnn where that compiles.

    Raises:
      ConfigError: if cudnn is asked for and doesn't compile here.
    """
    model, f = config.model, config.federated
    # Where clients have bodies of their own, attention is vmapped over them, which cuDNN's doesn't take.
    possible = f.arrangement.body == "one" and model.attention_dropout == 0 and jax.default_backend() == "gpu"
    if model.attention == "auto" and not possible:
        return dataclasses.replace(config, model=dataclasses.replace(model, attention="xla"))
    if model.attention != "xla":
        assert model.hidden_size is not None and model.num_heads is not None
        sizes, length = (model.num_heads, model.hidden_size // model.num_heads), config.data.seq_len
        attend = lambda q, k, v: jnp.sum(jax.nn.dot_product_attention(q, k, v, implementation="cudnn"))  # noqa: E731
        try:
            for rows in (length, num_masked(config.mlm.mask_prob, length)):  # of all layers but the last, and of the last
                q, kv = (jax.ShapeDtypeStruct((2, n, *sizes), compute_dtype(config)) for n in (rows, length))
                jax.jit(jax.grad(attend, (0, 1, 2))).lower(q, kv, kv).compile()
        except Exception as e:  # each version has its own ways to refuse
            if model.attention == "cudnn":
                reason = " ".join(str(e).split())[:200].rstrip(".")
                raise ConfigError(f"config key model.attention='cudnn': accepted here: 'auto' or 'xla' ({reason}).") from e
            return dataclasses.replace(config, model=dataclasses.replace(model, attention="xla"))
        return dataclasses.replace(config, model=dataclasses.replace(model, attention="cudnn"))
    return config


class Simulation:
    """A run's compiled programs and open buffers.

    Args:
      config: with `model` resolved to the vocabulary.
      train: training blocks, client by client.
      heldout: held-out blocks of the same clients.
      mask: the vocabulary's facts for masking.
      mesh: the devices.
    """

    def __init__(self, config: Config, train: TokenBlocks, heldout: TokenBlocks, mask: MaskSpec, mesh: Mesh):
        f = config.federated
        self.config, self.train, self.mesh, self.seeds = config, train, mesh, seeds_of(config)
        self.num_clients = train.num_clients
        self.cohort = min(f.clients_per_round or self.num_clients, self.num_clients)
        how = f.arrangement
        # Whether a step's rows come from one stream of all blocks, so from each client in proportion to its text.
        one_batch = how.pools_text or f.batch_by == "size"
        abreast = how.abreast and not one_batch
        steps = f.steps_per_round(self.cohort)
        self.setting = Setting(
            config=config,
            segments=make_segments(resolve_attention(config).model, compute_dtype(config)),
            prepare=functools.partial(mask_blocks, spec=mask),
            client_tx=make_optimizer(config.client_optimizer, "client_optimizer", *schedule_span(f, steps)),
            server_tx=make_optimizer(config.server_optimizer, "server_optimizer", *schedule_span(f, steps)),
            outer=make_aggregator(config.aggregator),
            num_clients=self.num_clients,
            cohort=self.cohort,
        )
        self.strategy = make_strategy(self.setting)
        # Clients are spread over `data`, slice by slice: a cohort that doesn't divide is padded with clients of weight 0.
        # Where each client has state of its own, [N, ...], it must stay N.
        count, size = slices(self.cohort, f.clients_at_once, mesh.shape["data"])
        self.padding = count * size - self.cohort if abreast and not f.own_state else 0
        store = config.data.store
        small = store == "auto" and train.tokens.nbytes <= ON_DEVICE_LIMIT and jax.process_count() == 1
        self._on_device = store == "device" or small
        self.one_batch = one_batch
        self.blocks_per_client = f.batch_size * (self.cohort if one_batch else 1)
        self.offsets = np.array([0, train.offsets[-1]]) if one_batch else train.offsets
        self.tokens_per_round = self.cohort * f.local_steps * f.batch_size * config.data.seq_len

        # A round's data lies by clients where these train side by side, else by the rows of a batch.
        clients = 1 if one_batch else self.cohort + self.padding
        axes = (None, "data", None) if abreast else (None, None, "data")
        self._by_blocks = place(mesh, (f.local_steps, clients, self.blocks_per_client), *axes)  # of tokens [K, C, B, T]
        self._by_client = place(mesh, (clients,), "data" if abreast else None)  # of weights [C]
        self._everywhere = place(mesh, ())

        with jax.set_mesh(mesh):
            self.state_shape = jax.eval_shape(self._fresh_state)
            self.state_sharding = tree_shardings(self.state_shape, mesh)
            # Parameters are born sharded; a round's state takes the place of the last one's.
            self._init = jax.jit(self._fresh_state, out_shardings=self.state_sharding)
            self._round = jax.jit(
                self.strategy.round, donate_argnums=0, out_shardings=(self.state_sharding, self._everywhere)
            )
            self._evaluate = jax.jit(
                make_evaluate(self.setting.segments, mask, self.seeds, self.strategy.model_of),
                out_shardings=self._everywhere,
            )
            self._evaluate_frequencies = jax.jit(
                make_evaluate_frequencies(mask, self.seeds), out_shardings=self._everywhere
            )
            self._model_of = jax.jit(self.strategy.model_of, out_shardings=self._everywhere)
        self._eval_set = self._make_eval_set(heldout)
        self._store: jax.Array | None = None  # put on the device when the first round asks for it
        self._gather = jax.jit(lambda blocks, index: blocks[index], out_shardings=self._by_blocks)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="fedbert-feed")
        self._next: tuple[int, Future[Cohort]] | None = None

    def _fresh_state(self) -> State:
        return self.strategy.init(self.setting.fresh())

    def init_state(self) -> State:
        """Returns the state before round 0, a function of the seed."""
        with jax.set_mesh(self.mesh):
            return self._init()

    def state_of(self, client_params: Any, server_params: Any) -> State:
        """Returns the state before round 0 of a run that starts from given parameters (a checkpoint's)."""
        params = jax.device_get(Pair(client_params, server_params))  # the same in every process
        with jax.set_mesh(self.mesh):
            return jax.jit(self.strategy.init, out_shardings=self.state_sharding)(params)

    def run_round(self, state: State, round: int) -> tuple[State, RoundMetrics]:
        """Dispatches a round and returns at once; `state` is used up. The next round's data is fetched meanwhile."""
        inputs = self._fetched(round)
        with jax.set_mesh(self.mesh):
            result = self._round(state, inputs)
        if round + 1 < self.config.federated.rounds:
            self._next = (round + 1, self._pool.submit(self.round_data, round + 1))
        return result

    def _fetched(self, round: int) -> Cohort:
        waiting, self._next = self._next, None
        if waiting is not None and waiting[0] == round:
            return waiting[1].result()
        return self.round_data(round)

    def round_data(self, round: int) -> Cohort:
        """Draws a round's cohort and blocks: a function of (seeds, round).

        Reads only the blocks that this process's devices are to hold, unless all blocks lie on the device anyway.
        """
        f, clients = self.config.federated, self.cohort_of(round)
        weights = np.ones(1, np.float32)
        if not self.one_batch:
            weights = sampling.client_weights(self.train.sizes, clients, f.weighting)
        if self.padding:
            clients = np.concatenate([clients, np.repeat(clients[:1], self.padding)])
            weights = np.concatenate([weights, np.zeros(self.padding, np.float32)])
        per_step = self.blocks_per_client
        index = np.empty((f.local_steps, len(clients), per_step), np.int64)  # of blocks in `train`, [K, C, B]
        for n, c in enumerate(clients):
            start, stop = self.offsets[c], self.offsets[c + 1]
            first = round * f.local_steps * per_step
            places = sampling.block_indices(self.seeds, int(c), int(stop - start), first, f.local_steps * per_step)
            index[:, n] = start + places.reshape(f.local_steps, per_step)
        with jax.set_mesh(self.mesh):
            if self._on_device:
                if self._store is None:
                    self._store = jax.device_put(np.asarray(self.train.tokens), self._everywhere)
                tokens = self._gather(self._store, put(index.astype(np.int32), self._by_blocks))
            else:
                tokens = self._blocks(self.train, index, self._by_blocks)
            client_ids = put(clients.astype(np.int32), self._by_client)
            number = put(np.asarray(round, np.int32), self._everywhere)
            return Cohort(tokens, client_ids, put(weights, self._by_client), number)

    def cohort_of(self, round: int) -> np.ndarray:
        """Returns the clients who take part in a round, int32 [C], in the order of their turns; [0] for all."""
        f = self.config.federated
        if self.one_batch:
            return np.zeros(1, np.int32)
        clients = sampling.draw_cohort(self.seeds, round, self.num_clients, self.cohort)
        if f.arrangement.clients == "in turn" and f.order == "shuffled":
            clients = clients[sampling.turn_order(self.seeds, round, self.cohort)]
        return clients

    def first_to_fail(self, round: int, failed: np.ndarray) -> list[int]:
        """Returns the clients with whom a round's numbers, from 0, stopped being finite; none where that can't be told."""
        if not failed.any():
            return []
        cohort = self.cohort_of(round)
        failed = failed[: len(cohort)]  # without who pads the cohort
        return sorted(int(cohort[n]) for n in first_to_fail(failed, self.config.federated.arrangement))

    def _blocks(self, source: TokenBlocks, index: np.ndarray, sharding: NamedSharding) -> jax.Array:
        """Returns the token blocks [..., T] of an index [...] that is laid out by `sharding`."""
        shape = (*index.shape, source.tokens.shape[1])
        rows = lambda part: source.tokens[index[part[:-1]]]  # noqa: E731
        return jax.make_array_from_callback(shape, sharding, rows, dtype=source.tokens.dtype)

    def _make_eval_set(self, heldout: TokenBlocks) -> EvalSet:
        e = self.config.eval
        chosen = np.flatnonzero(heldout.sizes > 0)
        if len(chosen) > e.max_clients:
            rng = generator(self.seeds, Stream.EVALUATED)
            chosen = np.sort(rng.choice(chosen, e.max_clients, replace=False))
        multiple = self.mesh.shape["data"]
        plan = plan_evaluation(heldout.offsets, chosen, e.max_blocks, e.batch_size, self.seeds, multiple)
        by_rows = place(self.mesh, plan.rows.shape, None, "data")  # [S, B]
        self._owners = plan.clients
        tokens = self._blocks(heldout, plan.rows, by_rows)
        return EvalSet(tokens, put(plan.real, by_rows), put(plan.blocks, by_rows), put(plan.clients, self._everywhere))

    def evaluate(self, state: State) -> Evaluation | None:
        """Scores the state on held-out text; None if there is none. Waits for the result."""
        if not len(self._owners):
            return None
        with jax.set_mesh(self.mesh):
            sums = self._evaluate(state, self._eval_set)
        return evaluation(np.asarray(sums), self._owners, self.train.sizes)

    def evaluate_frequencies(self, counts: np.ndarray, special_ids: tuple[int, ...]) -> Evaluation | None:
        """Scores guessing by training frequency, as `evaluate` scores a state: on the same positions of the same text.

        Args:
          counts: int [V], how often each token is in the training blocks.
          special_ids: tokens that are never guessed.
        """
        if not len(self._owners):
            return None
        log_probs = put(log_frequencies(counts, special_ids), self._everywhere)
        with jax.set_mesh(self.mesh):
            sums = self._evaluate_frequencies(log_probs, self._eval_set)
        return evaluation(np.asarray(sums), self._owners, self.train.sizes)

    def model_of(self, state: State, client: int = 0) -> Pair:
        """Returns the model that a client would use (for most strategies, everyone's).

        It is whole, and on this process's first device. Every process has to call it.
        """
        with jax.set_mesh(self.mesh):
            model = self._model_of(state, np.int32(client))
        return jax.tree.map(lambda x: x.addressable_data(0), model)

    def traffic(self) -> dict[str, int]:
        """Returns the bytes that a round would move between clients and server, by message (`wire.MESSAGES`)."""
        shape = (self.config.federated.batch_size, self.config.data.seq_len)
        return round_traffic(self.setting, jax.ShapeDtypeStruct(shape, jnp.int32))

    def compiled(self) -> int:
        """Returns how many versions of the round have been compiled: 1, unless something changed shape."""
        return self._round._cache_size()  # type: ignore[attr-defined]

    def close(self) -> None:
        """Ends the feeding thread."""
        self._pool.shutdown(cancel_futures=True)

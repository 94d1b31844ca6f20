"""A round's data: which clients take part, in which order, with which token blocks and weights, and on which devices.

All processes draw the same; each gathers only the blocks of its own devices.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from fedbert_jax.config import Config
from fedbert_jax.data import sampling
from fedbert_jax.data.blocks import TokenBlocks
from fedbert_jax.data.streams import Stream, generator, seeds_of
from fedbert_jax.devices.mesh import place, put
from fedbert_jax.devices.tuning import ON_DEVICE_LIMIT
from fedbert_jax.federated.evaluation import EvalSet, plan_evaluation
from fedbert_jax.federated.setting import slices
from fedbert_jax.federated.state import Cohort


class Feed:
    """Draws each round's cohort and blocks, functions of (seeds, round), and fetches the next round's while one runs.

    Args:
      config: the run's.
      blocks: training blocks, client by client.
      mesh: the devices.
    """

    def __init__(self, config: Config, blocks: TokenBlocks, mesh: Mesh):
        f, how = config.federated, config.federated.arrangement
        self.config, self.blocks, self.mesh, self.seeds = config, blocks, mesh, seeds_of(config)
        self.num_clients = blocks.num_clients
        self.cohort = min(f.clients_per_round or self.num_clients, self.num_clients)
        # Whether a step's rows come from one stream of all blocks, and so from each client in proportion to its text.
        self.one_batch = how.pools_text or f.batch_by == "size"
        abreast = how.abreast and not self.one_batch
        # Clients are spread over `data`, slice by slice: a cohort that doesn't divide is padded with clients of weight 0.
        # If each client has state of its own, [N, ...], the cohort must stay N.
        count, size = slices(self.cohort, f.clients_at_once, mesh.shape["data"])
        self.padding = count * size - self.cohort if abreast and not f.own_state else 0
        store = config.data.store
        small = store == "auto" and blocks.tokens.nbytes <= ON_DEVICE_LIMIT and jax.process_count() == 1
        self._on_device = store == "device" or small
        self.blocks_per_client = f.batch_size * (self.cohort if self.one_batch else 1)
        self.offsets = np.array([0, blocks.offsets[-1]]) if self.one_batch else blocks.offsets
        self.tokens_per_round = self.cohort * f.local_steps * f.batch_size * config.data.seq_len

        # A round's data is sharded by client if clients train side by side, else by the rows of a batch.
        clients = 1 if self.one_batch else self.cohort + self.padding
        axes = (None, "data", None) if abreast else (None, None, "data")
        self._by_blocks = place(mesh, (f.local_steps, clients, self.blocks_per_client), *axes)  # of tokens [K, C, B, T]
        self._by_client = place(mesh, (clients,), "data" if abreast else None)  # of weights [C]
        self._everywhere = place(mesh, ())
        self._store: jax.Array | None = None  # put on the device when the first round needs it
        self._gather = jax.jit(lambda blocks, index: blocks[index], out_shardings=self._by_blocks)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="fedbert-feed")
        self._next: tuple[int, Future[Cohort]] | None = None

    def take(self, round: int) -> Cohort:
        """Returns a round's data, already fetched if it is the round expected."""
        waiting, self._next = self._next, None
        if waiting is not None and waiting[0] == round:
            return waiting[1].result()
        return self.draw(round)

    def fetch_ahead(self, round: int) -> None:
        """Begins to fetch a round's data in a thread, if there is such a round."""
        if round < self.config.federated.rounds:
            self._next = (round, self._pool.submit(self.draw, round))

    def draw(self, round: int) -> Cohort:
        """Draws a round's cohort and blocks.

        Reads only the blocks for this process's devices, unless all blocks are on the device anyway.
        """
        f, clients = self.config.federated, self.cohort_of(round)
        weights = np.ones(1, np.float32)
        if not self.one_batch:
            weights = sampling.client_weights(self.blocks.sizes, clients, f.weighting)
        if self.padding:
            clients = np.concatenate([clients, np.repeat(clients[:1], self.padding)])
            weights = np.concatenate([weights, np.zeros(self.padding, np.float32)])
        per_step = self.blocks_per_client
        index = np.empty((f.local_steps, len(clients), per_step), np.int64)  # among all clients' blocks, [K, C, B]
        for n, c in enumerate(clients):
            start, stop = self.offsets[c], self.offsets[c + 1]
            first = round * f.local_steps * per_step
            places = sampling.block_indices(self.seeds, int(c), int(stop - start), first, f.local_steps * per_step)
            index[:, n] = start + places.reshape(f.local_steps, per_step)
        with jax.set_mesh(self.mesh):
            if self._on_device:
                if self._store is None:
                    self._store = jax.device_put(np.asarray(self.blocks.tokens), self._everywhere)
                tokens = self._gather(self._store, put(index.astype(np.int32), self._by_blocks))
            else:
                tokens = lay_out(self.blocks, index, self._by_blocks)
            client_ids = put(clients.astype(np.int32), self._by_client)
            number = put(np.asarray(round, np.int32), self._everywhere)
            return Cohort(tokens, client_ids, put(weights, self._by_client), number)

    def cohort_of(self, round: int) -> np.ndarray:
        """Returns the clients that take part in a round, int32 [C], in order of their turns; [0] if all are one batch."""
        f = self.config.federated
        if self.one_batch:
            return np.zeros(1, np.int32)
        clients = sampling.draw_cohort(self.seeds, round, self.num_clients, self.cohort)
        if f.arrangement.clients == "in turn" and f.order == "shuffled":
            clients = clients[sampling.turn_order(self.seeds, round, self.cohort)]
        return clients

    def close(self) -> None:
        """Ends the feeding thread."""
        self._pool.shutdown(cancel_futures=True)


def lay_out(source: TokenBlocks, index: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Returns the token blocks [..., T] at an index [...], laid out by `sharding`."""
    shape = (*index.shape, source.tokens.shape[1])
    rows = lambda part: source.tokens[index[part[:-1]]]  # noqa: E731
    return jax.make_array_from_callback(shape, sharding, rows, dtype=source.tokens.dtype)


def make_eval_set(config: Config, heldout: TokenBlocks, mesh: Mesh) -> tuple[EvalSet, np.ndarray]:
    """Draws the clients to evaluate, and their held-out blocks.

    Returns:
      The blocks [S, B, T], and the client of each of the S batches, int [S].
    """
    e, seeds = config.eval, seeds_of(config)
    chosen = np.flatnonzero(heldout.sizes > 0)
    if len(chosen) > e.max_clients:
        rng = generator(seeds, Stream.EVALUATED)
        chosen = np.sort(rng.choice(chosen, e.max_clients, replace=False))
    plan = plan_evaluation(heldout.offsets, chosen, e.max_blocks, e.batch_size, seeds, mesh.shape["data"])
    by_rows, everywhere = place(mesh, plan.rows.shape, None, "data"), place(mesh, ())  # [S, B]
    tokens = lay_out(heldout, plan.rows, by_rows)
    return EvalSet(tokens, put(plan.real, by_rows), put(plan.blocks, by_rows), put(plan.clients, everywhere)), plan.clients

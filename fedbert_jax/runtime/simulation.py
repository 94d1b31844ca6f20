"""Simulates every client: compiles a strategy's round and feeds it with data, on whatever devices there are.

Several processes simulate together: each runs this same program, and gathers only the token blocks of its own devices.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from fedbert_jax.config import Config
from fedbert_jax.data.blocks import TokenBlocks
from fedbert_jax.data.masking import MaskSpec, mask_blocks
from fedbert_jax.data.streams import seeds_of
from fedbert_jax.devices.mesh import place, put, tree_shardings
from fedbert_jax.devices.tuning import compute_dtype, masks_by_sorting, resolve_attention
from fedbert_jax.federated.evaluation import (
    Evaluation,
    evaluation,
    log_frequencies,
    make_evaluate,
    make_evaluate_frequencies,
)
from fedbert_jax.federated.finite import first_to_fail
from fedbert_jax.federated.metrics import RoundMetrics
from fedbert_jax.federated.optim import schedule_span
from fedbert_jax.federated.perplexity import perplexity, pseudo_log_likelihood
from fedbert_jax.federated.rounds import make_strategy
from fedbert_jax.federated.setting import make_setting
from fedbert_jax.federated.state import Pair, State
from fedbert_jax.federated.traffic import round_traffic
from fedbert_jax.models.bert import make_segments
from fedbert_jax.runtime.feed import Feed, make_eval_set


class Simulation:
    """A run's compiled programs and open buffers.

    Args:
      config: with `model` resolved to the vocabulary.
      train: training blocks, client by client.
      heldout: held-out blocks of the same clients.
      mask: what masking needs to know about the vocabulary.
      mesh: the devices.
    """

    def __init__(self, config: Config, train: TokenBlocks, heldout: TokenBlocks, mask: MaskSpec, mesh: Mesh):
        self.config, self.train, self.mesh, seeds = config, train, mesh, seeds_of(config)
        mask = mask._replace(by_sorting=masks_by_sorting(mesh))
        self.feed = Feed(config, train, mesh)
        steps = config.federated.steps_per_round(self.feed.cohort)
        self.setting = make_setting(
            config,
            make_segments(resolve_attention(config).model, compute_dtype(config)),
            prepare=functools.partial(mask_blocks, spec=mask),
            num_clients=self.feed.num_clients,
            cohort=self.feed.cohort,
            span=schedule_span(config.federated, steps),
        )
        self.strategy = make_strategy(self.setting)
        self._everywhere = place(mesh, ())
        with jax.set_mesh(mesh):
            self.state_shape = jax.eval_shape(self._fresh_state)
            self.state_sharding = tree_shardings(self.state_shape, mesh)
            # Parameters are created sharded; a round's new state reuses the buffers of the old one.
            self._init = jax.jit(self._fresh_state, out_shardings=self.state_sharding)
            self._round = jax.jit(
                self.strategy.round, donate_argnums=0, out_shardings=(self.state_sharding, self._everywhere)
            )
            self._evaluate = jax.jit(
                make_evaluate(self.setting.segments, mask, seeds, self.strategy.model_of), out_shardings=self._everywhere
            )
            self._evaluate_frequencies = jax.jit(make_evaluate_frequencies(mask, seeds), out_shardings=self._everywhere)
            self._model_of = jax.jit(self.strategy.model_of, out_shardings=self._everywhere)

            def scored(state: State, client: jax.Array, tokens: jax.Array, asked: jax.Array) -> jax.Array:
                model = self.strategy.model_of(state, client)
                return pseudo_log_likelihood(self.setting.segments, model, tokens, asked, mask.mask_id)

            self._pseudo = jax.jit(scored, out_shardings=self._everywhere)
        self._eval_set, self._owners = make_eval_set(config, heldout, mesh)

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
        inputs = self.feed.take(round)
        with jax.set_mesh(self.mesh):
            result = self._round(state, inputs)
        self.feed.fetch_ahead(round + 1)
        return result

    def first_to_fail(self, round: int, failed: np.ndarray) -> list[int]:
        """Returns the clients whose numbers first stopped being finite in a round, from 0; none if that is not known."""
        if not failed.any():
            return []
        cohort = self.feed.cohort_of(round)
        failed = failed[: len(cohort)]  # without the clients that pad the cohort
        return sorted(int(cohort[n]) for n in first_to_fail(failed, self.config.federated.arrangement))

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

    def pseudo_perplexity(
        self, state: State, tokens: np.ndarray, asked: np.ndarray, clients: Sequence[int] | None = None
    ) -> dict[int, float]:
        """Returns the pseudo-perplexity of a text by the models of clients.

        Args:
          state: the state.
          tokens: int32 [S, T].
          asked: bool [S, T], which tokens are predicted.
          clients: whose models; None: of those evaluated if each has its own, else of client 0, which is everyone's.
        """
        if clients is None:
            own = self.config.federated.arrangement.keeps_own and len(self._owners)
            clients = np.unique(self._owners).tolist() if own else (0,)
        text = put(tokens, self._everywhere), put(asked, self._everywhere)
        with jax.set_mesh(self.mesh):
            return {int(c): perplexity(np.asarray(self._pseudo(state, np.int32(c), *text))) for c in clients}

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
        self.feed.close()

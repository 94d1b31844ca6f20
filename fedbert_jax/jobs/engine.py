"""A job's arithmetic at the server, new or as a checkpoint has it."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from fedbert_jax import config as config_lib
from fedbert_jax.config import Config
from fedbert_jax.devices.mesh import make_mesh
from fedbert_jax.jobs.job import Job
from fedbert_jax.runtime.engine import Engine, ServerState
from fedbert_jax.workdir import resume
from fedbert_jax.workdir.checkpoint import Checkpoints


def engine_of(job: Job, names: Sequence[str], cohort: int) -> Engine:
    """Returns a job's arithmetic at the server; `cohort` clients of these take part in a round."""
    setting = job.setting(len(names), cohort)
    return Engine(setting, names, job.batch(), job.config.wire.microbatches, job.lengths, job.sums)


def restored(engine: Engine, checkpoints: Checkpoints, round: int, config: Config) -> ServerState:
    """Returns what a server saved after a round.

    Raises:
      UserError: if the checkpoint is damaged or of another config.
    """
    shape = tuple(engine.state_shape())  # as it was saved: orbax tells a tuple with names from one without
    here = jax.sharding.NamedSharding(make_mesh(config_lib.MeshConfig(data=1)), jax.sharding.PartitionSpec())
    state, meta = checkpoints.restore(round, shape, jax.tree.map(lambda _: here, shape))
    resume.check_stamp(f"the checkpoint of round {round}", meta.get("config"), config, config_lib.HARMLESS)
    return ServerState(*state)

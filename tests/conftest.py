"""Fixtures that the tests share; the tiny model itself is in tiny.py."""

from __future__ import annotations

import gc
import os
import resource
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from processes import FLAGS

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # else it logs, in a process that is forked, to what the test reads
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="fedbert-jax-cache-"))  # for subprocesses, too
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"

import jax
import pytest
from tiny import mask_spec, random_blocks, tiny_config

from fedbert_jax.config import Config
from fedbert_jax.data.masking import MaskedBatch, mask_blocks
from fedbert_jax.models.bert import Segments, make_segments

jax.config.update("jax_numpy_rank_promotion", "raise")
# Here, what compiles faster than it is written is compiled again; processes begin with many such programs, and share them.
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
gc.set_threshold(50_000)  # tracing makes many objects that live, and looking through them again and again costs a tenth

# Bytes that a process of the tests may grow to: altogether three quarters of the machine's, but no more than it needs.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
MEMORY = min(8 << 30, 3 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // (4 * WORKERS))


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Half as many workers again as there are cores (`-n auto`): tests of several processes wait for one another."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cores + (cores + 1) // 2


@pytest.fixture(scope="session")
def config() -> Config:
    """Two layers, in one loop."""
    return tiny_config(model=dict(num_layers=2, unroll_layers=False))


@pytest.fixture(scope="session")
def segments(config: Config) -> Segments:
    return make_segments(config.model)


@pytest.fixture(scope="session")
def batch(config: Config) -> MaskedBatch:
    """Three clients' masked blocks [3, 2, ...]."""
    keys = jax.random.split(jax.random.key(7), 3)
    return jax.vmap(lambda k, t: mask_blocks(k, t, mask_spec(config)))(keys, random_blocks(0, 3, 2))


@pytest.fixture(scope="module", autouse=True)
def forgotten() -> Iterator[None]:
    """After a file, lets go of compiled programs if the process has become large; those in use are soon there again."""
    yield
    pages = int(Path("/proc/self/statm").read_text().split()[1]) if sys.platform == "linux" else 0
    if pages * resource.getpagesize() > MEMORY:
        jax.clear_caches()
        gc.collect()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Leaves what has been imported out of all collections of garbage."""
    gc.freeze()


# The files that take longest, longest first: the workers then end together (`--dist loadfile --no-loadscope-reorder`).
LONGEST = (
    "federated/test_rounds",
    "glue/test_finetune",
    "devices/test_mesh",
    "runtime/test_federation",
    "test_benchmarks",
    "audit/test_command",
    "test_network",
    "test_resume",
    "jobs/test_classifying",
    "devices/test_processes",
    "runtime/test_simulation",
    "audit/test_replay",
    "audit/test_recorded",
    "runtime/test_faults",
)
assert all((Path(__file__).parent / f"{name}.py").is_file() for name in LONGEST)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        name = item.path.with_suffix("").as_posix()
        return next((n for n, end in enumerate(LONGEST) if name.endswith(f"tests/{end}")), len(LONGEST))

    items.sort(key=place)  # stable: the order within a file, and of all other files, stays

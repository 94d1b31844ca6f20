"""The machine a benchmark runs on: its facts for the record, its cores, and its malloc."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

# glibc gives each large buffer back to the system when it is freed, and the next step faults it in again, page by page.
# Logits everywhere take 250 MB per step and eight clients' word tables as much, so this decides the speed of every side.
# With these settings, which glibc reads when a process starts, all threads keep freed memory, in huge pages.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(4 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
    "MALLOC_ARENA_MAX": "1",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "numpy")


def keep_freed_memory() -> None:
    """Starts this process again with `MALLOC` set, unless it is set; does nothing if malloc is not glibc's."""
    if platform.libc_ver()[0] != "glibc" or all(os.environ.get(k) == v for k, v in MALLOC.items()):
        return
    sys.stdout.flush()
    os.execve(sys.executable, sys.orig_argv, os.environ | MALLOC)


def limit_cores(count: int | None) -> int:
    """Keeps this process to `count` of its cores, JAX and torch alike; call before either starts threads.

    Returns:
      How many cores the process may use.
    """
    if not hasattr(os, "sched_getaffinity"):  # macOS: JAX cannot be limited there
        return os.cpu_count() or 1
    cores = sorted(os.sched_getaffinity(0))
    if count is not None:
        if not 1 <= count <= len(cores):
            raise SystemExit(f"--threads {count}: accepted: 1 to {len(cores)}, the cores this process may use.")
        os.sched_setaffinity(0, cores[:count])
    return len(os.sched_getaffinity(0))


def facts(cores: int) -> dict[str, Any]:
    """Returns what a reader needs to judge numbers measured here; JSON can hold it."""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": _cpu_name(),
        "cores": cores,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average": round(os.getloadavg()[0], 2),  # of the last minute: if much more than 0 at the start, it is busy
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "python": platform.python_version(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "malloc": {key: os.environ.get(key, "default") for key in MALLOC},
    }


def describe(machine: dict[str, Any]) -> str:
    """Returns `facts` as lines to print under a table."""
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    malloc = ", ".join(f"{key}={value}" for key, value in machine["malloc"].items())
    return (
        f"{machine['date']}; {machine['cpu']}, {machine['cores']} cores used, {machine['memory_gib']} GiB, "
        f"{machine['system']}, load {machine['load_average']} at the start.\n"
        f"Python {machine['python']}, {versions}.\n{malloc}."
    )


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None

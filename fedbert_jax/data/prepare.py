"""python -m fedbert_jax.data.prepare: another name of the command `python -m fedbert_jax.prepare`, `fedbert prepare`."""

from __future__ import annotations

import runpy

if __name__ == "__main__":  # by name: data/ imports nothing of the commands
    runpy.run_module("fedbert_jax.prepare", run_name="__main__", alter_sys=True)

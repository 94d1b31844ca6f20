"""`python -m fedbert_jax.audit`: the command of `audit/command.py`."""

from fedbert_jax import cli
from fedbert_jax.audit.command import main

if __name__ == "__main__":
    cli.run(main)

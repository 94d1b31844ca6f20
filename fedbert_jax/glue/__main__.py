"""`python -m fedbert_jax.glue`: the command of `glue/command.py`."""

from fedbert_jax import cli
from fedbert_jax.glue.command import main

if __name__ == "__main__":
    cli.run(main)

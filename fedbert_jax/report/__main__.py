"""`python -m fedbert_jax.report`: the command of `report/page.py`."""

from fedbert_jax import cli
from fedbert_jax.report.page import main

if __name__ == "__main__":
    cli.run(main)

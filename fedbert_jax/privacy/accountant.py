"""What `privacy.dp=client` amounts to: epsilon by dp-accounting, and a sentence that says what it is of and what it isn't.

Two federations are neighbours if they differ in one client, whose training blocks are replaced by any others. A replaced
client takes one clipped move out of a round's sum and puts another one in, so that the sum changes by at most 2 * dp_clip.
With a sensitivity of 2 * dp_clip, the multiplier of a round's Gaussian is dp_noise / 2. It has to be halved here, since
dp-accounting's `RdpAccountant` takes a multiplier to be of the sensitivity under `REPLACE_ONE` as well: its Gaussian has the
Renyi divergence alpha / (2 * multiplier**2) (Mironov 2017, proposition 7), and its bound for samples begins with that (Wang,
Balle, Kasiviswanathan, arXiv 1808.00087, theorem 27). Its `PLDAccountant` takes it to be of one client's norm, and doubles
the sensitivity itself under `REPLACE_ONE`. tests/privacy/test_accountant.py holds both to formulas.

A round's cohort is a uniform draw of C of the N clients without replacement, independent of other rounds
(`data/sampling.py::draw_cohort`), which is what `SampledWithoutReplacementDpEvent` is of.
"""

from __future__ import annotations

import importlib.util
import math

import numpy as np

from fedbert_jax.config import Config
from fedbert_jax.config.dp import check_clients
from fedbert_jax.errors import ConfigError


def check_installed(config: Config) -> None:
    """Raises `ConfigError` if epsilon is to be computed and dp-accounting isn't there."""
    dp = config.privacy.dp
    if dp != "none" and importlib.util.find_spec("dp_accounting") is None:
        raise ConfigError(
            f"config key privacy.dp={dp!r}: accepted without dp-accounting: 'none'; pip install 'fedbert_jax[privacy]' "
            "installs it."
        )


class Accountant:
    """The epsilon of a run's averages.

    Args:
      config: the run's, with `privacy.dp` set.
      clients: N.
      cohort: C.

    Raises:
      ConfigError: if there are too few clients.
    """

    def __init__(self, config: Config, clients: int, cohort: int):
        import dp_accounting
        from dp_accounting import rdp

        check_clients(config, clients)
        self.config, self.clients, self.cohort = config, clients, cohort
        self.multiplier = config.privacy.dp_noise / 2
        self._sampled = None
        if cohort < clients:
            # A round's Renyi divergences take a fifth of a second. Those of n rounds are n times as large.
            one = rdp.RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE)
            gaussian = dp_accounting.GaussianDpEvent(self.multiplier)
            one.compose(dp_accounting.SampledWithoutReplacementDpEvent(clients, cohort, gaussian))
            self._sampled = np.asarray(one.orders), np.asarray(one.rdp)

    def epsilon(self, rounds: int) -> float:
        """Returns the epsilon of the averages of so many rounds at `privacy.dp_delta`.

        If every client takes part in each round, it is exact: n Gaussian mechanisms, each chosen after the results of those
        before it, are one whose noise is smaller by the square root of n (Dong, Roth, Su, arXiv 1905.02383, corollary 3.3),
        and dp-accounting has the epsilon of that one (Balle, Wang 2018, theorem 8). Sampling can't make it larger, since
        whoever also knew the cohorts would see no more than that; but the bound for samples can, if cohorts are large. So
        it is the smaller of the two.
        """
        from dp_accounting import get_epsilon_gaussian, rdp

        if not rounds:
            return 0.0
        delta = self.config.privacy.dp_delta
        found = float(get_epsilon_gaussian(self.multiplier / math.sqrt(rounds), delta))
        if self._sampled is not None:
            orders, divergences = self._sampled
            found = min(found, float(rdp.compute_epsilon(orders, rounds * divergences, delta)[0]))
        return found

    def sentence(self, rounds: int, over: bool) -> str:
        """Returns what epsilon is after so many rounds, of what, and what it doesn't cover.

        Args:
          rounds: that the run has altogether.
          over: whether they are over.
        """
        p, how = self.config.privacy, self.config.federated.arrangement
        parts = [name for name, held in (("client segments", how.client), ("bodies", how.body)) if held == "copies"]
        own = [name for name, held in (("segment", how.client), ("body", how.body)) if held == "own"]
        shared = how.body == "one"
        epsilon = math.ceil(100 * self.epsilon(rounds)) / 100  # never less than it is
        uncovered = [
            "the body, which learns from every client in each step without noise" if shared else "",
            "activations and gradients that cross the cut in each step, which the server sees" if how.cut else "",
            f"a client's own {' and '.join(own)}" if own else "",
            "clients' moves before the server clips and averages them",
            "numbers of training and evaluation",
            "optimizer states",
            "how the text was prepared (vocabulary, what is dropped as repeated, federated.epochs)",
            "anything, for whoever knows seed or finds it by trying",
        ]
        return (
            f"differential privacy of clients: the averages of {' and '.join(parts)} over {rounds:,} rounds "
            f"{'have' if over else 'will have'} epsilon {epsilon:,.2f} at delta {p.dp_delta:g} for the replacement of one "
            f"client of {self.clients:,}, {self.cohort:,} a round"
            + (", given what the server sends the others in each step" if shared else "")
            + f"; not covered: {'; '.join(filter(None, uncovered))}."
        )


def warnings(config: Config, clients: int) -> list[str]:
    """Returns sentences about settings with which an epsilon says little."""
    p = config.privacy
    found: list[str] = []
    if p.dp == "none":
        return found
    if p.dp_delta * clients >= 1:
        found.append(
            f"privacy.dp_delta={p.dp_delta:g} is not below 1 / {clients:,}, one over the number of clients: to show one "
            "client's whole move and no other's would have no larger delta."
        )
    if config.seed == Config().seed:
        found.append(
            f"seed={config.seed} is the default: whoever tries it can subtract the noise of privacy.dp; a large random seed "
            "makes that harder."
        )
    return found

"""The epsilon that is reported: dp-accounting's for these events, a formula's where there is one, and never too small."""

from __future__ import annotations

import importlib.util
import itertools
import math
import time

import numpy as np
import pytest
from rich.console import Console
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.stats import norm

from fedbert_jax.config import from_dict
from fedbert_jax.data.sampling import draw_cohort
from fedbert_jax.data.streams import Seeds
from fedbert_jax.errors import ConfigError
from fedbert_jax.privacy import accountant
from fedbert_jax.train import train

needs_accounting = pytest.mark.skipif(
    importlib.util.find_spec("dp_accounting") is None, reason="needs dp-accounting, the extra [privacy]"
)


def config_of(clients=1000, cohort=None, noise=1.0, delta=1e-5, clip=0.5, seed=7, **federated):
    federated = dict(weighting="uniform", client_optimizer_state="reset", clients_per_round=cohort) | federated
    privacy = dict(dp="client", dp_clip=clip, dp_noise=noise, dp_delta=delta)
    return from_dict(dict(federated=federated | dict(num_clients=clients), privacy=privacy, seed=seed))


def made(clients=1000, cohort=None, **kwargs) -> accountant.Accountant:
    return accountant.Accountant(config_of(clients, cohort, **kwargs), clients, cohort or clients)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon of a Gaussian mechanism whose sensitivity is `mu` standard deviations (Balle, Wang 2018, theorem 8)."""
    excess = lambda e: norm.cdf(mu / 2 - e / mu) - math.exp(e + norm.logcdf(-mu / 2 - e / mu)) - delta  # noqa: E731
    return brentq(excess, 0, mu * mu / 2 + 10 * mu + 10, xtol=1e-12)


@needs_accounting
@pytest.mark.parametrize("rounds", [1, 7, 140])
@pytest.mark.parametrize("noise", [0.8, 1.0, 4.0])
def test_of_all_clients_in_each_round_it_is_the_gaussian_mechanisms(noise, rounds):
    """A replaced client changes a sum by up to 2 * clip, or 2 / noise standard deviations; n sums by sqrt(n) times that."""
    for clip in (0.01, 3.0):
        found = made(200, noise=noise, delta=1e-4, clip=clip).epsilon(rounds)
        assert found == pytest.approx(gaussian_epsilon(2 * math.sqrt(rounds) / noise, 1e-4), rel=1e-6)


@needs_accounting
def test_of_all_clients_in_each_round_it_is_dp_accountings():
    import dp_accounting
    from dp_accounting import pld, rdp

    replace = dp_accounting.NeighboringRelation.REPLACE_ONE
    composed = lambda multiplier: dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(multiplier), 20)  # noqa: E731
    found = made(100, noise=8.0, delta=1e-3).epsilon(20)
    # One doubles what a replaced client changes itself, so that its multiplier is of one client's norm; the other doesn't.
    exact, bound = pld.PLDAccountant(replace), rdp.RdpAccountant(neighboring_relation=replace)
    assert found == pytest.approx(exact.compose(composed(8.0)).get_epsilon(1e-3), rel=1e-6)
    assert found < bound.compose(composed(4.0)).get_epsilon(1e-3) < 1.2 * found


@needs_accounting
@pytest.mark.parametrize("clients, cohort, noise, rounds", [(1000, 8, 1.0, 140), (1000, 8, 2.0, 3), (100, 10, 8.0, 50)])
def test_of_a_sample_of_clients_it_is_dp_accountings(clients, cohort, noise, rounds):
    import dp_accounting
    from dp_accounting import rdp

    sampled = dp_accounting.SampledWithoutReplacementDpEvent(clients, cohort, dp_accounting.GaussianDpEvent(noise / 2))
    there = rdp.RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE)
    there.compose(dp_accounting.SelfComposedDpEvent(sampled, rounds))
    found = made(clients, cohort, noise=noise).epsilon(rounds)
    assert found == pytest.approx(there.get_epsilon(1e-5), rel=1e-9)
    assert found < made(clients, noise=noise).epsilon(rounds)


@needs_accounting
@pytest.mark.parametrize("cohort", [1, 10, 50, 99])
def test_no_pair_of_neighbours_shows_more(cohort):
    """All moves are 0 but one client's, which is the clip along a line or the same the other way: mixtures of Gaussians.

    dp-accounting's bound for samples with a multiplier that isn't halved is below what this pair shows.
    """
    import dp_accounting
    from dp_accounting import rdp

    q, noise, delta = cohort / 100, 1.5, 1e-3
    density = lambda x, end: (1 - q) * norm.pdf(x, 0, noise) + q * norm.pdf(x, end, noise)  # noqa: E731

    def shown(epsilon: float) -> float:
        excess = lambda x: max(density(x, 1.0) - math.exp(epsilon) * density(x, -1.0), 0.0)  # noqa: E731
        return quad(excess, -12 * noise, 12 * noise, limit=400, epsabs=1e-9)[0]

    least = brentq(lambda e: shown(e) - delta, 1e-6, 20)
    found = made(100, cohort, noise=noise, delta=delta).epsilon(1)
    assert least <= found * (1 + 1e-6)
    if cohort >= 50:
        whole = rdp.RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE)
        whole.compose(dp_accounting.SampledWithoutReplacementDpEvent(100, cohort, dp_accounting.GaussianDpEvent(noise)))
        assert whole.get_epsilon(delta) < least
    assert cohort < 99 or found < 1.05 * least


@needs_accounting
def test_it_grows_with_rounds_and_is_never_more_than_without_sampling():
    """With half of the clients in each round, the bound for samples is worse than the Gaussian's, which holds as well."""
    some, all_ = made(100, 50, noise=4.0), made(100, noise=4.0)
    series = [some.epsilon(n) for n in range(0, 200, 10)]
    assert series[0] == 0 and all(a < b for a, b in itertools.pairwise(series))
    assert some.epsilon(100) == all_.epsilon(100) == pytest.approx(33.104, abs=1e-3)
    assert made(100, 5, noise=4.0).epsilon(100) < 0.5 * all_.epsilon(100)


@needs_accounting
def test_a_rounds_epsilon_takes_milliseconds():
    some = made(1000, 8)
    start = time.perf_counter()
    for n in range(1, 101):
        some.epsilon(n)
    assert time.perf_counter() - start < 2.0  # it takes .15 s; composing anew each time would take 20 s


def test_a_cohort_is_a_uniform_draw_without_replacement_and_new_in_each_round():
    """What the event of a sample supposes: every client and every pair equally often, whoever was there before."""
    rounds, clients, cohort = 4000, 12, 4
    there = np.zeros((rounds, clients))
    for n in range(rounds):
        drawn = draw_cohort(Seeds(3, 4), n, clients, cohort)
        assert len(set(drawn)) == cohort
        there[n, drawn] = 1
    share = cohort / clients
    assert np.abs(there.mean(0) - share).max() < 5 * math.sqrt(share * (1 - share) / rounds)
    pairs = (there.T @ there / rounds)[np.triu_indices(clients, 1)]
    share_of_pairs = share * (cohort - 1) / (clients - 1)
    assert np.abs(pairs - share_of_pairs).max() < 5 * math.sqrt(share_of_pairs / rounds)
    again = (there[1:] * there[:-1]).mean(0)
    assert np.abs(again - share**2).max() < 5 * math.sqrt(share**2 / rounds)


@needs_accounting
@pytest.mark.parametrize(
    "federated, said, unsaid",
    [
        (
            dict(),
            ["averages of client segments", "what the server sends the others", "the body, which", "cut"],
            ["own body"],
        ),
        (dict(body="merged"), ["client segments and bodies", "cross the cut"], ["the body, which", "the others in each"]),
        (dict(body="private"), ["averages of client segments over", "a client's own body", "cut"], ["the body, which"]),
        (dict(strategy="fedavg"), ["client segments and bodies"], ["cut", "own body", "the body, which"]),
    ],
)
def test_the_sentence_says_of_what_and_of_what_not(federated, said, unsaid):
    config = config_of(1000, None if federated.get("body") == "private" else 8, noise=4.0, **federated)
    cohort = config.federated.clients_per_round or 1000
    ledger = accountant.Accountant(config, 1000, cohort)
    before, after = ledger.sentence(140, over=False), ledger.sentence(140, over=True)
    assert before.replace(" will have ", " have ") == after != before
    shown = f"over 140 rounds have epsilon {math.ceil(100 * ledger.epsilon(140)) / 100:,.2f} at delta 1e-05"
    assert shown in after and f"one client of 1,000, {cohort:,} a round" in after and "\n" not in after
    for part in (*said, "moves before the server clips", "evaluation", "optimizer states", "text was prepared", "seed"):
        assert part in after, part
    assert not any(part in after for part in unsaid)


@needs_accounting
def test_too_few_clients_are_refused_here_too():
    with pytest.raises(ConfigError, match="99 clients"):
        accountant.Accountant(config_of(), 99, 8)


def test_without_dp_accounting_it_is_refused_in_a_sentence(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    accountant.check_installed(from_dict({}))
    with pytest.raises(ConfigError, match=r"^config key privacy.dp='client': .*pip install 'fedbert_jax\[privacy\]'") as e:
        accountant.check_installed(config_of())
    assert "\n" not in str(e.value) and e.value.exit_code == 2


def test_a_run_without_dp_accounting_ends_before_it_has_a_workdir(tmp_path, monkeypatch):
    monkeypatch.setattr(accountant.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install"):
        train(config_of(), tmp_path / "run", Console(quiet=True))
    assert not (tmp_path / "run").exists()


def test_a_delta_of_one_client_and_the_default_seed_are_warned_of():
    assert accountant.warnings(from_dict({}), 1000) == accountant.warnings(config_of(), 1000) == []
    (delta,) = accountant.warnings(config_of(delta=0.001), 1000)
    assert "privacy.dp_delta=0.001 is not below 1 / 1,000" in delta
    (seed,) = accountant.warnings(config_of(seed=0), 1000)
    assert seed.startswith("seed=0 is the default")

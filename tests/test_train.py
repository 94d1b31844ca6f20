"""Which mean a run's held-out numbers are: `federated.weighting` decides, and both are recorded beside it by name."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from tiny import tiny_config

from fedbert_jax import train
from fedbert_jax.federated.evaluation import Evaluation, Score

FOUND = Evaluation({0: Score(3.0, 0.5), 2: Score(1.0, 0.2)}, over_clients=Score(2.0, 0.35), by_text=Score(1.25, 0.2375))


def loop(weighting: str) -> SimpleNamespace:
    """The parts of a run's loop that evaluation needs."""
    run = SimpleNamespace(
        config=tiny_config(federated=dict(weighting=weighting)),
        dataset=SimpleNamespace(client_names=("a", "b", "c")),
        simulation=SimpleNamespace(evaluate=lambda state: FOUND),
        extra=None,
    )
    return SimpleNamespace(run=run, scores={}, guessing=FOUND)


@pytest.mark.parametrize("weighting, loss, accuracy", [("examples", 1.25, 0.2375), ("uniform", 2.0, 0.35)])
def test_the_weighting_decides_which_mean_is_the_headline(weighting, loss, accuracy):
    made = loop(weighting)
    fields = train.Pretraining.evaluate(made, None)
    both = {
        "eval_loss_over_clients": 2.0,
        "eval_loss_by_text": 1.25,
        "eval_accuracy_over_clients": 0.35,
        "eval_accuracy_by_text": 0.2375,
    }
    assert both.items() <= fields.items() and (fields["eval_loss"], fields["eval_accuracy"]) == (loss, accuracy)
    assert fields["eval_clients"] == {"a": {"loss": 3.0, "accuracy": 0.5}, "c": {"loss": 1.0, "accuracy": 0.2}}
    assert made.scores["best_eval_loss"] == loss
    chance = train.Pretraining._baselines(made)
    assert (chance["unigram_loss"], chance["commonest_accuracy"]) == (loss, accuracy)
    assert (chance["unigram_loss_over_clients"], chance["unigram_loss_by_text"]) == (2.0, 1.25)

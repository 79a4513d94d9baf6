"""Which models to measure next, and what an interval decides about a budget."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nas.errors import UserMistake
from nas.latency.prediction import LatencyPredictor, Prediction, choose_samples, decide
from tests.nas._latency_samples import drawn


def test_corners_come_first_then_the_widest() -> None:
    pool, _ = drawn(60, 0)
    chosen = choose_samples(pool, [], 12)
    assert len(set(chosen)) == 12
    macs = np.array([w.macs for w in pool])
    assert macs[chosen[:2]].max() >= np.quantile(macs, 0.95)
    assert macs[chosen[:2]].min() <= np.quantile(macs, 0.05)
    measured = [pool[i] for i in chosen]
    more = choose_samples(pool, measured, 5)
    assert not set(more) & set(chosen)


def test_the_widest_interval_is_chosen() -> None:
    pool, ms = drawn(30, 0)
    predictor = LatencyPredictor().fit(pool[:12], ms[:12])
    found = predictor.predict_many(pool)
    widths = [p.high_ms / p.median_ms for p in found]
    best = max(range(12, 30), key=lambda i: widths[i])
    assert choose_samples(pool, pool[:12], 1, predictor=predictor) == [best]


def test_chosen_samples_are_trusted_more_often_than_random_ones() -> None:
    shares = {"chosen": 0.0, "random": 0.0}
    for seed in range(6):
        pool, ms = drawn(60, seed)
        for name, places in (("chosen", choose_samples(pool, [], 10)), ("random", list(range(10)))):
            predictor = LatencyPredictor().fit([pool[i] for i in places], [ms[i] for i in places])
            shares[name] += sum(p.trusted for p in predictor.predict_many(pool)) / 360
    assert shares["chosen"] > shares["random"]


def test_choosing_too_many_or_of_nothing() -> None:
    pool, _ = drawn(5, 0)
    with pytest.raises(UserMistake, match="k=5 models were asked for and 4 of the pool are not measured"):
        choose_samples(pool, pool[:1], 5)
    with pytest.raises(UserMistake, match="pool=\\[\\] holds no candidates"):
        choose_samples([], [], 1)
    with pytest.raises(UserMistake, match="different features"):
        choose_samples([{"a": 1.0}], [{"b": 1.0}], 1)


@pytest.mark.parametrize(
    ("low", "high", "trusted", "answer"),
    [
        (5.1, 6.0, True, "over"),
        (4.0, 5.0, True, "within"),
        (4.0, 5.1, True, "measure"),
        (9.0, 10.0, False, "measure"),
        (1.0, 2.0, False, "measure"),
    ],
)
def test_a_budget_is_decided_by_the_interval(low: float, high: float, trusted: bool, answer: str) -> None:
    assert decide(Prediction((low + high) / 2, low, high, trusted, "", low), 5.0) == answer


def test_a_budget_must_be_a_number() -> None:
    with pytest.raises(UserMistake, match="budget_ms=nan must be a positive number"):
        decide(Prediction(1, 1, 1, True, "", 1), math.nan)

"""Intervals, percentiles, trends and changes of level, against scipy and closed forms."""

from __future__ import annotations

import random
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap

from nas.latency.statistics import (
    bootstrap_interval,
    drift,
    median_interval,
    percentile,
    relative_slope,
    splits,
)


def test_the_bootstrap_interval_is_that_of_scipy() -> None:
    values = np.random.default_rng(3).lognormal(0, 0.1, 40)
    theirs = bootstrap(
        (values,), np.median, n_resamples=20000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    low, high = bootstrap_interval(values.tolist())
    assert low == pytest.approx(theirs.low, rel=0.01)
    assert high == pytest.approx(theirs.high, rel=0.01)
    assert bootstrap_interval(values.tolist()) == (low, high)
    assert bootstrap_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=60))
@settings(max_examples=60, deadline=None)
def test_intervals_hold_the_median(values: list[float]) -> None:
    middle = statistics.median(values)
    for low, high in (bootstrap_interval(values), median_interval(values), median_interval(values, 0.995)):
        assert min(values) <= low <= middle <= high <= max(values)


def test_order_statistics_cover_as_often_as_they_say() -> None:
    rng = random.Random(1)
    for confidence in (0.95, 0.995):
        hits = 0
        for _ in range(2000):
            low, high = median_interval([rng.gauss(0, 1) for _ in range(15)], confidence)
            hits += low <= 0 <= high
        assert hits / 2000 >= confidence - 0.01


def test_tails_need_samples() -> None:
    values = [float(i) for i in range(1, 1001)]
    assert percentile(values[:99], 0.9) is None
    assert percentile(values[:100], 0.9) == 90.0
    assert percentile(values[:999], 0.99) is None
    assert percentile(values, 0.99) == 990.0


def test_trends() -> None:
    assert relative_slope([1.0, 1.1, 1.2, 1.3, 1.4]) == pytest.approx(0.1 / 1.2)
    assert drift([1.0] * 5 + [2.0] * 5) == 2.0
    assert splits([1.0, 1.01] * 20) == []
    assert splits([1.0] * 20 + [9.0] + [1.0] * 20) == []
    assert len(splits([1.0] * 20 + [1.1] * 20)) == 1
    assert len(splits([1.0] * 20 + [1.1] * 20 + [1.0] * 20)) == 2

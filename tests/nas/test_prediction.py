"""Prediction from few samples, and the intervals around it."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import kendalltau

from nas.errors import UserMistake
from nas.files import CorruptFile
from nas.latency.prediction import LatencyPredictor, Work, pooled_identity
from nas.latency.prediction.conformal import _PENALTY, Spread, left_out, quantile
from nas.latency.prediction.models import fit_log_ridge, fit_prices, fit_prices_near
from tests.nas._latency_samples import PRICES, drawn


def medians(predictor: LatencyPredictor, work: list[Work]) -> NDArray[np.float64]:
    return np.array([p.median_ms for p in predictor.predict_many(work)])


# Models.


def test_prices_are_found_again_and_an_outlier_does_not_move_them() -> None:
    rng = np.random.default_rng(0)
    features = np.column_stack([np.ones(30), rng.uniform(1, 9, 30), rng.uniform(1, 9, 30)])
    ms = features @ np.array([0.5, 2.0, 0.0])
    assert fit_prices(features, ms).prices == pytest.approx([0.5, 2.0, 0.0], abs=1e-6)
    ms[3] *= 4
    assert fit_prices(features, ms).prices == pytest.approx([0.5, 2.0, 0.0], rel=0.02, abs=0.02)


def test_a_power_law_is_found_again() -> None:
    features = np.random.default_rng(0).uniform(1, 100, (40, 2))
    ms = 3 * features[:, 0] ** 0.7 * features[:, 1] ** 0.2
    model = fit_log_ridge(features, ms)
    assert model.predict(features) == pytest.approx(ms, rel=0.01)


def test_prices_near_known_ones_need_few_samples() -> None:
    rng = np.random.default_rng(0)
    features = rng.uniform(1, 9, (40, 5))
    known = np.array([1.0, 2.0, 0.0, 0.5, 3.0])
    ms = features @ (known * 4)
    assert fit_prices_near(features[:3], ms[:3], known).predict(features) == pytest.approx(ms, rel=1e-3)


# Prediction.


def test_ten_samples_rank_and_hit() -> None:
    taus, hits = [], []
    for seed in range(5):
        predictor = LatencyPredictor().fit(*drawn(10, seed))
        work, truth = drawn(80, 100 + seed, noise=0.0)
        found = medians(predictor, work)
        taus.append(kendalltau(found, truth)[0])
        hits.append(np.mean(np.abs(found / np.array(truth) - 1) <= 0.1))
    assert np.mean(taus) >= 0.96
    assert np.mean(hits) >= 0.9


@pytest.mark.parametrize(("count", "draws"), [(10, 60), (14, 50), (30, 12)])
def test_intervals_cover_what_they_say(count: int, draws: int) -> None:
    inside: list[bool] = []
    # Coverage differs from draw to draw by a tenth; the promise is about their mean.
    for seed in range(draws):
        predictor = LatencyPredictor().fit(*drawn(count, seed, noise=0.04))
        work, truth = drawn(20, 1000 + seed, noise=0.04)
        inside += [
            p.low_ms <= t <= p.high_ms for p, t in zip(predictor.predict_many(work), truth, strict=True)
        ]
    assert 0.85 <= np.mean(inside) <= 0.95


def test_batches_are_pooled() -> None:
    predictor = LatencyPredictor().fit(*drawn(30, 0, batches=(1, 8, 64)))
    for batch in (1, 8, 64):
        work, truth = drawn(40, 7, noise=0.0, batches=(batch,))
        assert kendalltau(medians(predictor, work), truth)[0] >= 0.95


def test_power_laws_win_where_work_has_no_price() -> None:
    work, _ = drawn(60, 0)
    ms = [3 * w.linear_macs**0.4 for w in work]
    predictor = LatencyPredictor().fit(work, ms)
    assert predictor.model in ("log_ridge", "corrected")
    assert set(predictor.errors) == {"prices", "log_ridge", "corrected"}
    assert medians(predictor, work) == pytest.approx(ms, rel=0.05)
    assert set(LatencyPredictor().fit(work[:19], ms[:19]).errors) == {"prices"}


def test_the_mean_lies_above_the_median_where_disturbances_cost_time() -> None:
    work, ms = drawn(60, 0, noise=0.0)
    rng = random.Random(0)
    disturbed = [m * (1.5 if rng.random() < 0.2 else 1.0) for m in ms]
    found = LatencyPredictor().fit(work, disturbed).predict(work[0])
    assert found.median_ms == pytest.approx(ms[0], rel=0.02)
    assert found.mean_ms == pytest.approx(ms[0] * 1.1, rel=0.05)


def test_few_samples_are_not_trusted() -> None:
    work, ms = drawn(9, 0)
    found = LatencyPredictor().fit(work[:5], ms[:5]).predict(work[0])
    assert (found.trusted, found.low_ms, found.high_ms) == (False, 0.0, math.inf)
    assert found.why == "only 5 samples, 10 are needed"
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["high_ms"] is None
    assert not LatencyPredictor().fit(work, ms).predict(work[0]).trusted


def test_what_lies_outside_is_not_trusted_and_has_a_wide_interval() -> None:
    work, ms = drawn(40, 0)
    predictor = LatencyPredictor().fit(work, ms)
    inside = predictor.predict(work[0])
    assert inside.trusted
    convolution = predictor.predict(Work.from_dict({**work[0].to_dict(), "convolution_macs": 1e9}))
    assert not convolution.trusted
    assert convolution.why.startswith("convolution_macs=1e+09 lies outside")
    large = predictor.predict(Work.from_dict({**work[0].to_dict(), "softmax_elements": 1e8}))
    assert not large.trusted
    assert large.high_ms / large.median_ms > 1.01 * inside.high_ms / inside.median_ms


def test_a_predictor_that_misses_its_own_samples_is_not_trusted() -> None:
    work, _ = drawn(30, 0)
    rng = random.Random(0)
    predictor = LatencyPredictor().fit(work, [rng.uniform(1, 100) for _ in work])
    found = predictor.predict(work[0])
    assert not found.trusted
    assert found.why.startswith("it misses its own samples by up to ")


def test_updating_is_fitting_to_all() -> None:
    work, ms = drawn(25, 0)
    whole = LatencyPredictor().fit(work, ms)
    grown = LatencyPredictor().update(work[:10], ms[:10]).update(work[10:], ms[10:])
    assert len(grown) == 25
    assert grown.predict(work[3]) == whole.predict(work[3])


def test_another_identity_is_refused() -> None:
    work, ms = drawn(12, 0)
    predictor = LatencyPredictor().fit(work, ms, identity="one")
    assert predictor.identity == "one"
    assert predictor.predict(work[0], identity="one").trusted
    for call in (predictor.fit, predictor.update):
        with pytest.raises(UserMistake, match="identity='two' differs from 'one'"):
            call(work, ms, identity="two")
    with pytest.raises(UserMistake, match="move it with transfer"):
        predictor.predict(work[0], identity="two")


def test_samples_of_no_identity_do_not_join_those_of_one() -> None:
    work, ms = drawn(12, 0)
    predictor = LatencyPredictor().fit(work, ms, identity="one")
    with pytest.raises(UserMistake, match=r"identity=None of samples that are to join .*identity='one'"):
        predictor.update(work, ms)
    assert len(predictor) == 12
    assert len(predictor.update(work, ms, identity="one")) == 24
    assert len(LatencyPredictor().fit(work, ms).update(work, ms)) == 24


def test_a_pooled_identity_forgets_batch_and_size_only() -> None:
    one = {"device": "cpu", "batch": 1, "inputs": [[[1, 3, 96, 96], "float32"]], "key": "a", "threads": 1}
    assert pooled_identity(one) == pooled_identity({**one, "batch": 8, "inputs": [], "key": "b"})
    assert pooled_identity(one) != pooled_identity({**one, "threads": 2})


@pytest.mark.parametrize("count", [5, 10])
def test_moving_to_another_device(count: int) -> None:
    source = LatencyPredictor(identity="here").fit(*drawn(40, 0))
    rng = random.Random(3)
    factor = {name: rng.uniform(3, 5) for name in PRICES}

    def there(work: Work) -> float:
        return sum(PRICES[name] * factor[name] * value for name, value in work.to_dict().items())

    work, _ = drawn(60, 5)
    truth = np.array([there(w) for w in work])
    moved = source.transfer(work[:count], truth[:count].tolist(), identity="there")
    found = moved.predict_many(work[count:])
    values = np.array([p.median_ms for p in found])
    assert moved.identity == "there"
    assert kendalltau(values, truth[count:])[0] >= 0.96
    assert np.mean(np.abs(values / truth[count:] - 1) <= 0.1) >= 0.9
    assert np.mean([p.low_ms <= t <= p.high_ms for p, t in zip(found, truth[count:], strict=True)]) >= 0.85
    assert np.mean([p.trusted for p in found]) >= 0.8
    assert not source.transfer(work[:4], truth[:4].tolist()).predict(work[9]).trusted


def test_saved_and_read_back(tmp_path: Path) -> None:
    work, ms = drawn(20, 0)
    path = tmp_path / "predictor.json"
    predictor = (
        LatencyPredictor(identity="here", coverage=0.8)
        .fit(work, ms)
        .transfer(work[:7], ms[:7], identity="there")
    )
    predictor.save(path)
    again = LatencyPredictor.load(path)
    assert again.identity == "there"
    assert again.coverage == 0.8
    assert again.predict(work[9]) == predictor.predict(work[9])
    path.write_text(path.read_text().replace('"coverage": 0.8', '"coverage": 0.9', 1))
    with pytest.raises(CorruptFile, match="checksum"):
        LatencyPredictor.load(path)
    with pytest.raises(UserMistake, match="format 99 of a stored predictor"):
        LatencyPredictor.from_dict({"format": 99})


STORED = LatencyPredictor().fit([{"a": 1.0}], [1.0]).to_dict()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LatencyPredictor(coverage=1.0), "coverage=1.0 of a predictor must be between"),
        (lambda: LatencyPredictor().fit([], []), "0 models and 0 latencies"),
        (
            lambda: LatencyPredictor().fit([{"a": 1.0}], [0.0]),
            "milliseconds=0.0 of sample 0 must be positive",
        ),
        (lambda: LatencyPredictor().fit([{"a": 1.0}], [math.nan]), "milliseconds=nan of sample 0"),
        (lambda: LatencyPredictor().fit([{"a": -1.0}], [1.0]), "feature a=-1.0 of sample 0 must be finite"),
        (
            lambda: LatencyPredictor().fit([{"a": 1.0}, {"b": 1.0}], [1.0, 2.0]),
            "features a, b are missing or unknown",
        ),
        (lambda: LatencyPredictor().predict({"a": 1.0}), "has no samples; call fit"),
        (lambda: LatencyPredictor().transfer([{"a": 1.0}], [1.0]), "cannot be moved"),
        (
            lambda: LatencyPredictor().fit([{"a": 1.0}], ["a"]),
            "milliseconds='a' of sample 0 must be positive",
        ),
        (lambda: LatencyPredictor().fit([{"a": 1.0}], [None]), "milliseconds=None of sample 0 must be"),  # type: ignore[list-item]
        (lambda: LatencyPredictor().fit([{"a": 1.0}], 3), "milliseconds=3 must be a list"),  # type: ignore[arg-type]
        (lambda: LatencyPredictor().fit(3, [1.0]), "work=3 must be a list"),  # type: ignore[arg-type]
        (lambda: LatencyPredictor().fit(["x"], [1.0]), "work='x' must be counted work"),  # type: ignore[list-item]
        (lambda: LatencyPredictor().fit([{"a": "x"}], [1.0]), "feature a='x' of sample 0 must be finite"),  # type: ignore[dict-item]
        (lambda: LatencyPredictor(coverage="x"), "coverage='x' of a predictor must be between"),  # type: ignore[arg-type]
        (
            lambda: LatencyPredictor.from_dict({"format": 1}),
            "lacks identity, coverage, features, samples, source",
        ),
        (lambda: LatencyPredictor.from_dict(None), "a stored predictor is a NoneType"),  # type: ignore[arg-type]
        (lambda: LatencyPredictor.from_dict({**STORED, "samples": [[1.0]]}), "one number for every feature"),
        (
            lambda: LatencyPredictor.from_dict({**STORED, "samples": [["x", 1.0]]}),
            "feature a='x' of sample 0",
        ),
        (lambda: LatencyPredictor.from_dict({**STORED, "source": 3}), "a stored predictor is a int"),
    ],
)
def test_mistakes(call: Any, message: str) -> None:
    with pytest.raises(UserMistake, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_one_sample_of_one_feature_is_enough_to_answer() -> None:
    found = LatencyPredictor().fit([{"macs": 2.0}], [4.0]).predict({"macs": 3.0})
    assert found.median_ms == pytest.approx(6.0)
    assert not found.trusted


# Intervals.


def test_the_quantile_counts_the_new_sample() -> None:
    scores = np.arange(1.0, 11.0)
    wider = math.sqrt(11 / 9)
    assert quantile(scores, 0.9) == pytest.approx(9.9 * wider)
    assert quantile(scores, 0.5) == pytest.approx(5.5 * wider)
    assert quantile(scores[:8], 0.9) == math.inf


def test_the_spread_of_a_sample_is_what_it_would_be_without_it() -> None:
    rng = np.random.default_rng(0)
    features, ms = rng.uniform(1, 9, (12, 3)), rng.uniform(1, 9, 12)
    whole = Spread.of(features, ms)
    grown = Spread(whole.scale, np.eye(3) / _PENALTY)
    for row, time in zip(features[1:], ms[1:], strict=True):
        grown = grown.with_sample(row, float(time))
    assert whole.of_samples(features, ms)[0] == pytest.approx(grown(features[:1], ms[:1])[0])


@pytest.mark.parametrize("count", [10, 100])
def test_left_out_means_left_out(count: int) -> None:
    features, ms = np.ones((count, 1)), np.arange(1.0, count + 1)

    class Memory:
        def __init__(self, seen: NDArray[np.float64]):
            self.seen = set(seen)

        def predict(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
            assert len(self.seen) + len(rows) == count
            return np.full(len(rows), float(len(self.seen)))

    assert (left_out(lambda _, seen: Memory(seen), features, ms) < count).all()

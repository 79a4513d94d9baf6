"""Which models to measure next, and whether a prediction settles a question or only a measurement does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from nas.errors import UserMistake
from nas.latency.prediction.conformal import Spread
from nas.latency.prediction.predictor import LatencyPredictor, Prediction
from nas.latency.prediction.samples import finite_number, plain_features

if TYPE_CHECKING:
    from nas.latency.prediction.work import Work

__all__ = ["Decision", "choose_samples", "decide"]

Array = NDArray[np.float64]
Decision = Literal["over", "within", "measure"]

CORNERS = 6
"""Samples that are taken at the corners before interval widths mean anything."""

_LEAST_VARIANCE = 0.01


def decide(prediction: Prediction, budget_ms: float) -> Decision:
    """Whether a model keeps a budget: ``over`` and ``within`` only when the whole interval says so, else ``measure``.

    A constraint is kept when the interval's upper end keeps it. A prediction that is not trusted decides nothing.

    Raises:
        UserMistake: a budget that is no positive number.
    """
    finite_number(budget_ms, "budget_ms", "must be a positive number of milliseconds, such as 5.0")
    if prediction.trusted and prediction.low_ms > budget_ms:
        return "over"
    if prediction.trusted and prediction.high_ms <= budget_ms:
        return "within"
    return "measure"


def choose_samples(
    pool: Sequence[Work | Mapping[str, float]],
    already: Sequence[Work | Mapping[str, float]],
    k: int,
    *,
    predictor: LatencyPredictor | None = None,
) -> list[int]:
    """Places in ``pool`` of the ``k`` models to measure next, in this order.

    The first six samples are the corners: both ends of the directions in which the pool varies most (small and large,
    then deep and wide, ...). After them come the models whose interval is the widest, each time as if those chosen
    before had been measured.

    Args:
        pool: candidates, all with the same features; measured ones may be among them.
        already: work of the models that were measured.
        k: how many to choose, at most as many as ``pool`` has that were not measured.
        predictor: fitted to those that were measured; without it widths are judged by the work alone.

    Raises:
        UserMistake: fewer candidates than ``k``, or features that differ.
    """
    rows, measured = _matrices(pool, already)
    free = [index for index, row in enumerate(rows) if not (len(measured) and (measured == row).all(1).any())]
    if not isinstance(k, int) or not 0 < k <= len(free):
        raise UserMistake(f"k={k!r} models were asked for and {len(free)} of the pool are not measured")
    chosen = _corners(rows, measured, free, min(k, max(0, CORNERS - len(measured))))
    if len(chosen) < k:
        chosen += _widest(rows, measured, free, chosen, k - len(chosen), predictor, pool)
    return chosen


def _corners(rows: Array, measured: Array, free: Sequence[int], count: int) -> list[int]:
    """Both ends of each principal direction of the pool's log features, those already measured left out."""
    if count <= 0:
        return []
    floor = np.where(rows.max(0) > 0, 0.01 * rows.mean(0), 1.0)
    logs = np.log(rows + floor)
    mean, deviation = logs.mean(0), logs.std(0)
    vary = deviation > 1e-9
    standard = (logs[:, vary] - mean[vary]) / deviation[vary]
    known = (
        (np.log(measured[:, vary] + floor[vary]) - mean[vary]) / deviation[vary] if len(measured) else None
    )
    directions = _principal(standard)
    chosen: list[int] = []
    for direction in directions:
        places = standard @ direction
        width = float(np.ptp(places))
        for end in (places.max(), places.min()):
            candidates = [index for index in free if index not in chosen]
            best = min(candidates, key=lambda index, e=end, p=places: (abs(p[index] - e), index))  # type: ignore[misc]
            taken = [] if known is None else list(known @ direction)
            taken += [places[index] for index in chosen]
            if any(abs(place - end) < 0.1 * width for place in taken):
                continue
            chosen.append(best)
            if len(chosen) == count:
                return chosen
    rest = [index for index in free if index not in chosen]
    while len(chosen) < count and rest:
        have = [standard[index] for index in chosen] + ([] if known is None else list(known))
        far = max(
            rest,
            key=lambda index: min((float(np.sum((standard[index] - x) ** 2)) for x in have), default=0.0),
        )
        chosen.append(far)
        rest.remove(far)
    return chosen


def _principal(standard: Array) -> Array:
    if not standard.shape[1]:
        return np.empty((0, 0))
    _, s, vt = np.linalg.svd(standard - standard.mean(0), full_matrices=False)
    variance = s**2 / max(float((s**2).sum()), 1e-12)
    return np.asarray(vt[variance > _LEAST_VARIANCE])


def _widest(
    rows: Array,
    measured: Array,
    free: Sequence[int],
    chosen: Sequence[int],
    count: int,
    predictor: LatencyPredictor | None,
    pool: Sequence[Any],
) -> list[int]:
    """The candidates of the widest relative interval, one after the other."""
    taken = set(chosen)
    if predictor is not None and len(predictor):
        places, weights, spread = predictor.spread(pool)
    else:
        # Without prices a model's latency is stood for by its work in units of the pool's mean.
        mean = np.where(rows.max(0) > 0, rows.mean(0), 1.0)
        places, weights = rows, (rows / mean).sum(1)
        basis = measured if len(measured) else rows[list(chosen)] if chosen else rows[:1]
        spread = Spread.of(basis, (basis / mean).sum(1))
        chosen = chosen if len(measured) else []
    for index in chosen:
        spread = spread.with_sample(places[index], float(weights[index]))
    rest = [index for index in free if index not in taken]
    found: list[int] = []
    for _ in range(count):
        leverage = spread.leverage(places[rest], weights[rest])
        best = rest[int(np.argmax(leverage))]
        found.append(best)
        rest.remove(best)
        spread = spread.with_sample(places[best], float(weights[best]))
    return found


def _matrices(pool: Sequence[Any], already: Sequence[Any]) -> tuple[Array, Array]:
    if not pool:
        raise UserMistake("pool=[] holds no candidates; draw some from the space first")
    plain = [plain_features(item) for item in (*pool, *already)]
    names = list(plain[0])
    if any(set(item) != set(names) for item in plain):
        raise UserMistake("candidates and measured models have different features; count all in the same way")
    rows = np.array([[float(item[name]) for name in names] for item in plain], dtype=np.float64)
    return rows[: len(pool)], rows[len(pool) :]

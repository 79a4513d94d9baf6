"""Models of latency over counted work. All are fitted to relative error: 1 ms matters in 5 ms and not in 500.

Arrays: features are (samples, features), not negative; latencies are (samples,), in milliseconds, positive.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Corrected",
    "Fitter",
    "LogRidge",
    "Model",
    "PowerLaw",
    "Prices",
    "fit_corrected",
    "fit_log_ridge",
    "fit_power_law",
    "fit_prices",
    "fit_prices_near",
]

Array = NDArray[np.float64]

ROBUST_ROUNDS = 8
ROBUST_BOUND = 1.5
"""Relative errors above this many robust standard deviations lose weight (Huber): a disturbed measurement is one."""

PENALTIES = 10.0 ** np.arange(-4.0, 2.51, 0.5)
_TINY = 1e-12


class Model(Protocol):
    """Something that turns features into milliseconds."""

    def predict(self, features: Array) -> Array:
        """Milliseconds, shape (samples,)."""
        ...


Fitter = Callable[[Array, Array], Model]
"""Features and milliseconds in, a model out."""


@dataclass(frozen=True)
class Prices:
    """A price in milliseconds for every unit of work, none negative: more work never takes less time."""

    prices: Array

    def predict(self, features: Array) -> Array:
        """Milliseconds, shape (samples,)."""
        return np.maximum(features @ self.prices, _TINY)


@dataclass(frozen=True)
class LogRidge:
    """log(milliseconds) as a linear function of log(work): a power law in every kind of work."""

    scaler: _LogScaler
    weights: Array
    intercept: float

    def predict(self, features: Array) -> Array:
        """Milliseconds, shape (samples,)."""
        return np.asarray(np.exp(np.clip(self.scaler(features) @ self.weights + self.intercept, -40.0, 40.0)))


@dataclass(frozen=True)
class Corrected:
    """Prices times a small power law, for what a sum of prices cannot say (wide products run at a higher rate)."""

    base: Prices
    correction: LogRidge

    def predict(self, features: Array) -> Array:
        """Milliseconds, shape (samples,)."""
        return self.base.predict(features) * self.correction.predict(features)


@dataclass(frozen=True)
class PowerLaw:
    """factor * column ** exponent: how one device relates to another when both are alike."""

    column: int
    factor: float
    exponent: float

    def predict(self, features: Array) -> Array:
        """Milliseconds, shape (samples,)."""
        return np.asarray(self.factor * np.maximum(features[:, self.column], _TINY) ** self.exponent)


def fit_prices(features: Array, milliseconds: Array) -> Prices:
    """Non-negative least squares on relative errors, reweighted against outliers."""
    scale = _scale(features)
    rows = features / scale / milliseconds[:, None]
    return Prices(_robust(rows, np.ones(len(rows)), anchored=0) / scale)


def fit_prices_near(features: Array, milliseconds: Array, prices: Array, strength: float = 0.03) -> Prices:
    """Prices of a device of which little is known, near ``factor * prices`` of one that is known well.

    ``strength`` weighs the known prices against the samples, by the share that each kind of work has in the latency;
    the factor is the median ratio of the samples to the known device.
    """
    known = np.maximum(features @ prices, _TINY)
    factor = float(np.median(milliseconds / known))
    shares = features * (prices * factor) / milliseconds[:, None]
    weight = np.sqrt(strength * len(features)) * shares.mean(0)
    used = weight > 0
    rows = np.concatenate([shares[:, used], np.diag(weight[used])])
    wanted = np.concatenate([np.ones(len(features)), weight[used]])
    found = np.zeros(len(prices))
    found[used] = _robust(rows, wanted, anchored=int(used.sum())) * prices[used] * factor
    return Prices(found)


def fit_log_ridge(features: Array, milliseconds: Array) -> LogRidge:
    """Ridge on standardised log features; the penalty with the least leave-one-out error is taken."""
    scaler = _LogScaler.of(features)
    return _ridge(scaler, scaler(features), np.log(milliseconds))


def fit_corrected(features: Array, milliseconds: Array) -> Corrected:
    """``fit_prices``, and a ridge on what it leaves over."""
    base = fit_prices(features, milliseconds)
    scaler = _LogScaler.of(features)
    return Corrected(base, _ridge(scaler, scaler(features), np.log(milliseconds / base.predict(features))))


def fit_power_law(features: Array, milliseconds: Array, column: int) -> PowerLaw:
    """A rising power law of one feature; with few samples its exponent stays near 1."""
    x = np.log(np.maximum(features[:, column], _TINY))
    y = np.log(milliseconds)
    centred = x - x.mean()
    prior = 0.1
    exponent = max((centred @ (y - y.mean()) + prior) / (centred @ centred + prior), 0.0)
    factor = float(np.exp(np.median(y - exponent * x)))
    return PowerLaw(column, factor, float(exponent))


@dataclass(frozen=True)
class _LogScaler:
    """Logarithms, then zero mean and unit variance; columns that did not vary are left out."""

    used: NDArray[np.intp]
    offset: Array
    mean: Array
    deviation: Array

    @classmethod
    def of(cls, features: Array) -> _LogScaler:
        used = np.flatnonzero(np.ptp(features, axis=0) > 1e-9 * np.abs(features).max(0))
        columns = features[:, used]
        # A kind of work that some models lack has no logarithm there: a hundredth of the mean stands for none.
        offset = np.where(columns.min(0) > 0, 0.0, 0.01 * columns.mean(0))
        logs = np.log(columns + offset)
        return cls(used, offset, logs.mean(0), np.maximum(logs.std(0), 1e-9))

    def __call__(self, features: Array) -> Array:
        columns = np.maximum(features[:, self.used] + self.offset, _TINY)
        return np.asarray((np.log(columns) - self.mean) / self.deviation)


def _ridge(scaler: _LogScaler, columns: Array, wanted: Array) -> LogRidge:
    centre = float(wanted.mean())
    u, s, vt = np.linalg.svd(columns, full_matrices=False)
    projected = u.T @ (wanted - centre)
    best, weights = np.inf, np.zeros(columns.shape[1])
    for penalty in PENALTIES * len(wanted):
        shrink = s**2 / (s**2 + penalty)
        residual = wanted - centre - u @ (shrink * projected)
        leverage = np.minimum(1.0 / len(wanted) + (u**2) @ shrink, 1 - 1e-6)
        # Mean absolute error, not squared: one disturbed measurement must not choose the penalty.
        error = float(np.abs(residual / (1 - leverage)).mean())
        if error < best:
            best = error
            weights = vt.T @ (s / (s**2 + penalty) * projected)
    return LogRidge(scaler, weights, centre)


def _robust(rows: Array, wanted: Array, *, anchored: int) -> Array:
    """Non-negative solution of ``rows @ x = wanted``; the last ``anchored`` rows are no samples, they keep weight 1."""
    from scipy.optimize import nnls

    samples = len(rows) - anchored
    weight = np.ones(len(rows))
    solution: Array = np.zeros(rows.shape[1])
    for _ in range(ROBUST_ROUNDS):
        solution = _solve(nnls, rows * weight[:, None], wanted * weight)
        errors = np.abs(rows[:samples] @ solution - wanted[:samples])
        bound = ROBUST_BOUND * 1.4826 * float(np.median(errors)) + 1e-6
        new = np.sqrt(np.minimum(1.0, bound / np.maximum(errors, _TINY)))
        if np.abs(new - weight[:samples]).max() < 1e-3:
            break
        weight[:samples] = new
    return solution


def _solve(nnls: Any, rows: Array, wanted: Array) -> Array:
    # Only R is needed of a tall system, and the time of nnls grows with its rows.
    if len(rows) > 4 * rows.shape[1]:
        q, rows = np.linalg.qr(rows)
        wanted = q.T @ wanted
    return np.asarray(nnls(rows, wanted, maxiter=50 * rows.shape[1])[0], dtype=np.float64)


def _scale(features: Array) -> Array:
    largest = np.abs(features).max(0)
    return np.where(largest > 0, largest, 1.0)

"""Latency of models that were not measured, from a few that were, with intervals and with the right to say no."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from nas.errors import UserMistake
from nas.files import read_record, write_record
from nas.latency.prediction import models
from nas.latency.prediction.conformal import Spread, left_out, quantile
from nas.latency.prediction.models import Fitter, Model
from nas.latency.prediction.samples import (
    check_identity,
    checked_samples,
    feature_matrix,
    finite_number,
    first_features,
    stored_fields,
    stored_samples,
)

if TYPE_CHECKING:
    from nas.latency.prediction.work import Work

__all__ = ["LatencyPredictor", "Prediction"]

Array = NDArray[np.float64]

ENOUGH = 10
"""Samples below which nothing is trusted; ``ENOUGH_MOVED`` for a predictor moved from another device."""
ENOUGH_MOVED = 5
ENOUGH_FOR_LOGS = 20
"""Samples from which power laws are fitted beside prices."""

RANGE = 1.25
"""How far outside the range of its samples, as a factor, a feature may lie."""
FARTHEST = 2.0
"""Spread above which a model is too unlike the samples, whatever its single features."""
WORST = 0.30
"""Half-width of the interval in the midst of the samples, relative, above which no prediction is trusted."""
_MARGIN = 0.98
_FORMAT = 1
_EMPTY = "this predictor has no samples; call fit with at least ten measurements first"


@dataclass(frozen=True)
class Prediction:
    """A latency that was predicted.

    Attributes:
        median_ms: the median of what a measurement will give.
        low_ms, high_ms: the interval that a measurement falls into with the predictor's coverage (0.9 by default);
            0 and infinity where the samples are too few to tell.
        trusted: whether to act on it; ``why`` says why not, else it is empty.
        mean_ms: the mean of what measurements will give: above the median where disturbances only ever cost time.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    trusted: bool
    why: str
    mean_ms: float

    def to_dict(self) -> dict[str, Any]:
        """JSON form; no upper end is ``null``."""
        return {**asdict(self), "high_ms": self.high_ms if math.isfinite(self.high_ms) else None}


class LatencyPredictor:
    """Predicts milliseconds from counted work, under one identity of measurement.

    >>> predictor = LatencyPredictor().fit([{"constant": 1, "macs": m} for m in range(1, 13)], range(2, 14))
    >>> round(predictor.predict({"constant": 1, "macs": 7.5}).median_ms, 3)
    8.5

    From 10 samples on non-negative prices of work are fitted to relative error, from 20 on power laws beside them;
    the one with the least error on left-out samples is used. Fitting takes milliseconds to a second, so ``update`` fits
    anew.

    Args:
        identity: digest of the conditions of all its measurements (device, runtime, dtype, threads, ...); ``None``
            when the caller vouches for them. Work of another identity is refused.
        coverage: of the intervals, between 0.5 and 0.99.

    Attributes:
        model: name of the model in use (``prices``, ``log_ridge``, ``corrected``, or of a moved one ``affine``,
            ``power_law``, ``near``); empty before the first fit.
        errors: name of each model tried -> mean absolute relative error on left-out samples.
    """

    def __init__(self, *, identity: str | None = None, coverage: float = 0.9):
        must = "of a predictor must be between 0.5 and 0.99; 0.9 is usual"
        if not 0.5 <= finite_number(coverage, "coverage", must) <= 0.99:
            raise UserMistake(f"coverage={coverage!r} {must}")
        self.identity = identity
        self.coverage = coverage
        self.model = ""
        self.errors: dict[str, float] = {}
        self._names: tuple[str, ...] = ()
        self._rows: Array = np.empty((0, 0))
        self._ms: Array = np.empty(0)
        self._source: LatencyPredictor | None = None
        self._fitted: Model | None = None
        self._spread: Spread | None = None
        self._score = math.inf
        self._mean_ratio = 1.0

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._ms)

    @property
    def half_width(self) -> float:
        """Half-width of the interval in the midst of the samples, relative: 0.05 means +-5 %. Infinite: cannot tell."""
        return math.expm1(min(self._score, 50.0)) if math.isfinite(self._score) else math.inf

    def fit(
        self,
        work: Sequence[Work | Mapping[str, float]],
        milliseconds: Sequence[float],
        *,
        identity: str | None = None,
    ) -> LatencyPredictor:
        """Forget earlier samples and fit to these; returns itself.

        Args:
            work: of each model; all with the same features, none negative.
            milliseconds: measured, positive.
            identity: of these measurements; the predictor takes it over when it has none.

        Raises:
            UserMistake: no samples, unequal numbers, values out of range, other features or another identity.
        """
        check_identity(identity, self.identity)
        names = first_features(work)
        rows, ms = checked_samples(work, milliseconds, names)
        self._names, self._rows, self._ms = names, rows, ms
        self.identity = identity if self.identity is None else self.identity
        self._refit()
        return self

    def update(
        self,
        work: Sequence[Work | Mapping[str, float]],
        milliseconds: Sequence[float],
        *,
        identity: str | None = None,
    ) -> LatencyPredictor:
        """Add samples and fit again; returns itself.

        Raises:
            UserMistake: as ``fit``, or no identity of samples that come to those of a known one.
        """
        if not len(self):
            return self.fit(work, milliseconds, identity=identity)
        check_identity(identity, self.identity, joining=True)
        rows, ms = checked_samples(work, milliseconds, self._names)
        self._rows, self._ms = np.concatenate([self._rows, rows]), np.concatenate([self._ms, ms])
        self._refit()
        return self

    def predict(self, work: Work | Mapping[str, float], *, identity: str | None = None) -> Prediction:
        """Prediction of one model. Raises UserMistake before the first fit, for other features or another identity."""
        return self.predict_many([work], identity=identity)[0]

    def predict_many(
        self, work: Sequence[Work | Mapping[str, float]], *, identity: str | None = None
    ) -> list[Prediction]:
        """Predictions of several models; as ``predict``."""
        check_identity(identity, self.identity)
        if self._fitted is None:
            raise UserMistake(_EMPTY)
        if not work:
            return []
        rows = feature_matrix(work, self._names)
        medians = self._fitted.predict(self._extended(rows))
        spread = self._spread_at(rows, medians)
        widths = np.exp(np.minimum(self._score * spread, 300.0))
        found = []
        for row, median, width, far in zip(rows, medians, widths, spread, strict=True):
            why = self._doubt(row, float(far))
            low = float(median / width) if math.isfinite(self._score) else 0.0
            high = float(median * width) if math.isfinite(self._score) else math.inf
            found.append(Prediction(float(median), low, high, not why, why, float(median * self._mean_ratio)))
        return found

    def transfer(
        self,
        work: Sequence[Work | Mapping[str, float]],
        milliseconds: Sequence[float],
        *,
        identity: str | None = None,
    ) -> LatencyPredictor:
        """A predictor for another device from 5 to 10 samples on it and all that is known of this one.

        Three ways of leaning on this predictor are tried (its prediction plus a constant, a power law of it, new prices
        near its own) and from 10 samples on those of a predictor of its own.

        Args:
            work: of models measured on the other device, with this predictor's features.
            milliseconds: measured there.
            identity: of the measurements there.

        Raises:
            UserMistake: as ``fit``, or when this predictor has no samples.
        """
        if self._fitted is None:
            raise UserMistake("a predictor without samples cannot be moved to another device; fit it first")
        moved = LatencyPredictor(identity=identity, coverage=self.coverage)
        moved._source = self
        rows, ms = checked_samples(work, milliseconds, self._names)
        moved._names, moved._rows, moved._ms = self._names, rows, ms
        moved._refit()
        return moved

    def with_coverage(self, coverage: float) -> LatencyPredictor:
        """The same predictor with intervals of another coverage. Raises UserMistake outside of 0.5 to 0.99."""
        data = self.to_dict()
        return LatencyPredictor.from_dict({**data, "coverage": coverage})

    def to_dict(self) -> dict[str, Any]:
        """JSON form: the samples, from which everything else is computed."""
        return {
            "format": _FORMAT,
            "identity": self.identity,
            "coverage": self.coverage,
            "features": list(self._names),
            "samples": [[*map(float, row), float(ms)] for row, ms in zip(self._rows, self._ms, strict=True)],
            "source": None if self._source is None else self._source.to_dict(),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LatencyPredictor:
        """The inverse of ``to_dict``. Raises UserMistake when ``data`` is no predictor of this version."""
        stored_fields(data, ("format",), "a stored predictor")
        if data["format"] != _FORMAT:
            raise UserMistake(
                f"format {data['format']!r} of a stored predictor is unknown; {_FORMAT} can be read, fit it anew"
            )
        names, work, milliseconds = stored_samples(data)
        predictor = cls(identity=data["identity"], coverage=data["coverage"])
        if data["source"] is not None:
            predictor._source = cls.from_dict(data["source"])
        if work:
            predictor._rows, predictor._ms = checked_samples(work, milliseconds, names)
            predictor._names = names
            predictor._refit()
        return predictor

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as a sealed JSON record, whole or not at all. Raises nas.files.WriteFailed."""
        write_record(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LatencyPredictor:
        """Read it back and fit it. Raises nas.files.CorruptFile, OSError, or UserMistake for another version."""
        return cls.from_dict(read_record(path))

    def matrix(self, work: Sequence[Work | Mapping[str, float]]) -> Array:
        """Features of ``work`` in this predictor's order, (models, features). Raises UserMistake for other features."""
        return feature_matrix(work, self._names)

    def spread(self, work: Sequence[Work | Mapping[str, float]]) -> tuple[Array, Array, Spread]:
        """Matrix and milliseconds that a spread is taken of, and the spread itself; for the choice of samples."""
        if self._fitted is None or self._spread is None:
            raise UserMistake(_EMPTY)
        rows = feature_matrix(work, self._names)
        return rows, self._fitted.predict(self._extended(rows)), self._spread

    # What follows fits and judges.

    def _refit(self) -> None:
        # Matrices of ten columns: several threads of BLAS would cost more than they do, on cores that are measured.
        with threadpool_limits(1):
            self._fit_all()

    def _fit_all(self) -> None:
        features, fitters = self._extended(self._rows), self._fitters()
        if len(self) > 1:
            unseen = {name: left_out(fitter, features, self._ms) for name, fitter in fitters.items()}
        else:
            unseen = {name: np.full(1, math.inf) for name in fitters}
        self.errors = {name: float(np.abs(np.log(found / self._ms)).mean()) for name, found in unseen.items()}
        self.model = _best(self.errors)
        self._fitted = fitters[self.model](features, self._ms)
        self._spread = Spread.of(self._rows, self._ms)
        ratios = self._ms / unseen[self.model]
        if len(self) < 2:
            self._score, self._mean_ratio = math.inf, 1.0
            return
        # One wild ratio must not move the mean: at most half of a latency is believed to be disturbance.
        self._mean_ratio = float(np.clip(ratios, 0.5, 2.0).mean()) if len(self) >= ENOUGH else 1.0
        self._score = self._quantile(np.abs(np.log(ratios)))

    def _fitters(self) -> dict[str, Fitter]:
        """Models worth trying with so many samples, the simplest first."""
        own = slice(0, len(self._names))
        found: dict[str, Fitter] = {}
        if self._source is not None:
            column = len(self._names)
            prices = models.fit_prices(self._source._rows, self._source._ms).prices
            found["affine"] = _on(slice(column, column + 2), models.fit_prices)
            found["power_law"] = lambda features, ms: models.fit_power_law(features, ms, column)
            found["near"] = _on(own, lambda features, ms: models.fit_prices_near(features, ms, prices))
        if self._source is None or len(self) >= ENOUGH:
            found["prices"] = _on(own, models.fit_prices)
        if len(self) >= ENOUGH_FOR_LOGS:
            found["log_ridge"] = _on(own, models.fit_log_ridge)
            found["corrected"] = _on(own, models.fit_corrected)
        return found

    def _extended(self, rows: Array) -> Array:
        """Features for the models: of a moved predictor also the source's prediction and a constant."""
        if self._source is None:
            return rows
        assert self._source._fitted is not None  # transfer and from_dict see to it
        known = self._source._fitted.predict(self._source._extended(rows))
        return np.concatenate([rows, known[:, None], np.ones((len(rows), 1))], axis=1)

    def _spread_at(self, rows: Array, milliseconds: Array) -> Array:
        if self._source is not None:
            known = self._extended(rows)[:, len(self._names)]
            return self._source._spread_at(rows, known)
        assert self._spread is not None
        return self._spread(rows, milliseconds)

    def _quantile(self, errors: Array) -> float:
        if self._source is None:
            assert self._spread is not None
            return quantile(errors / self._spread.of_samples(self._rows, self._ms), self.coverage)
        known = self._extended(self._rows)[:, len(self._names)]
        scores = errors / self._source._spread_at(self._rows, known)
        own = quantile(scores, self.coverage)
        if math.isfinite(own):
            return own
        # Too few to tell on their own: errors are taken to be no smaller than on the device it comes from.
        return max(self._source._score, float(scores.max())) if len(self) >= ENOUGH_MOVED else math.inf

    def _doubt(self, row: Array, far: float) -> str:
        """Why a prediction is not to be trusted; empty when it is."""
        enough = ENOUGH if self._source is None else ENOUGH_MOVED
        if len(self) < enough:
            return f"only {len(self)} samples, {enough} are needed"
        if self._score > math.log1p(WORST):
            return f"it misses its own samples by up to {self.half_width:.0%} when they are left out"
        low, high = self._range()
        outside = np.flatnonzero((row > high * RANGE) | (row < low / RANGE))
        if len(outside):
            worst = int(outside[0])
            return f"{self._names[worst]}={row[worst]:g} lies outside of the samples' {low[worst]:g} to {high[worst]:g}"
        if far > FARTHEST:
            return (
                f"its mixture of work is unlike that of the samples (spread {far:.1f}, at most {FARTHEST:g})"
            )
        return ""

    def _range(self) -> tuple[Array, Array]:
        rows = self._rows
        if self._source is not None:
            rows = np.concatenate([rows, self._source._rows])
        return rows.min(0), rows.max(0)


def _on(columns: slice, fitter: Fitter) -> Fitter:
    """``fitter`` that sees only some columns."""

    def fit(features: Array, milliseconds: Array) -> Model:
        return _Narrow(columns, fitter(features[:, columns], milliseconds))

    return fit


@dataclass(frozen=True)
class _Narrow:
    columns: slice
    model: Model

    def predict(self, features: Array) -> Array:
        return self.model.predict(features[:, self.columns])


def _best(errors: Mapping[str, float]) -> str:
    """The model with the least error; a later one must beat those before it clearly, or chance would choose."""
    names = list(errors)
    best = names[0]
    for name in names[1:]:
        if errors[name] < _MARGIN * errors[best]:
            best = name
    return best

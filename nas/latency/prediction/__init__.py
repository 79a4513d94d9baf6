"""Prediction of latency from counted work, so that few models have to be measured.

``count_work`` needs torch; everything else works on plain features and does not import it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nas.latency.prediction.blocks import Block, blocks_of
from nas.latency.prediction.predictor import LatencyPredictor, Prediction
from nas.latency.prediction.samples import pooled_identity
from nas.latency.prediction.select import choose_samples, decide
from nas.latency.prediction.table import BlockTable

if TYPE_CHECKING:
    from nas.latency.prediction.work import Work, count_work

__all__ = [
    "Block",
    "BlockTable",
    "LatencyPredictor",
    "Prediction",
    "Work",
    "blocks_of",
    "choose_samples",
    "count_work",
    "decide",
    "pooled_identity",
]


def __getattr__(name: str) -> Any:
    if name in ("Work", "count_work"):
        from nas.latency.prediction import work

        return getattr(work, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

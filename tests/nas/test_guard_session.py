"""What a session shows by itself: the bounds, on figures of real sessions."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nas.latency.guard_session import DRIFT, LEAST_SPLITS, LEVEL_VISITS, RAW, unsteady


def shown(
    drift: float = 1.0, splits: int = 0, visits: int = 300, raw: tuple[float, ...] = (1.0, 1.02)
) -> list[str]:
    return unsteady(drift=drift, splits=splits, visits=visits, raw_over_corrected=raw)


@pytest.mark.parametrize(
    ("drift", "splits", "visits", "raw"),
    [
        (1.006, 4, 208, (1.007, 1.004, 1.008)),
        (1.016, 0, 12, (1.015,)),
        (1.014, 0, 17, (1.002,)),
        (0.978, 0, 23, (0.997,)),
        (0.989, 15, 355, (1.003, 1.038, 1.071)),  # beside half a busy core, and 2 % off
        (0.812, 19, 358, (1.01, 1.036, 1.117)),
        (1.155, 19, 349, (1.018, 1.05, 1.179)),
    ],
)
def test_good_sessions_are_trusted(drift: float, splits: int, visits: int, raw: tuple[float, ...]) -> None:
    assert shown(drift, splits, visits, raw) == []


@pytest.mark.parametrize(
    ("drift", "splits", "visits", "raw", "reasons"),
    [
        (
            0.744,
            2,
            34,
            (0.0789 / 0.0423,),
            [
                r"changed by -26% from the first third of the session to the last \(bound 1\.25 times\)",
                r"plain medians are 1\.87 times those of the quiet visits \(bound 1\.15\)",
            ],
        ),
        (1.06, 26, 337, (1.05, 1.06), [r"changed 26 times in 337 visits \(bound 1 in 18\)"]),
        (0.94, 23, 340, (1.05, 1.06), [r"changed 23 times in 340 visits"]),
        (1.319, 10, 154, (1.137, 1.192, 1.296), [r"\+32%", r"10 times", r"1\.19 times"]),
        (0.872, 17, 319, (1.166, 1.248, 1.377), [r"1\.25 times"]),
    ],
)
def test_bad_sessions_are_not(
    drift: float, splits: int, visits: int, raw: tuple[float, ...], reasons: list[str]
) -> None:
    found = shown(drift, splits, visits, raw)
    assert len(found) == len(reasons)
    for text, pattern in zip(found, reasons, strict=True):
        assert "\n" not in text
        assert re.search(pattern, text)


def test_bounds_are_inclusive_and_hold_both_ways() -> None:
    for factor, count in ((1.0, 0), (1.01, 1)):
        assert len(shown(DRIFT * factor)) == len(shown(1 / DRIFT / factor)) == count
        assert len(shown(raw=(RAW * factor,))) == len(shown(raw=(1 / RAW / factor,))) == count
    assert len(shown(math.nan)) == len(shown(raw=(math.nan,))) == 1


def test_one_model_of_many_says_nothing_of_the_session() -> None:
    assert shown(raw=(1.0, 1.01, 1.9)) == []
    assert len(shown(raw=(1.0, 1.3, 1.9))) == 1
    assert shown(raw=()) == []


def test_few_changes_say_nothing() -> None:
    assert shown(splits=LEAST_SPLITS - 1, visits=20) == []
    assert len(shown(splits=LEAST_SPLITS, visits=LEAST_SPLITS * LEVEL_VISITS - 1)) == 1
    assert shown(splits=LEAST_SPLITS, visits=LEAST_SPLITS * LEVEL_VISITS) == []


@given(
    drift=st.floats(1.0, 3.0),
    splits=st.integers(0, 60),
    visits=st.integers(1, 500),
    raw=st.floats(1.0, 3.0),
    by=st.floats(1.0, 3.0),
)
def test_worse_never_becomes_trusted(drift: float, splits: int, visits: int, raw: float, by: float) -> None:
    first = shown(drift, splits, visits, (raw,))
    assert len(shown(drift * by, splits, visits, (raw,))) >= len(first)
    assert len(shown(drift, round(splits * by), visits, (raw,))) >= len(first)
    assert len(shown(drift, splits, visits, (raw * by,))) >= len(first)

"""Choice, Int and Float by themselves."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spaces import Choice, Float, Int, Parameter, SpaceError


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Choice([]), "at least one value"),
        (lambda: Choice("abc"), "must be a list"),
        (lambda: Choice({"a", "b"}), "in an order that is kept"),  # type: ignore[arg-type]
        (lambda: Choice([1, 2, 1]), "must not repeat"),
        (lambda: Choice([0.0, -0.0]), "must not repeat"),
        (lambda: Choice([1, (2, 3)]), r"\(2, 3\) must be a finite number"),  # type: ignore[list-item]
        (lambda: Choice([math.nan]), "nan must be a finite number"),
        (lambda: Choice([1, 2], default=3), r"default=3 must be one of 1, 2"),
        (lambda: Choice([1, 2], default=True), "default=True"),
        (lambda: Int(3, 2), "high must not be below low"),
        (lambda: Int(1, 6, step=2), r"use high=5 or high=7"),
        (lambda: Int(1, 6, step=0), "step below 1"),
        (lambda: Int(1, 2.0), r"high=2\.0 must be an integer"),  # type: ignore[arg-type]
        (lambda: Int(False, 2), "low=False must be an integer"),
        (lambda: Int(1, 5, step=2, default=2), r"default=2 must be an integer from 1 to 5 in steps of 2"),
        (lambda: Float(1, 1), "low must be below high"),
        (lambda: Float(0, math.inf), "high=inf must be a finite number"),
        (lambda: Float(-1e308, 1e308), "finite distance"),
        (lambda: Float(0, 1, log=True), "low must be above 0"),
        (lambda: Float(0, 1, default=2), r"default=2 must be a number from 0\.0 to 1\.0"),
    ],
)
def test_wrong_declarations_are_refused(make: Callable[[], Parameter], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        make()


def test_defaults() -> None:
    assert Choice(["b", "a"]).default == "b"
    assert Choice(["b", None], default=None).default is None
    assert Int(4, 8, step=2).default == 4
    assert Float(1e-4, 1, log=True).default == pytest.approx(1e-2)
    assert Float(2, 4).default == 3


def test_numpy_scalars_are_python_scalars() -> None:
    choice = Choice(list(np.array([1, 2])))
    assert [type(value) for value in choice.values] == [int, int]
    assert type(choice.normalise(np.int64(2))) is int
    assert type(Int(0, 3).normalise(np.float32(2))) is int
    assert type(Float(0, 3).normalise(np.float32(2))) is float


def test_numbers_are_encoded_by_rank_and_flags_one_hot() -> None:
    assert [Choice([8, 2, 100.0]).encode(value) for value in (8, 2, 100.0)] == [[0.5], [0.0], [1.0]]
    assert Choice([7]).encode(7) == [0.0]
    assert [Choice([False, True]).encode(value) for value in (False, True)] == [[1.0, 0.0], [0.0, 1.0]]
    assert Int(5, 5).encode(5) == (0.0,)


def test_steps() -> None:
    assert Int(0, 9, step=3).near(0) == [3]
    assert Int(0, 9, step=3).near(6) == [3, 9]
    assert Choice(["a", "b", "c"]).near("b") == ["a", "c"]
    assert Float(0, 10).near(0.5) == pytest.approx([0, 1.5, 2.5])
    assert Float(0, 10).near(0.0) == pytest.approx([1, 2])
    assert Float(1, 1e10, log=True).near(1e5) == pytest.approx([1e3, 1e4, 1e6, 1e7])


PARAMETERS: list[Any] = [
    Choice([1, True, 1.0]),
    Choice([None, "x"]),
    Int(-4, 4, step=4),
    Int(0, 2**70),
    Float(-1, 1),
    Float(1e-8, 1e8, log=True),
]


@pytest.mark.parametrize("parameter", PARAMETERS, ids=repr)
@given(seed=st.integers(0, 2**32))
def test_drawn_values_are_allowed_and_redrawn_ones_differ(parameter: Parameter, seed: int) -> None:
    rng = random.Random(seed)
    value = parameter.draw(rng)
    other = parameter.redraw(value, rng)
    for each in (value, other, *parameter.near(value)):
        assert repr(parameter.normalise(each)) == repr(each)
        assert all(0 <= number <= 1 for number in parameter.encode(each))
        assert len(parameter.encode(each)) == len(parameter.columns("p"))
    assert repr(other) != repr(value)
    assert repr(value) not in map(repr, parameter.near(value))


def test_every_value_is_drawn_and_redrawn_about_equally_often() -> None:
    rng = random.Random(0)
    choice = Choice(list("abcd"))
    drawn = [choice.draw(rng) for _ in range(4000)]
    redrawn = [choice.redraw("b", rng) for _ in range(3000)]
    assert all(850 < drawn.count(value) < 1150 for value in "abcd")
    assert all(850 < redrawn.count(value) < 1150 for value in "acd")
    assert "b" not in redrawn

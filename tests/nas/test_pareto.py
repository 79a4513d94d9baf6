"""Fronts, ranks, crowding and hypervolume against definitions written out by brute force."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nas.errors import UserMistake
from nas.pareto import (
    Direction,
    crowding_distance,
    hypervolume_2d,
    non_dominated_sort,
    pareto_mask,
    to_losses,
)

NAN, INF = float("nan"), float("inf")


@st.composite
def populations(draw: st.DrawFn) -> tuple[list[list[float]], list[Direction]]:
    """Few different numbers, so that ties and equal rows are common."""
    objectives = draw(st.integers(1, 4))
    number = st.integers(-3, 3).map(float) | st.sampled_from([INF, -INF, NAN, -0.0])
    rows = draw(st.lists(st.lists(number, min_size=objectives, max_size=objectives), max_size=25))
    directions: list[Direction] = ["minimize", "maximize"]
    return rows, draw(st.lists(st.sampled_from(directions), min_size=objectives, max_size=objectives))


def dominates(a: Sequence[float], b: Sequence[float], directions: Sequence[Direction]) -> bool:
    pairs = [(x, y) if d == "minimize" else (y, x) for x, y, d in zip(a, b, directions, strict=True)]
    return all(x <= y for x, y in pairs) and any(x < y for x, y in pairs)


def brute_force_ranks(rows: Sequence[Sequence[float]], directions: Sequence[Direction]) -> list[int]:
    left = {i for i, row in enumerate(rows) if not any(math.isnan(x) for x in row)}
    ranks, rank = [-1] * len(rows), 0
    while left:
        front = {i for i in left if not any(dominates(rows[j], rows[i], directions) for j in left)}
        for i in front:
            ranks[i] = rank
        left, rank = left - front, rank + 1
    return [rank if r == -1 else r for r in ranks]


@given(populations())
def test_ranks_are_those_of_the_definition(population: tuple[list[list[float]], list[Direction]]) -> None:
    rows, directions = population
    assert non_dominated_sort(rows, directions).tolist() == brute_force_ranks(rows, directions)


@given(populations())
def test_front_is_that_of_the_definition(population: tuple[list[list[float]], list[Direction]]) -> None:
    rows, directions = population
    comparable = [not any(math.isnan(x) for x in row) for row in rows]
    expected = [
        ok and not any(dominates(other, row, directions) for other in rows)
        for row, ok in zip(rows, comparable, strict=True)
    ]
    assert pareto_mask(rows, directions).tolist() == expected


@pytest.mark.parametrize("objectives", [1, 2, 3])
def test_front_and_rank_zero_agree_on_many_rows(objectives: int) -> None:
    rows = np.random.default_rng(objectives).normal(size=(3000, objectives))
    directions: list[Direction] = ["maximize"] * objectives
    np.testing.assert_array_equal(pareto_mask(rows, directions), non_dominated_sort(rows, directions) == 0)


def test_crowding_of_a_front_by_hand() -> None:
    rows = [[0.0, 10.0], [1.0, 6.0], [3.0, 5.0], [4.0, 0.0]]
    expected = [INF, 3 / 4 + 5 / 10, 3 / 4 + 6 / 10, INF]
    assert crowding_distance(rows, ["minimize", "minimize"]).tolist() == pytest.approx(expected)
    mirrored = [[-a, b] for a, b in rows]
    assert crowding_distance(mirrored, ["maximize", "minimize"]).tolist() == pytest.approx(expected)


def test_crowding_compares_within_a_rank_only() -> None:
    first, second = [[0.0, 4.0], [1.0, 1.0], [4.0, 0.0]], [[5.0, 9.0], [6.0, 6.0], [9.0, 5.0]]
    directions: list[Direction] = ["minimize", "minimize"]
    ranks = non_dominated_sort(first + second, directions)
    assert ranks.tolist() == [0, 0, 0, 1, 1, 1]
    assert crowding_distance(first + second, directions, ranks).tolist() == [INF, 2.0, INF, INF, 2.0, INF]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], []),
        ([[1.0, 1.0]], [INF]),
        ([[1.0, 1.0]] * 3, [INF, 0.0, INF]),
        ([[NAN, 1.0], [1.0, 2.0]], [0.0, INF]),
    ],
)
def test_crowding_of_degenerate_fronts(rows: list[list[float]], expected: list[float]) -> None:
    assert crowding_distance(rows, ["minimize", "maximize"]).tolist() == expected


@pytest.mark.parametrize(
    ("rows", "area"),
    [
        ([], 0.0),
        ([[1.0, 1.0]], 9 * 9),
        ([[1.0, 1.0], [1.0, 1.0]], 9 * 9),
        ([[0.0, 5.0], [5.0, 0.0]], 10 * 5 + 5 * 5),
        ([[0.0, 5.0], [5.0, 0.0], [6.0, 6.0]], 10 * 5 + 5 * 5),
        ([[0.0, 5.0], [5.0, 0.0], [2.0, 2.0]], 10 * 5 + 8 * 3 + 5 * 2),
        ([[10.0, 0.0], [0.0, 10.0], [11.0, -5.0], [NAN, 0.0]], 0.0),
    ],
)
def test_hypervolume_by_hand(rows: list[list[float]], area: float) -> None:
    assert hypervolume_2d(rows, [10, 10], ["minimize", "minimize"]) == pytest.approx(area)
    turned = [[-a, b] for a, b in rows]
    assert hypervolume_2d(turned, [-10, 10], ["maximize", "minimize"]) == pytest.approx(area)


def test_hypervolume_counts_the_cells_that_are_dominated() -> None:
    rows = np.random.default_rng(0).integers(0, 20, size=(12, 2))
    grid = np.stack(np.meshgrid(np.arange(20), np.arange(20)), axis=-1).reshape(-1, 1, 2)
    dominated = (rows[None] <= grid).all(axis=-1).any(axis=-1)
    assert hypervolume_2d(rows, [20, 20], ["minimize", "minimize"]) == dominated.sum()


def test_hypervolume_of_an_unbounded_outcome_is_infinite() -> None:
    assert hypervolume_2d([[-INF, 0.0]], [1, 1], ["minimize", "minimize"]) == INF


@pytest.mark.parametrize(
    ("values", "directions", "message"),
    [
        ([[1.0, 2.0]], ["minimize"], r"values has shape \(1, 2\); \(n, 1\) is needed for 1 direction"),
        ([1.0, 2.0], ["minimize"], r"values has shape \(2,\)"),
        ([[1.0]], ["smaller"], "directions holds 'smaller'; allowed: 'maximize', 'minimize'"),
        ([[1.0]], [], "must be a non-empty sequence"),
    ],
)
def test_wrong_arguments_are_refused(
    values: npt.ArrayLike, directions: list[Direction], message: str
) -> None:
    for function in (pareto_mask, non_dominated_sort, crowding_distance, to_losses):
        with pytest.raises(UserMistake, match=message):
            function(values, directions)


def test_hypervolume_needs_two_objectives() -> None:
    with pytest.raises(UserMistake, match="two directions and a reference of two numbers, not 3 and 2"):
        hypervolume_2d([[1.0, 1.0, 1.0]], [0, 0], ["minimize"] * 3)


def test_values_of_the_caller_are_left_alone() -> None:
    values = np.array([[1.0, 2.0], [3.0, 4.0]])
    pareto_mask(values, ["maximize", "maximize"])
    assert values.tolist() == [[1.0, 2.0], [3.0, 4.0]]

"""Exact cardinality and enumeration."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given

from spaces import Choice, Constraint, Int, SearchSpace, SpaceError
from tests.spaces.examples import cell, layered
from tests.spaces.random_spaces import RandomSpace, random_spaces


@given(random_spaces())
def test_cardinality_and_enumeration_agree_with_brute_force(made: RandomSpace) -> None:
    listed = [made.space.to_json(architecture) for architecture in made.space.enumerate()]
    assert len(listed) == len(set(listed))
    assert set(listed) == made.expected
    assert made.space.cardinality() == len(made.expected)


def test_cardinality_of_the_layered_space_is_its_closed_form() -> None:
    assert layered().cardinality() == 428402028846790283203125 == 3 * (45**12 + 45**13 + 45**14)


def test_cardinality_of_a_chain_of_conditions() -> None:
    parameters: dict[str, Any] = {"p0": Choice([0, 1])}
    for i in range(1, 200):

        def when(a: Mapping[str, Any], before: str = f"p{i - 1}") -> bool:
            return a.get(before) == 1

        parameters[f"p{i}"] = Choice([0, 1], when=when)
    assert SearchSpace("chain", parameters).cardinality() == 201


def test_cardinality_learns_what_only_rare_architectures_read() -> None:
    rare = [Choice(list(range(20))) for _ in range(3)]
    space = SearchSpace(
        "rare",
        {
            "a": rare[0],
            "b": rare[1],
            "c": rare[2],
            "d": Choice([0, 1], when=lambda v: v["a"] == 19 and v["b"] == 19 and v["c"] == 19),
        },
    )
    assert space.cardinality() == 20**3 + 1


def test_a_constraint_that_rarely_reads_all_it_can_is_met_everywhere() -> None:
    law = Constraint("rare", lambda v: v["a"] != 1999 or v["b"] == 1, "b must be 1 at the end")
    space = SearchSpace("late", {"a": Int(0, 1999), "b": Choice([0, 1])}, constraints=[law])
    assert [a for a in space.enumerate() if a["a"] == 1999] == [{"a": 1999, "b": 1}]
    assert space.cardinality() == 3999


def test_cardinality_with_a_float_is_infinite() -> None:
    assert cell().cardinality() == math.inf
    with pytest.raises(SpaceError, match=r"'dropout' is a Float"):
        cell().enumerate()


def test_cardinality_of_constraints_per_layer_and_of_a_wide_int() -> None:
    laws = [
        Constraint(f"law{i}", lambda a, i=i: a[f"w{i}"] % a[f"h{i}"] == 0, "divisible")  # type: ignore[misc]
        for i in range(12)
    ]
    parameters = {f"{kind}{i}": Choice([4, 6, 9]) for i in range(12) for kind in "wh"}
    space = SearchSpace("laws", {**parameters, "big": Int(0, 10**30 - 1)}, constraints=laws)
    assert space.cardinality() == 3**12 * 10**30


def test_cardinality_refuses_what_ties_too_much_together() -> None:
    parameters = {f"p{i}": Choice(list(range(8))) for i in range(12)}
    law = Constraint("sum", lambda a: hash(tuple(a.values())) % 3 == 0, "no structure to count by")
    with pytest.raises(SpaceError, match=r"more than 1,000,000 states.*'p0', 'p1'.*split them"):
        SearchSpace("tied", parameters, constraints=[law]).cardinality()

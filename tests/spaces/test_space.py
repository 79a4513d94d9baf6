"""SearchSpace: canonical form, errors, what conditions may read, encoding, fingerprint."""

from __future__ import annotations

import doctest
import json
import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import spaces.space
from spaces import ArchitectureError, Choice, Constraint, ImageSignature, Int, SearchSpace, SpaceError
from tests.conformance.space import SpaceConformance
from tests.spaces.examples import cell, constrained, layered


class TestCell(SpaceConformance):
    @pytest.fixture
    def space(self) -> SearchSpace:
        return cell()


class TestLayered(SpaceConformance):
    @pytest.fixture
    def space(self) -> SearchSpace:
        return layered()


class TestConstrained(SpaceConformance):
    @pytest.fixture
    def space(self) -> SearchSpace:
        return constrained()


class TestSinglePoint(SpaceConformance):
    @pytest.fixture
    def space(self) -> SearchSpace:
        return SearchSpace(
            "point", {"a": Choice([None]), "b": Int(3, 3), "c": Choice([1], when=lambda a: False)}
        )


# -- canonical form and errors


def test_canonical_normalises_values_and_drops_inactive_ones() -> None:
    space = cell()
    given_ = {
        "rate": np.float64(0.01),
        "depth": 2.0,
        "dropout": -0.0,
        "layer3.op": "no check here",
        "edge0": "pool",
    }
    canonical = space.canonical(given_)
    assert json.dumps(canonical) == '{"edge0": "pool", "depth": 2, "dropout": 0.0, "rate": 0.01}'
    assert type(canonical["depth"]) is int
    assert space.key(given_) == space.key({"edge0": "pool", "depth": 2, "dropout": 0.0, "rate": 0.01})
    assert space.active(given_) == ["edge0", "depth", "dropout", "rate"]


def test_values_are_compared_by_type() -> None:
    space = SearchSpace("types", {"a": Choice([1, True, 1.0, "1", None])})
    keys = {space.key({"a": value}) for value in (1, True, 1.0, "1", None)}
    assert len(keys) == 5
    assert type(space.canonical({"a": np.int64(1)})["a"]) is int
    with pytest.raises(ArchitectureError, match=r"'a' is False; it must be one of 1, True, 1\.0"):
        space.validate({"a": False})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"depth": 9}, r"'cell': parameter 'depth' is 9; it must be an integer from 1 to 6"),
        ({"depth": True}, r"'depth' is True; it must be an integer"),
        ({"depth": 1.5}, r"'depth' is 1\.5"),
        ({"depth": math.inf}, r"'depth' is inf"),
        ({"edge0": "convv"}, r"'edge0' is 'convv'; it must be one of .* \(did you mean 'conv'\?\)"),
        ({"edge0": ["conv"]}, r"'edge0' is \['conv'\]"),
        ({"dropout": math.nan}, r"'dropout' is nan; it must be a number from 0\.0 to 0\.5"),
        ({"dropout": "0.1"}, r"'dropout' is '0\.1'"),
        (
            {"layer3.opp": "mlp"},
            r"no parameter 'layer3.opp' \(did you mean 'layer3.op'\?\); it has 'edge0', ",
        ),
        ({"depth": 5}, r"parameter 'layer3.op' is missing; it must be one of 'attention', 'mlp'"),
        ({1: 2}, r"no parameter 1; it has"),
    ],
)
def test_validate_names_parameter_value_and_what_is_allowed(change: dict[Any, Any], message: str) -> None:
    space = cell()
    with pytest.raises(ArchitectureError, match=message) as caught:
        space.validate({**space.published["plain"], **change})
    assert "\n" not in str(caught.value)


def test_broken_constraints_are_named_with_the_values_they_read() -> None:
    with pytest.raises(
        ArchitectureError, match=r"'divisible' is not met \(width=8, heads=3\): width must be a mult"
    ):
        constrained().validate({"width": 8, "heads": 3, "depth": 3})


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"depth": NaN}', "[" * 100_000])
def test_from_json_refuses_what_is_not_an_architecture(text: str) -> None:
    with pytest.raises(ArchitectureError, match="search space 'cell'"):
        cell().from_json(text)


# -- what conditions and constraints may read


def two(when: Any, law: Any = None) -> SearchSpace:
    return SearchSpace(
        "two",
        {
            "first": Choice([0, 1]),
            "second": Choice([0, 1], when=lambda a: a["first"] == 1),
            "third": Int(0, 1, when=when),
        },
        constraints=[Constraint("law", law, "a law")] if law else [],
    )


@pytest.mark.parametrize(
    ("when", "message"),
    [
        (
            lambda a: a["frist"],
            r"condition of parameter 'third' reads 'frist', which is not a parameter \(did you mean",
        ),
        (lambda a: a.get("frist"), r"'third' reads 'frist'"),
        (lambda a: "frist" in a, r"'third' reads 'frist'"),
        (lambda a: a["third"], r"'third' reads 'third', which is not declared before it"),
        (
            lambda a: a["second"],
            r"'third' reads 'second' where it is inactive; read it with \.get\('second'\)",
        ),
        (lambda a: a["first"] / 0, r"condition of parameter 'third' raised ZeroDivisionError"),
    ],
)
def test_wrong_conditions_are_refused_at_construction(when: Any, message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        two(when)


def test_a_condition_may_not_look_ahead() -> None:
    later = {"a": Choice([0, 1], when=lambda v: v["b"] == 1), "b": Choice([0, 1])}
    with pytest.raises(
        SpaceError, match=r"'a' reads 'b', which is not declared before it; declare 'b' before 'a'"
    ):
        SearchSpace("later", later)


@pytest.mark.parametrize("seed", range(4))
def test_a_mistake_that_the_default_does_not_reach_is_found_at_first_use(seed: int) -> None:
    space = two(lambda a: a["first"] == 1 and a["frist"])
    with pytest.raises(SpaceError, match=r"'third' reads 'frist'"):
        space.validate({"first": 1, "second": 0})
    with pytest.raises(SpaceError, match=r"'third' reads 'frist'"):
        space.cardinality()


def test_constraints_are_checked_like_conditions() -> None:
    with pytest.raises(SpaceError, match=r"constraint 'law' reads 'fourth', which is not a parameter"):
        two(None, lambda a: a["fourth"])
    with pytest.raises(SpaceError, match=r"constraint 'law' reads 'second' where it is inactive"):
        two(None, lambda a: a["second"] == 0)


def test_inactive_parameters_can_be_asked_for() -> None:
    space = two(lambda a: a.get("second", 1) == 1 and ("second" in a) == (a["first"] == 1))
    assert [space.to_json(a) for a in space.enumerate()] == [
        '{"first": 0, "third": 0}',
        '{"first": 0, "third": 1}',
        '{"first": 1, "second": 0}',
        '{"first": 1, "second": 1, "third": 0}',
        '{"first": 1, "second": 1, "third": 1}',
    ]


# -- encoding, fingerprint, building


def test_encoding_of_each_kind_of_parameter() -> None:
    space = cell()
    assert space.encoding_names == [
        'edge0="conv"', 'edge0="pool"', "edge0=null", "depth", 'layer3.op="attention"', 'layer3.op="mlp"',
        "layer3.op.active", "layer3.heads", "layer3.heads.active", "dropout", "rate", "rate.active",
    ]  # fmt: skip
    deep = {
        "edge0": "pool",
        "depth": 6,
        "layer3.op": "attention",
        "layer3.heads": 4,
        "dropout": 0.25,
        "rate": 1e-3,
    }
    assert space.encode(deep) == pytest.approx([0, 1, 0, 1, 1, 0, 1, 0.5, 1, 0.5, 1 / 3, 1])
    flat = {"edge0": None, "depth": 2, "dropout": 0.5}
    assert space.encode(flat) == pytest.approx([0, 0, 1, 0.2, 0, 0, 0, 0, 0, 1, 0, 0])


def variants() -> Iterator[SearchSpace]:
    def make(second: Choice, *laws: Constraint, name: str = "b") -> SearchSpace:
        return SearchSpace("s", {"a": Int(0, 9), name: second}, constraints=laws)

    yield make(Choice([1, 2]))
    yield make(Choice([1, 2]), name="c")
    yield make(Choice([1, 2, 3]))
    yield make(Choice([1, 2.0]))
    yield make(Choice([1, 2], when=lambda a: a["a"] > 3))
    yield make(Choice([1, 2], when=lambda a: a["a"] > 4))
    yield make(Choice([1, 2]), Constraint("law", lambda a: a["a"] + a["b"] < 10, ""))
    yield make(Choice([1, 2]), Constraint("law", lambda a: a["a"] + a["b"] < 11, ""))


def test_fingerprint_tells_spaces_apart() -> None:
    prints = [space.fingerprint() for space in variants()]
    assert prints == [space.fingerprint() for space in variants()]
    assert len(set(prints)) == len(prints)


def test_build_gets_the_canonical_architecture_and_the_signature() -> None:
    calls: list[Any] = []
    space = SearchSpace("b", {"depth": Int(1, 3)}, build=lambda *given: calls.append(given))  # type: ignore[arg-type]
    signature = ImageSignature(channels=1, height=8, width=8, classes=10)
    space.build({"depth": 2.0}, signature)
    assert calls == [({"depth": 2}, signature)]
    with pytest.raises(SpaceError, match="search space 'cell' has no builder"):
        cell().build(cell().published["plain"], signature)


@pytest.mark.parametrize("rate", [0, -1, 1.1, math.nan])
def test_mutate_refuses_a_rate_that_is_no_probability(rate: float) -> None:
    with pytest.raises(SpaceError, match="rate="):
        cell().mutate(cell().published["plain"], random.Random(0), rate=rate)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"parameters": {}}, "parameters must be a non-empty dict"),
        ({"parameters": {"a": [1, 2]}}, r"parameter 'a' is \[1, 2\]; it must be a Choice, Int or Float"),
        ({"parameters": {"": Int(0, 1)}}, "its name must be a string"),
        ({"name": ""}, "name=''"),
        ({"published": {"x": {"a": 7}}}, r"published architecture 'x' is not in its space: .*'a' is 7"),
        ({"published": {"tiny": {"a": 1}}, "baseline": "tinny"}, r"baseline='tinny' .*did you mean 'tiny'"),
        (
            {"constraints": [Constraint("x", bool, ""), Constraint("x", bool, "")]},
            "two constraints are called 'x'",
        ),
    ],
)
def test_wrong_declarations_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        SearchSpace(**{"name": "s", "parameters": {"a": Int(0, 1)}, **arguments})


def test_the_example_of_the_docstring_runs() -> None:
    result = doctest.testmod(spaces.space)
    assert result.attempted > 0
    assert result.failed == 0

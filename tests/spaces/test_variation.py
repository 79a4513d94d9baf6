"""Sampling, mutation, crossover, neighbours, and the search for what is unseen."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spaces import ArchitectureError, Choice, Constraint, Float, Int, SearchSpace, SpaceError
from tests.spaces.examples import cell, constrained, layered
from tests.spaces.random_spaces import RandomSpace, random_spaces

SEEDS = st.integers(0, 2**32)


@given(random_spaces(), SEEDS)
def test_sample_unseen_exhausts_a_space_without_repetition(made: RandomSpace, seed: int) -> None:
    rng = random.Random(seed)
    seen: set[str] = set()
    found: set[str] = set()
    while (architecture := made.space.sample_unseen(seen, rng)) is not None:
        found.add(made.space.to_json(architecture))
        seen.add(made.space.key(architecture))
        assert len(found) == len(seen)
    assert found == made.expected


@given(random_spaces(), SEEDS)
def test_sampling_and_variation_stay_inside(made: RandomSpace, seed: int) -> None:
    space, rng = made.space, random.Random(seed)
    if not made.expected:
        with pytest.raises(SpaceError, match="law"):
            space.sample(rng)
        return
    a, b = space.sample(rng), space.sample(rng)
    assert space.to_json(a) in made.expected
    assert space.to_json(space.crossover(a, b, rng)) in made.expected
    for rate in (None, 0.3, 1.0):
        child = space.to_json(space.mutate(a, rng, rate=rate))
        assert child in made.expected
        assert (child != space.to_json(a)) == (len(made.expected) > 1)


@given(random_spaces(), SEEDS)
def test_neighbors_are_exactly_those_one_decision_away(made: RandomSpace, seed: int) -> None:
    space = made.space
    if not made.expected:
        return
    center = space.sample(random.Random(seed))
    near = {space.to_json(architecture) for architecture in space.neighbors(center)}
    assert len(near) == len(space.neighbors(center))
    expected = set()
    defaults = {name: parameter.default for name, parameter in space.parameters.items()}
    for name in center:
        parameter = space.parameters[name]
        for index in range(parameter.size or 0):
            value = parameter.at(index)
            step = parameter.step if isinstance(parameter, Int) else None
            if step is not None and abs(value - center[name]) != step:  # type: ignore[operator]
                continue
            try:
                expected.add(space.to_json({**defaults, **center, name: value}))
            except ArchitectureError:  # a constraint forbids it
                continue
    assert near == expected - {space.to_json(center)}


@given(random_spaces(constrained=False), SEEDS)
def test_mutation_redraws_exactly_one_decision(made: RandomSpace, seed: int) -> None:
    space, rng = made.space, random.Random(seed)
    parent = space.sample(rng)
    child = space.mutate(parent, rng)
    shared = [name for name in parent if name in child]
    changed = [name for name in shared if json.dumps(parent[name]) != json.dumps(child[name])]
    assert len(changed) == (len(made.expected) > 1)


def test_mutation_draws_what_becomes_active_and_neighbors_take_defaults() -> None:
    space = SearchSpace(
        "switch",
        {"on": Choice([False, True]), "op": Choice(list("abcd"), default="c", when=lambda a: a["on"])},
    )
    rng = random.Random(0)
    assert {space.mutate({"on": False}, rng)["op"] for _ in range(60)} == set("abcd")
    assert space.neighbors({"on": False}) == [{"on": True, "op": "c"}]


@pytest.mark.parametrize("seed", range(6))
def test_mutation_changes_one_decision_where_constraints_leave_few(seed: int) -> None:
    laws = [
        Constraint("few a", lambda v: v["a"] in (0, 999), "0 or 999"),
        Constraint("few b", lambda v: v["b"] in (0, 777), "0 or 777"),
    ]
    space = SearchSpace("few", {key: Choice(list(range(2000))) for key in "ab"}, constraints=laws)
    child = space.mutate({"a": 0, "b": 0}, random.Random(seed))
    assert child in ({"a": 999, "b": 0}, {"a": 0, "b": 777})


def test_sample_finds_the_few_that_meet_the_constraints() -> None:
    parameters = {f"p{i}": Choice(list(range(10))) for i in range(12)}
    laws = [
        Constraint(f"same{i}", lambda a, i=i: a[f"p{i}"] == a[f"p{i + 1}"], "equal to the next")  # type: ignore[misc]
        for i in range(11)
    ]
    space = SearchSpace("same", parameters, constraints=laws)
    rng = random.Random(0)
    first = space.sample(rng)
    assert len(set(first.values())) == 1
    assert space.cardinality() == 10
    assert len({space.key(space.sample(rng)) for _ in range(60)}) == 10
    assert len({*space.mutate(first, rng).values(), *first.values()}) == 2


def test_sample_names_the_constraint_that_nobody_meets() -> None:
    laws = [
        Constraint("sometimes", lambda a: a["a"] < 500, "a small a"),
        Constraint("never", lambda a: a["a"] + a["b"] < 0, "a negative sum"),
    ]
    space = SearchSpace("none", {"a": Int(0, 999), "b": Int(0, 999)}, constraints=laws)
    with pytest.raises(SpaceError, match=r"constraint 'never' \(a negative sum\) was met by 0 of"):
        space.sample(random.Random(0))


class CountingContainer:
    def __init__(self, keys: set[str]) -> None:
        self.keys = keys
        self.asked: list[str] = []

    def __contains__(self, key: object) -> bool:
        self.asked.append(str(key))
        return key in self.keys


@given(SEEDS)
def test_sample_unseen_looks_at_no_more_than_seen_plus_one(seed: int) -> None:
    space = SearchSpace("grid", {f"p{i}": Choice([0, 1, 2]) for i in range(4)})
    keys = [space.key(architecture) for architecture in space.enumerate()]
    left = random.Random(seed).choice(keys)
    seen = CountingContainer(set(keys) - {left})
    found = space.sample_unseen(seen, random.Random(seed))
    assert found is not None
    assert space.key(found) == left
    assert len(seen.asked) == len(set(seen.asked)) <= len(keys)
    assert space.sample_unseen(set(keys), random.Random(seed)) is None


def test_sample_unseen_in_a_continuum() -> None:
    space = SearchSpace(
        "mixed", {"kind": Choice(["off", "on"]), "x": Float(0, 1, when=lambda a: a["kind"] == "on")}
    )
    seen = {space.key({"kind": "off"})}
    for seed in range(20):
        found = space.sample_unseen(seen, random.Random(seed))
        assert found is not None
        assert found["kind"] == "on"

    class Everything:
        def __contains__(self, key: object) -> bool:
            return True

    assert space.sample_unseen(Everything(), random.Random(0)) is None


def trace() -> str:
    """What one generator makes of several spaces."""
    rng = random.Random(3)
    told: list[Any] = []
    for space in (cell(), layered(), constrained()):
        a, b = space.sample(rng), space.sample(rng)
        told += [a, b, space.mutate(a, rng), space.mutate(a, rng, rate=0.2), space.crossover(a, b, rng)]
        told += [space.sample_unseen({space.key(a)}, rng), space.key(a), space.fingerprint()]
    return json.dumps(told)


def test_everything_is_the_same_in_another_process() -> None:
    other = subprocess.run(
        [sys.executable, "-c", "from tests.spaces.test_variation import trace; print(trace())"],
        env={**os.environ, "PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.strip() == trace()

"""Every registered controller meets the conformance suite; what each promises beyond that is tested here."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest

from nas.controllers import Controller, list_controllers, make_controller, register_controller
from nas.controllers.optuna import TPE, _refined
from nas.errors import UnknownNameError, UserMistake
from nas.pareto import Direction, hypervolume_2d
from spaces import Architecture, Choice, Float, Int, SearchSpace
from tests.conformance.controller import (
    DIRECTIONS,
    SPACES,
    ControllerConformance,
    MakeController,
    outcome,
    play,
)

# NNI's tuners need an extra: test_controllers_nni.py
CONTROLLERS = [name for name in list_controllers() if not name.startswith("nni:")]
LEARNERS = [name for name in CONTROLLERS if name != "random"]


class TestRegistered(ControllerConformance):
    @pytest.fixture(params=CONTROLLERS)
    def make(self, request: pytest.FixtureRequest) -> MakeController:
        name = request.param

        def make(space: SearchSpace, directions: Sequence[Direction], seed: int) -> Controller:
            return make_controller(name, space, directions, seed)

        return make


def test_the_controllers_of_the_first_release_are_there() -> None:
    assert {"random", "evolution", "local_search", "nsga2", "tpe"} <= set(list_controllers())


def test_unknown_name_gets_a_suggestion() -> None:
    with pytest.raises(
        UnknownNameError, match=r"unknown controller 'evolutoin' \(did you mean 'evolution'\?\)"
    ):
        make_controller("evolutoin", SPACES["flat"](), ["minimize"])


def test_a_name_belongs_to_one_class() -> None:
    with pytest.raises(ValueError, match="controller 'tpe' is registered twice"):

        @register_controller("tpe")
        class Another(Controller):
            pass


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "evolution",
            {"populatoin": 5},
            r"no option 'populatoin' \(did you mean 'population'\?\); options: ",
        ),
        ("random", {"population": 5}, "has no option 'population'; options: none"),
        (
            "evolution",
            {"population": 1},
            "population=1 of controller 'evolution' must be a whole number of at least 2",
        ),
        ("evolution", {"population": 5.0}, "population=5.0 .* whole number"),
        ("evolution", {"population": True}, "population=True .* whole number"),
        ("evolution", {"population": 8, "initial": 8}, "tournament=10 .* must not exceed population=8"),
        ("evolution", {"population": 8}, "initial=20 .* must not exceed population=8"),
        ("evolution", {"initial": 0}, "initial=0 .* at least 1"),
        (
            "evolution",
            {"crossover_probability": 1.5},
            "crossover_probability=1.5 .* must be a number from 0 to 1",
        ),
        ("evolution", {"mutation_rate": 0}, "mutation_rate=0 .* must be a number above 0 and at most 1"),
        ("evolution", {"mutation_rate": float("nan")}, "mutation_rate=nan .* must be a number"),
        ("local_search", {"starts": 0}, "starts=0 .* at least 1"),
        ("nsga2", {"population": "20"}, "population='20' .* whole number"),
        ("nsga2", {"crossover_probability": None}, "crossover_probability=None .* from 0 to 1"),
        ("tpe", {"startup": 1}, "startup=1 .* at least 2"),
        ("tpe", {"candidates": 0}, "candidates=0 .* at least 1"),
        ("tpe", {"history": 39}, "history=39 .* at least 40"),
    ],
)
def test_wrong_options_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserMistake, match=message):
        make_controller(name, SPACES["flat"](), ["minimize"], **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("evolution", {"population": 8, "initial": 4, "tournament": 8, "mutation_rate": 0.3}),
        ("evolution", {"crossover_probability": 1.0}),
        ("local_search", {"starts": 1}),
        ("nsga2", {"population": 2, "crossover_probability": 0.0, "mutation_rate": 1.0}),
        ("tpe", {"startup": 2, "candidates": 1, "history": 40}),
    ],
)
def test_replay_is_exact_with_other_options(name: str, options: dict[str, Any]) -> None:
    space, history = SPACES["conditional"](), list[Any]()
    uninterrupted = make_controller(name, space, DIRECTIONS["two"], 0, **options)
    play(uninterrupted, 50, fail_every=9, history=history)
    rebuilt = make_controller(name, space, DIRECTIONS["two"], 0, **options)
    for architecture, values in history:
        rebuilt.tell(architecture, values)
    assert play(rebuilt, 20) == play(uninterrupted, 20)


@pytest.mark.parametrize("name", CONTROLLERS)
def test_replay_is_exact_in_a_nearly_exhausted_space(name: str) -> None:
    space = SearchSpace("small", {f"edge{i}": Choice([0, 1, 2]) for i in range(4)})
    history: list[Any] = []
    uninterrupted = make_controller(name, space, ["minimize"], 0)
    play(uninterrupted, 60, history=history)
    rebuilt = make_controller(name, space, ["minimize"], 0)
    for architecture, values in history:
        rebuilt.tell(architecture, values)
    asked = play(uninterrupted, 21)
    assert play(rebuilt, 21) == asked
    assert len({space.key(a) for a in asked} | {space.key(a) for a, _ in history}) == 81


SCRIPT = """
import json, sys
from nas.controllers import list_controllers, make_controller
from tests.conformance.controller import DIRECTIONS, SPACES, play
asked = {}
for name in list_controllers():
    if name.startswith("nni:"):
        continue
    for space in SPACES.values():
        controller = make_controller(name, space(), DIRECTIONS["two"], 5)
        asked[f"{name} {controller.space.name}"] = play(controller, 25, fail_every=6)
heavy = [name for name in ("torch", "torchvision", "timm", "matplotlib") if name in sys.modules]
print(json.dumps({"asked": asked, "heavy": heavy}))
"""


def run_in_another_process(hash_seed: str) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_other_processes_get_the_same_and_need_no_torch() -> None:
    first, second = (run_in_another_process(seed) for seed in ("1", "2"))
    assert first["heavy"] == []
    assert first["asked"] == second["asked"]
    here = play(make_controller("tpe", SPACES["conditional"](), DIRECTIONS["two"], 5), 25, fail_every=6)
    assert first["asked"]["tpe conditional"] == here


@pytest.mark.parametrize("name", LEARNERS)
def test_learners_find_better_quality_than_chance(name: str) -> None:
    space = SPACES["flat"]()

    def best(controller_name: str, seed: int) -> float:
        controller = make_controller(controller_name, space, ["maximize"], seed)
        return max(outcome(space, architecture, 1)[0] for architecture in play(controller, 80))

    found = [best(name, seed) for seed in range(3)]
    assert statistics.median(found) > max(best("random", seed) for seed in range(3))


@pytest.mark.parametrize("name", LEARNERS)
def test_learners_find_better_fronts_than_chance(name: str) -> None:
    space = SPACES["flat"]()

    def volume(controller_name: str, seed: int) -> float:
        controller = make_controller(controller_name, space, DIRECTIONS["two"], seed)
        found = [outcome(space, architecture, 2) for architecture in play(controller, 100)]
        return hypervolume_2d(found, [-5.0, 12.0], DIRECTIONS["two"])

    found = [volume(name, seed) for seed in range(3)]
    assert statistics.median(found) > max(volume("random", seed) for seed in range(3))


def test_local_search_expands_the_best_and_restarts_at_its_summit() -> None:
    space = SearchSpace("ridge", {"x": Int(0, 40), "y": Int(0, 40)})
    controller = make_controller("local_search", space, ["minimize"], 0, starts=1)
    asked: list[Architecture] = []
    best = float("inf")
    while best > 0:
        asked.append(controller.ask())
        x, y = int(asked[-1]["x"] or 0), int(asked[-1]["y"] or 0)
        distance = abs(x - 20) + abs(y - 20)
        best = min(best, distance)
        controller.tell(asked[-1], [distance])
    steps = [sum(abs(int(a[k] or 0) - int(b[k] or 0)) for k in "xy") for a, b in pairwise(asked)]
    assert max(steps) <= 2, "every step is to a neighbour of the best so far"
    around = [controller.ask() for _ in range(4)]
    known = {space.key(architecture) for architecture in asked}
    neighbours = {space.key(n) for n in space.neighbors({"x": 20, "y": 20})}
    fresh = len(neighbours - known)
    assert [space.key(a) in neighbours for a in around] == [True] * fresh + [False] * (4 - fresh)


def test_evolution_forgets_the_oldest() -> None:
    space = SPACES["flat"]()
    controller = make_controller("evolution", space, ["minimize"], 0, population=4, initial=4, tournament=4)
    champion = {f"edge{i}": "conv" for i in range(10)}
    other = {f"edge{i}": "pool" for i in range(10)}
    controller.tell(champion, [0.0])
    for i in range(10):
        controller.tell({**other, f"edge{i}": "skip"}, [1.0])
    assert sum(value == "conv" for value in controller.ask().values()) <= 2, (
        "a mutant of the champion came back"
    )


def test_tpe_is_shown_the_best_the_latest_and_the_pending(monkeypatch: pytest.MonkeyPatch) -> None:
    space = SPACES["flat"]()
    controller = make_controller("tpe", space, ["minimize"], 0, history=40)
    assert isinstance(controller, TPE)
    shown: list[list[Any]] = []
    draw = controller._study.draw

    def spy(trials: list[Any], seed: int) -> Any:
        shown.append(trials)
        return draw(trials, seed)

    monkeypatch.setattr(controller._study, "draw", spy)
    for number in range(120):
        architecture = {f"edge{i}": ["conv", "pool", "skip", "none"][number // 4**i % 4] for i in range(10)}
        controller.tell(architecture, None if number == 119 else [float(number % 60)])
    pending = [controller.ask(), controller.ask()]
    numbers = [trial.number for trial in shown[-1]]
    # 4 of 40 are good: the first four in the order of loss, then of number
    assert numbers == [0, 1, 60, 61, *range(84, 120), 120]
    assert [trial.values is None for trial in shown[-1]] == [False] * 39 + [True, True]
    assert len({space.key(a) for a in pending}) == 2


def test_tpe_tells_apart_values_that_python_holds_equal() -> None:
    values = [True, 1, 1.0, 0, False, None, "1"]
    space = SearchSpace("equal", {"norm": Choice(values), "x": Float(0.0, 1.0)})
    controller = make_controller("tpe", space, ["maximize"], 0)
    assert isinstance(controller, TPE)
    for value in values:
        controller.tell({"norm": value, "x": 0.5}, [1.0])
    assert [told.trial.params["norm"] for told in controller._told_trials] == list(range(7))
    asked = play(controller, 40)
    assert {(type(a["norm"]), a["norm"]) for a in asked} == {(type(value), value) for value in values}


def test_tpe_stays_inside_narrow_logarithmic_ranges() -> None:
    space = SearchSpace(
        "narrow", {"rate": Float(0.1, 0.1000001, log=True), "wide": Float(1e-12, 1e12, log=True)}
    )
    for direction in ("minimize", "maximize"):
        controller = make_controller("tpe", space, [direction], 0)
        for _ in range(40):
            architecture = controller.ask()
            controller.tell(architecture, [float(architecture["rate"] or 0)])


def test_groups_of_tpe_are_the_coarsest_partition() -> None:
    groups: list[tuple[str, ...]] = []
    for active in ("ab", "abc", "abd", "ae"):
        groups = _refined(groups, dict.fromkeys(active))
    assert sorted(groups) == [("a",), ("b",), ("c",), ("d",), ("e",)]
    assert _refined([("a", "b"), ("c",)], dict.fromkeys("abcd")) == [("d",), ("a", "b"), ("c",)]


def test_tpe_leaves_the_logging_of_optuna_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    import optuna

    before = optuna.logging.get_verbosity()
    try:
        optuna.logging.set_verbosity(optuna.logging.DEBUG)
        optuna.logging.enable_propagation()
        play(make_controller("tpe", SPACES["flat"](), ["minimize"], 0), 14)
        assert optuna.logging.get_verbosity() == optuna.logging.DEBUG
        assert [record for record in caplog.records if record.name.startswith("optuna")] == []
    finally:
        optuna.logging.set_verbosity(before)
        optuna.logging.disable_propagation()

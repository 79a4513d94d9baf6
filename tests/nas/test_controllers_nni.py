"""NNI's tuners: the conformance suite, every registered space, and what happens where NNI is missing."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from nas.controllers import Controller, list_controllers, make_controller
from nas.controllers._nni_codes import Code, SpaceCodes
from nas.controllers._nni_tuners import _shown
from nas.errors import UserMistake
from nas.pareto import Direction, hypervolume_2d
from spaces import Choice, Constraint, Float, Int, SearchSpace, get_space, list_spaces
from tests.conformance.controller import (
    DIRECTIONS,
    SPACES,
    ControllerConformance,
    MakeController,
    outcome,
    play,
)

OFFERED = ["anneal", "evolution", "gp", "random", "regularized_evolution", "tpe"]
NAMES = [f"nni:{name}" for name in OFFERED]
# Fewer than by default, so that they leave their random start within a test.
OPTIONS: dict[str, dict[str, Any]] = {
    "nni:anneal": {"history": 20},
    "nni:evolution": {"population": 8},
    "nni:gp": {"startup": 5, "candidates": 15, "history": 20},
    "nni:regularized_evolution": {"population": 8, "sample": 3},
    "nni:tpe": {"startup": 5},
}
SCALES = [f"{name}:{scale}" for name, scales in list_spaces().items() for scale in scales]

with_nni = pytest.mark.skipif(
    importlib.util.find_spec("nni") is None or importlib.util.find_spec("hyperopt") is None,
    reason="NNI is not installed: pip install 'nas-toolkit[nni]'",
)


def made(name: str, space: SearchSpace, directions: Sequence[Direction], seed: int = 0) -> Controller:
    return make_controller(name, space, directions, seed, **OPTIONS.get(name, {}))


def maker(name: str) -> MakeController:
    return lambda space, directions, seed: made(name, space, directions, seed)


@with_nni
class TestQuick(ControllerConformance):
    @pytest.fixture(params=["nni:evolution", "nni:random"])
    def make(self, request: pytest.FixtureRequest) -> MakeController:
        return maker(request.param)


@with_nni
@pytest.mark.slow
class TestSlow(ControllerConformance):
    @pytest.fixture(params=["nni:regularized_evolution", "nni:tpe"])
    def make(self, request: pytest.FixtureRequest) -> MakeController:
        return maker(request.param)


def test_the_tuners_are_listed_without_nni() -> None:
    assert [name for name in list_controllers() if name.startswith("nni:")] == NAMES


@pytest.mark.slow
@with_nni
@pytest.mark.parametrize("name", ["nni:anneal", "nni:gp"])
@pytest.mark.parametrize("space", list(SPACES))
def test_the_slower_tuners_go_on_after_replay(name: str, space: str) -> None:
    history: list[Any] = []
    uninterrupted = made(name, SPACES[space](), DIRECTIONS["two"])
    play(uninterrupted, 10, fail_every=4, history=history)
    rebuilt = made(name, SPACES[space](), DIRECTIONS["two"])
    for architecture, values in history:
        rebuilt.tell(architecture, values)
    assert play(rebuilt, 3) == play(uninterrupted, 3)


def fifty_asks(name: str, space: SearchSpace) -> list[str]:
    asked = play(make_controller(name, space, DIRECTIONS["two"], 1), 50, fail_every=9)
    return [space.key(architecture) for architecture in asked]


@with_nni
@pytest.mark.parametrize("name", ["nni:evolution", "nni:random", "nni:regularized_evolution", "nni:tpe"])
@pytest.mark.parametrize("scale", SCALES)
def test_fifty_asks_on_every_registered_space(name: str, scale: str) -> None:
    keys = fifty_asks(name, get_space(scale))
    assert len(set(keys)) == 50
    assert fifty_asks(name, get_space(scale)) == keys


@with_nni
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["nni:anneal", "nni:gp"])
@pytest.mark.parametrize("scale", SCALES)
def test_fifty_asks_of_the_slower_tuners_on_every_registered_space(name: str, scale: str) -> None:
    keys = fifty_asks(name, get_space(scale))
    assert len(set(keys)) == 50
    assert fifty_asks(name, get_space(scale)) == keys


@with_nni
@pytest.mark.parametrize("name", [name for name in NAMES if name != "nni:random"])
def test_tuners_learn(name: str) -> None:
    space = SPACES["flat"]()

    def mean_of_last(controller: Controller) -> float:
        asked = play(controller, 60)[-15:]
        return sum(outcome(space, architecture, 1)[0] for architecture in asked) / 15

    found = [mean_of_last(made(name, space, ["maximize"], seed)) for seed in range(2)]
    chance = [mean_of_last(made("nni:random", space, ["maximize"], seed)) for seed in range(2)]
    assert min(found) > max(chance)


@pytest.mark.slow
@with_nni
@pytest.mark.parametrize("name", ["nni:anneal", "nni:evolution", "nni:regularized_evolution", "nni:tpe"])
def test_tuners_find_better_fronts_than_chance(name: str) -> None:
    space = SPACES["flat"]()

    def volume(controller: Controller) -> float:
        found = [outcome(space, architecture, 2) for architecture in play(controller, 100)]
        return hypervolume_2d(found, [-5.0, 12.0], DIRECTIONS["two"])

    found = [volume(made(name, space, DIRECTIONS["two"], seed)) for seed in range(3)]
    chance = [volume(made("nni:random", space, DIRECTIONS["two"], seed)) for seed in range(3)]
    assert statistics.median(found) > max(chance)


@with_nni
def test_several_objectives_become_places(monkeypatch: pytest.MonkeyPatch) -> None:
    space = SPACES["flat"]()
    controller: Any = made("nni:tpe", space, ["maximize", "minimize"])
    told: list[list[float] | None] = [[1.0, 9.0], [3.0, 9.0], None, [5.0, 8.0], [6.0, 20.0]]
    for values in told:
        controller.tell(controller.ask(), values)
    *places, last = controller._scalarised()
    assert {places[3], last} == {0.0, 1.0}, "neither dominates the other"
    assert places[:3] == [3.0, 2.0, 3.0], "the failed one counts as the worst"


@with_nni
def test_a_repeat_is_told_its_known_value_and_another_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    space = SearchSpace("two", {"op": Choice(["a", "b"])})
    controller: Any = made("nni:tpe", space, ["minimize"])
    controller.tell({"op": "a"}, [4.25])
    proposals, received = iter([{"op": 0.0}, {"op": 0.0}, {"op": 1.0}]), []
    monkeypatch.setattr(controller._tuner, "propose", lambda: next(proposals))
    monkeypatch.setattr(controller._tuner, "receive", received.append)
    assert controller.ask() == {"op": "b"}
    assert received == [4.25, 4.25]


@with_nni
def test_what_breaks_a_constraint_is_told_as_the_worst(monkeypatch: pytest.MonkeyPatch) -> None:
    law = Constraint("different", lambda a: a["x"] != a["y"], "x and y must differ")
    space = SearchSpace("pair", {"x": Int(0, 2), "y": Int(0, 2)}, constraints=[law])
    controller: Any = made("nni:tpe", space, ["maximize"])
    controller.tell({"x": 0, "y": 1}, [5.0])
    controller.tell({"x": 1, "y": 0}, [-2.0])
    proposals, received = iter([{"x": 1.0, "y": 1.0}, {"x": 2.0, "y": 1.0}]), []
    monkeypatch.setattr(controller._tuner, "propose", lambda: next(proposals))
    monkeypatch.setattr(controller._tuner, "receive", received.append)
    assert controller.ask() == {"x": 2, "y": 1}
    assert received == [2.0]


@with_nni
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("nni:tpe", {"startup": 0}, "startup=0 of controller 'nni:tpe' must be a whole number of at least 1"),
        ("nni:evolution", {"population": 1}, "population=1 .* at least 2"),
        ("nni:regularized_evolution", {"sample": "3"}, "sample='3' .* whole number"),
        ("nni:gp", {"history": 5}, "history=5 .* at least 20"),
        ("nni:anneal", {"histroy": 50}, r"no option 'histroy' \(did you mean 'history'\?\)"),
    ],
)
def test_wrong_options_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserMistake, match=message):
        make_controller(name, SPACES["flat"](), ["minimize"], **options)


class _Absent(importlib.abc.MetaPathFinder):
    """Makes the import of one package fail as if it were not installed."""

    def __init__(self, name: str) -> None:
        self._name = name

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        if fullname.partition(".")[0] == self._name:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


@pytest.mark.parametrize(
    ("absent", "name", "message"),
    [
        ("nni", "nni:tpe", "controller 'nni:tpe' needs NNI 3.0, which is not installed"),
        ("pkg_resources", "nni:tpe", "NNI needs pkg_resources, which setuptools 81 and later do not have"),
        ("hyperopt", "nni:anneal", "controller 'nni:anneal' .* needs the package 'hyperopt', which is not"),
    ],
)
def test_what_is_missing_is_said_with_the_line_that_installs_it(
    absent: str, name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if absent != "nni":
        pytest.importorskip("nni")
    for module in list(sys.modules):
        if module.partition(".")[0] in ("nni", absent):
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [_Absent(absent), *sys.meta_path])
    if absent == "pkg_resources":
        # NNI 3.0 asks for it in its command line only; another release may on import.
        actual = importlib.import_module

        def import_module(module: str, package: str | None = None) -> Any:
            return actual("pkg_resources" if module.startswith("nni.") else module, package)

        monkeypatch.setattr(importlib, "import_module", import_module)
    with pytest.raises(UserMistake, match=rf"{message}.*pip install 'nas-toolkit\[nni\]'") as caught:
        make_controller(name, SPACES["flat"](), ["minimize"])
    assert "\n" not in str(caught.value)


def test_an_nni_that_fails_on_import_is_a_mistake_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in list(sys.modules):
        if module.partition(".")[0] == "nni":
            monkeypatch.delitem(sys.modules, module)
    (tmp_path / "nni.py").write_text("raise AttributeError('np.float was\\nremoved')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserMistake, match=r"importing NNI failed \(AttributeError: np.float was removed\)"):
        make_controller("nni:tpe", SPACES["flat"](), ["minimize"])


SCRIPT = """
import json, logging, os, sys
from nas.controllers import list_controllers, make_controller
early = [name for name in ("nni", "optuna", "torch", "scipy.optimize") if name in sys.modules]
from tests.conformance.controller import SPACES, play
asked = {}
for name in list_controllers():
    if name.startswith("nni:"):
        asked[name] = play(make_controller(name, SPACES["conditional"](), ["minimize"], 3), 15, fail_every=6)
heavy = [name for name in ("torch", "torchvision", "timm", "matplotlib") if name in sys.modules]
handlers = [repr(h) for n in (None, "nni") for h in logging.getLogger(n).handlers]
print(json.dumps({"asked": asked, "heavy": heavy, "early": early, "handlers": handlers}))
"""


@pytest.mark.slow
@with_nni
def test_other_processes_get_the_same_and_write_nothing(tmp_path: Path) -> None:
    results = []
    for hash_seed in ("1", "2"):
        home, work = tmp_path / f"home{hash_seed}", tmp_path / f"work{hash_seed}"
        home.mkdir()
        work.mkdir()
        path = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env={**os.environ, "HOME": str(home), "PYTHONHASHSEED": hash_seed, "PYTHONPATH": path},
            cwd=work,
            capture_output=True,
            text=True,
            check=False,
            timeout=100,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        assert list(home.iterdir()) == []
        assert list(work.iterdir()) == []
        results.append(json.loads(done.stdout))
    assert results[0] == results[1]
    assert results[0]["early"] == []
    assert results[0]["heavy"] == []
    assert results[0]["handlers"] == []


def test_codes_go_there_and_back() -> None:
    parameters = {
        "mixed": Choice([True, 1, 1.0, None, "batch"]),
        "ranked": Choice([8, 2, 4.5]),
        "steps": Int(3, 11, step=4),
        "rate": Float(1e-4, 1e-1, log=True),
        "share": Float(-1.0, 1.0),
    }
    for parameter in parameters.values():
        code = Code.of(parameter)
        values = [parameter.at(i) for i in range(parameter.size)] if parameter.size else [parameter.default]
        for value in values:
            back = code.decode(code.encode(value))
            assert (
                back == pytest.approx(value) if isinstance(value, float) else back is value or back == value
            )
            assert type(back) is type(value)
        assert code.low <= code.encode(values[0]) <= code.high
    ranked = Code.of(parameters["ranked"])
    assert [ranked.decode(number) for number in range(3)] == [2, 4.5, 8]
    rate = Code.of(parameters["rate"])
    assert rate.decode((rate.low + rate.high) / 2) == pytest.approx(10**-2.5), "the middle of the logarithms"
    steps = Code.of(parameters["steps"])
    assert [steps.decode(number) for number in (*steps.stretched, 0.49, 0.51)] == [3, 11, 3, 7]


def test_long_histories_are_cut_to_the_best_and_the_latest() -> None:
    losses = [float(abs(index - 30)) for index in range(100)]
    assert _shown(losses, 100) == list(range(100))
    assert _shown(losses, 20) == [29, 30, *range(82, 100)]


def test_inactive_codes_are_dropped() -> None:
    space = SPACES["conditional"]()
    codes = SpaceCodes(space)
    full = codes.with_defaults({"depth": 0.0})
    architecture = codes.decode(full)
    assert architecture is not None
    assert architecture["depth"] == 1
    assert "layer1.op" not in architecture
    assert set(codes.encode(architecture)) == set(architecture) - {"stem"}
    assert set(full) == set(space.parameters) - {"stem"}

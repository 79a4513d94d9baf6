"""What every controller must do.

Inherit, give a ``make`` fixture, and the suite runs:

    class TestMyController(ControllerConformance):
        @pytest.fixture()
        def make(self) -> MakeController:
            return lambda space, directions, seed: MyController(space, directions, seed)
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from nas.controllers import Controller
from nas.errors import ArchitectureError, SpaceExhausted, UserMistake
from nas.pareto import Direction
from spaces import Architecture, Choice, Constraint, Float, Int, Parameter, SearchSpace

__all__ = ["DIRECTIONS", "SPACES", "ControllerConformance", "MakeController", "outcome", "play"]

MakeController = Callable[[SearchSpace, Sequence[Direction], int], Controller]

DIRECTIONS: dict[str, list[Direction]] = {"one": ["maximize"], "two": ["maximize", "minimize"]}


def flat() -> SearchSpace:
    """Ten decisions that always count; more than a million architectures."""
    return SearchSpace("flat", {f"edge{i}": Choice(["conv", "pool", "skip", "none"]) for i in range(10)})


def conditional() -> SearchSpace:
    """Layers that exist or not, branches, numbers on both scales, values that Python holds equal, a constant."""
    parameters: dict[str, Parameter] = {
        "depth": Int(1, 4),
        "rate": Float(1e-4, 1e-1, log=True),
        "norm": Choice([True, 1, 1.0, None, "batch"]),
        "stem": Choice(["patch"]),
    }
    for i in range(4):
        parameters |= _layer(i)
    return SearchSpace("conditional", parameters)


def _layer(i: int) -> dict[str, Parameter]:
    op = f"layer{i}.op"

    def exists(a: Mapping[str, Any]) -> bool:
        return bool(a["depth"] > i)

    def attends(a: Mapping[str, Any]) -> bool:
        return a.get(op) in ("softmax", "linear")

    def convolves(a: Mapping[str, Any]) -> bool:
        return a.get(op) == "conv"

    return {
        op: Choice(["softmax", "linear", "conv"], when=exists),
        f"layer{i}.heads": Choice([2, 4, 8], when=attends),
        f"layer{i}.kernel": Int(3, 9, step=2, when=convolves),
    }


def constrained() -> SearchSpace:
    """A law that four in five combinations break."""
    law = Constraint("divisible", lambda a: a["width"] % a["heads"] == 0, "width must be divisible by heads")
    width, heads = Int(24, 87), Choice([3, 5, 7, 8])
    return SearchSpace("constrained", {"width": width, "heads": heads, "ratio": Int(1, 4)}, constraints=[law])


def tiny() -> SearchSpace:
    """Six architectures: depths 1 and 2 with two values each, depth 3 with two of another."""
    return SearchSpace(
        "tiny",
        {
            "depth": Int(1, 3),
            "op": Choice(["conv", "pool"], when=lambda a: a["depth"] < 3),
            "heads": Choice([2, 4], when=lambda a: a["depth"] == 3),
        },
    )


SPACES: dict[str, Callable[[], SearchSpace]] = {
    "flat": flat,
    "conditional": conditional,
    "constrained": constrained,
}


def outcome(space: SearchSpace, architecture: Mapping[str, Any], objectives: int) -> list[float]:
    """Two smooth objectives in conflict, of which the first ``objectives`` are given."""
    code = space.encode(architecture).astype(float)
    weights = np.sin(np.arange(1, len(code) + 1) * 1.7) + 0.4
    return [float(code @ weights - 0.3 * (code**2).sum()), float(code @ np.abs(weights))][:objectives]


def play(
    controller: Controller, steps: int, *, fail_every: int = 0, history: list[Any] | None = None
) -> list[Architecture]:
    """Asks and tells in turn, as one worker does; ``history`` collects what was told."""
    asked = []
    for step in range(steps):
        architecture = controller.ask()
        values: list[float] | None = outcome(controller.space, architecture, len(controller.directions))
        if fail_every and step % fail_every == fail_every - 1:
            values = None
        controller.tell(architecture, values)
        asked.append(architecture)
        if history is not None:
            history.append((architecture, values))
    return asked


class ControllerConformance:
    """Checks of one controller on several spaces, with one and with two objectives."""

    @pytest.fixture
    def make(self) -> MakeController:
        """Makes the controller under test; every subclass gives its own."""
        raise NotImplementedError

    @pytest.fixture(params=list(SPACES))
    def space(self, request: pytest.FixtureRequest) -> SearchSpace:
        return SPACES[request.param]()

    @pytest.fixture(params=list(DIRECTIONS))
    def directions(self, request: pytest.FixtureRequest) -> list[Direction]:
        return DIRECTIONS[request.param]

    def test_proposes_new_canonical_architectures(
        self, make: MakeController, space: SearchSpace, directions: list[Direction]
    ) -> None:
        asked = play(make(space, directions, 0), 60, fail_every=7)
        assert all(space.canonical(architecture) == architecture for architecture in asked)
        assert [list(space.canonical(architecture)) for architecture in asked] == [list(a) for a in asked]
        assert len({space.key(architecture) for architecture in asked}) == 60

    def test_goes_on_after_replay_as_if_never_stopped(
        self, make: MakeController, space: SearchSpace, directions: list[Direction]
    ) -> None:
        history: list[Any] = []
        uninterrupted = make(space, directions, 3)
        play(uninterrupted, 30, fail_every=7, history=history)
        rebuilt = make(space, directions, 3)
        for architecture, values in history:
            rebuilt.tell(architecture, values)
        assert play(rebuilt, 30, fail_every=5) == play(uninterrupted, 30, fail_every=5)

    def test_replay_with_a_candidate_put_back_into_the_queue(
        self, make: MakeController, space: SearchSpace, directions: list[Direction]
    ) -> None:
        history: list[Any] = []
        uninterrupted = make(space, directions, 4)
        play(uninterrupted, 15, history=history)
        interrupted = uninterrupted.ask()
        rebuilt = make(space, directions, 4)
        for architecture, values in history:
            rebuilt.tell(architecture, values)
        rebuilt.reserve(interrupted)
        for controller in (uninterrupted, rebuilt):
            controller.tell(interrupted, outcome(space, interrupted, len(directions)))
        assert play(rebuilt, 10) == play(uninterrupted, 10)

    def test_seed_decides_the_order(
        self, make: MakeController, space: SearchSpace, directions: list[Direction]
    ) -> None:
        first = play(make(space, directions, 1), 15)
        assert play(make(space, directions, 1), 15) == first
        assert play(make(space, directions, 2), 15) != first

    def test_several_pending(
        self, make: MakeController, space: SearchSpace, directions: list[Direction]
    ) -> None:
        controller = make(space, directions, 0)
        rng = random.Random(0)
        pending = [controller.ask() for _ in range(8)]
        keys = {space.key(architecture) for architecture in pending}
        for step in range(40):
            done = pending.pop(rng.randrange(len(pending)))
            controller.tell(done, None if step % 9 == 8 else outcome(space, done, len(directions)))
            pending.append(controller.ask())
            keys.add(space.key(pending[-1]))
        assert len(keys) == 48

    @pytest.mark.parametrize("worthless", [None, float("nan"), float("inf"), float("-inf")])
    def test_failures_are_survived_and_alike(
        self, make: MakeController, space: SearchSpace, directions: list[Direction], worthless: float | None
    ) -> None:
        controllers = [make(space, directions, 0), make(space, directions, 0)]
        for step in range(24):
            asked = [controller.ask() for controller in controllers]
            assert asked[0] == asked[1]
            failed = [0.5] * (len(directions) - 1) + [worthless] if worthless is not None else None
            values = outcome(space, asked[0], len(directions))
            controllers[0].tell(asked[0], values if step % 2 else None)
            controllers[1].tell(asked[1], values if step % 2 else failed)

    def test_nothing_but_failures(
        self, make: MakeController, space: SearchSpace, directions: list[Direction]
    ) -> None:
        controller = make(space, directions, 0)
        assert len({space.key(a) for a in play(controller, 30, fail_every=1)}) == 30

    @pytest.mark.parametrize("tell", ["each", "failed", "late", "never"])
    def test_tiny_space_is_exhausted_exactly(
        self, make: MakeController, directions: list[Direction], tell: str
    ) -> None:
        space = tiny()
        controller = make(space, directions, 0)
        asked = []
        for _ in range(6):
            asked.append(controller.ask())
            if tell in ("each", "failed"):
                controller.tell(
                    asked[-1], outcome(space, asked[-1], len(directions)) if tell == "each" else None
                )
        assert {space.key(architecture) for architecture in asked} == {
            space.key(a) for a in space.enumerate()
        }
        for _ in range(2):
            with pytest.raises(
                SpaceExhausted, match=r"all 6 architectures of space 'tiny' have been proposed"
            ):
                controller.ask()
            if tell == "late":
                for architecture in asked:
                    controller.tell(architecture, outcome(space, architecture, len(directions)))

    def test_order_in_a_tiny_space_is_not_fixed(
        self, make: MakeController, directions: list[Direction]
    ) -> None:
        space = tiny()
        orders = {tuple(space.key(a) for a in play(make(space, directions, seed), 6)) for seed in range(8)}
        assert len(orders) >= 5

    def test_told_without_being_asked(self, make: MakeController, directions: list[Direction]) -> None:
        space = tiny()
        published = list(space.enumerate())
        missing = published.pop(3)
        controller = make(space, directions, 0)
        for number, architecture in enumerate(published):
            controller.tell(
                architecture, None if number == 1 else outcome(space, architecture, len(directions))
            )
        assert controller.ask() == missing

    def test_reserved_is_not_proposed(self, make: MakeController, directions: list[Direction]) -> None:
        space = tiny()
        *reserved, missing = space.enumerate()
        controller = make(space, directions, 0)
        for architecture in reserved:
            controller.reserve(architecture)
        assert controller.ask() == missing

    def test_told_again(self, make: MakeController, space: SearchSpace, directions: list[Direction]) -> None:
        controller = make(space, directions, 0)
        first = controller.ask()
        controller.tell(first, None)
        controller.tell(first, outcome(space, first, len(directions)))
        controller.tell(first, outcome(space, first, len(directions)))
        assert space.key(first) not in {space.key(a) for a in play(controller, 25)}

    def test_directions_are_symmetric(self, make: MakeController, space: SearchSpace) -> None:
        up, down = make(space, ["maximize", "minimize"], 0), make(space, ["minimize", "maximize"], 0)
        for _ in range(30):
            asked = up.ask()
            assert down.ask() == asked
            values = outcome(space, asked, 2)
            up.tell(asked, values)
            down.tell(asked, [-value for value in values])

    def test_one_point(self, make: MakeController, directions: list[Direction]) -> None:
        space = SearchSpace("point", {"op": Choice(["conv"])})
        controller = make(space, directions, 0)
        assert play(controller, 1) == [{"op": "conv"}]
        with pytest.raises(SpaceExhausted):
            controller.ask()

    def test_what_was_given_out_is_the_caller_s(self, make: MakeController) -> None:
        space = flat()
        careless, careful = make(space, ["maximize"], 0), make(space, ["maximize"], 0)
        for _ in range(15):
            architecture = careless.ask()
            assert careful.ask() == architecture
            values = outcome(space, architecture, 1)
            careful.tell(architecture, values)
            careless.tell(architecture, values)
            architecture.clear()
            values.clear()

    def test_refuses_what_is_not_in_the_space(self, make: MakeController) -> None:
        controller = make(tiny(), ["maximize"], 0)
        for call in (controller.reserve, lambda architecture: controller.tell(architecture, [1.0])):
            with pytest.raises(ArchitectureError, match=r"'depth' is 9; it must be an integer from 1 to 3"):
                call({"depth": 9, "op": "conv"})

    def test_refuses_another_number_of_objectives(self, make: MakeController) -> None:
        controller = make(tiny(), ["maximize"], 0)
        with pytest.raises(
            UserMistake, match=r"objectives=\[1.0, 2.0\] has 2 number\(s\), .* 1 direction\(s\)"
        ):
            controller.tell({"depth": 1, "op": "conv"}, [1.0, 2.0])

    @pytest.mark.parametrize(
        ("directions", "message"),
        [
            ([], "must be a non-empty sequence"),
            (["up"], "directions holds 'up'"),
            ("maximize", "non-empty sequence"),
        ],
    )
    def test_refuses_other_directions(self, make: MakeController, directions: Any, message: str) -> None:
        with pytest.raises(UserMistake, match=message):
            make(tiny(), directions, 0)

    def test_is_silent_and_leaves_global_state_alone(
        self, make: MakeController, capfd: pytest.CaptureFixture[str]
    ) -> None:
        state, numpy_state = random.getstate(), np.random.get_state()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            play(make(conditional(), DIRECTIONS["two"], 0), 15)
        assert random.getstate() == state
        assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpy_state, strict=True))
        assert capfd.readouterr() == ("", "")

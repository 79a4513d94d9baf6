"""Verdicts on simulated machines: what is true is known there, so it can be seen whether it is found."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Callable

import pytest

from nas.latency.compare import all_decided, compare, compare_all
from nas.latency.rounds import Plan, Rounds
from nas.latency.runner import Times
from nas.latency.visits import Track
from tests.nas._simulated_machines import Machine, Memory


def duel(seed: int, first: float, second: float, noise: float = 0.015) -> tuple[str, int]:
    machine = Machine(seed, noise, slowness=lambda at: 1 + 0.2 * math.sin(at))
    rounds = machine.session(
        {"a": first, "b": second},
        Plan(20.0, 0.01, together=True, seed=seed),
        done=lambda found: all_decided(found, 0.01, against=None),
    )
    return compare(rounds.tracks["a"], rounds.tracks["b"], "wall").verdict, rounds.number


def test_a_model_against_itself_cannot_be_told_apart() -> None:
    assert sum(duel(seed, 5.0, 5.0)[0] == "cannot tell" for seed in range(100)) >= 98


def test_five_per_cent_are_found_and_never_the_wrong_way_round() -> None:
    found = [duel(seed, 5.0, 5.25) for seed in range(100)]
    assert sum(verdict == "faster" for verdict, _ in found) >= 98
    assert not any(verdict == "slower" for verdict, _ in found)
    assert statistics.median(number for _, number in found) <= 40


def test_a_scattering_reference_does_not_blur_a_comparison() -> None:
    verdicts = []
    for seed in range(20):
        machine = Machine(seed, noise=0.015)
        models = {name: machine.model(name, ms) for name, ms in (("a", 5.0), ("b", 5.25))}
        reference = machine.model("reference", 1.0)
        jumps = random.Random(seed)

        def scattering(run: Callable[[], Times] = reference, jumps: random.Random = jumps) -> Times:
            wall = run().wall * jumps.choice([0.92, 1.08])
            return Times(wall, wall, math.nan)

        plan = Plan(2.0, 0.01, together=True, seed=seed)
        rounds = Rounds(models, scattering, plan, lambda calls: "wall", now=machine.now)
        rounds.warm_up()
        rounds.run()
        verdicts.append(compare_all(rounds)[0].verdict)
    assert verdicts.count("faster") >= 19


def test_rounds_of_a_comparison_are_mirrored_and_visit_the_reference_now_and_then() -> None:
    machine = Machine()
    rounds = machine.session({"a": 2.0, "b": 3.0, "c": 4.0}, Plan(2.0, 0.01, together=True))
    order = [name for name, _ in itertools.groupby(machine.seen[machine.seen.index("c") + 1 :])]
    visits = [name for name in order if name != "reference"]
    by_round: dict[int, list[tuple[float, str]]] = {}
    for track in rounds.tracks.values():
        assert [visit.round for visit in track.visits] == list(range(rounds.number))
        for visit in track.visits:
            by_round.setdefault(visit.round, []).append((visit.before.wall, track.name))
    assert len(by_round) >= 20
    assert len(visits) / order.count("reference") >= 4
    # Models between the same two visits of the reference are compared by their times alone.
    first = compare(rounds.tracks["a"], rounds.tracks["b"], "wall")
    assert first.ratio == pytest.approx(2 / 3)


def test_undecided_pairs_go_on_until_they_are_surely_equal_or_known_well() -> None:
    def judged(ratio: float, noise: float, seconds: float) -> bool:
        rounds = Machine(3, noise).session({"a": 5.0 * ratio, "b": 5.0}, Plan(seconds, together=True))
        return all_decided(rounds, 0.01, against=None)

    assert judged(1.0, 0.002, 3.0)  # within the margin
    assert judged(1.03, 0.005, 3.0)  # clear
    assert judged(1.01, 0.0001, 3.0)  # on the margin, but known to a quarter of the precision
    assert not judged(1.008, 0.02, 3.0)


def test_copies_in_other_places_are_not_called_faster() -> None:
    wrong, found = 0, 0
    for seed in range(25):
        for ratio in (1.0, 1.05):
            memory = Memory(seed, 0.01, 0.01)
            rounds = memory.session(
                {"a": 10.0 * ratio, "b": 10.0},
                Plan(20.0, together=True, seed=seed),
                relocate=memory.relocate,
                done=lambda found: all_decided(found, 0.01, against=None),
            )
            [pair] = compare_all(rounds)
            wrong += pair.verdict == "faster" or (ratio == 1.0 and pair.verdict != "cannot tell")
            found += pair.verdict == "slower"
    assert wrong == 0
    assert found >= 24


@pytest.mark.parametrize("noise", [0.001, 0.003, 0.006])
@pytest.mark.parametrize("precision", [0.01, 0.05])
def test_what_is_clear_is_never_left_open_because_it_is_known_well(noise: float, precision: float) -> None:
    for seed in range(10):
        memory = Memory(seed, noise, 0.0015)
        rounds = memory.session(
            {"a": 0.5, "b": 5.0},
            Plan(5.0, precision, together=True, seed=seed),
            relocate=memory.relocate,
            done=lambda found: all_decided(found, precision, against=None),
        )
        assert compare_all(rounds)[0].verdict == "faster"
        assert rounds.tracks["a"].stopped == "decision"


def test_a_visit_belongs_to_the_place_that_it_was_made_in() -> None:
    machine, place = Machine(), 0

    def relocate() -> bool:
        nonlocal place
        place += 1
        machine.at += 0.02
        return True

    def run() -> Times:
        machine.at += 0.005
        return Times(1.0 + place, 1.0 + place, math.nan)

    models = {"a": run, "b": run}
    plan = Plan(3.0, together=True)
    rounds = Rounds(
        models,
        machine.model("reference", 1.0),
        plan,
        lambda calls: "wall",
        now=machine.now,
        relocate=relocate,
    )
    rounds.warm_up()
    rounds.run()
    visits = [visit for track in rounds.tracks.values() for visit in track.visits]
    assert {visit.place for visit in visits} == set(range(1, place + 1))
    assert [visit.times.wall for visit in visits] == [1.0 + visit.place for visit in visits]


def test_a_busy_machine_leaves_enough_places_to_tell_a_factor_of_two() -> None:
    """A few calm moments, all in the same few places, are not all that a verdict is made of."""
    memory = Memory(0, 0.01, 0.005)
    memory._slowness = lambda at: 1.0 if at % 2.0 < 0.5 else 1.5

    def slowly() -> bool:
        memory.at += 0.2
        return memory.relocate()

    rounds = memory.session({"a": 5.0, "b": 10.0}, Plan(10.0, together=True), relocate=slowly)
    quiet = [v for v in rounds.tracks["a"].visits if v.noise("wall") <= rounds.ceiling(1.25)]
    assert len(quiet) >= 9 > len({visit.place for visit in quiet})
    assert compare_all(rounds)[0].verdict == "faster"


def test_pairs_against_one_or_all() -> None:
    rounds = Machine(noise=0.01).session(
        {"a": 5.0, "b": 6.0, "c": 7.0},
        Plan(30.0, 0.01, together=True),
        done=lambda found: all_decided(found, 0.01, against=None),
    )
    assert [(p.first, p.second, p.verdict) for p in compare_all(rounds)] == [
        ("a", "b", "faster"),
        ("a", "c", "faster"),
        ("b", "c", "faster"),
    ]
    assert [(p.first, p.verdict) for p in compare_all(rounds, against="b")] == [
        ("a", "faster"),
        ("c", "slower"),
    ]
    assert {track.stopped for track in rounds.tracks.values()} == {"decision"}


def test_too_few_rounds_decide_nothing() -> None:
    rounds = Machine().session({"a": 1.0, "b": 9.0}, Plan(1e-9, 0.01, together=True))
    pair = compare(rounds.tracks["a"], rounds.tracks["b"], "wall")
    assert (pair.verdict, pair.rounds) == ("cannot tell", 6)
    nothing = compare(rounds.tracks["a"], Track("c", lambda: Times(1, 1, 1)), "wall")
    assert (nothing.verdict, nothing.rounds) == ("cannot tell", 0)
    assert math.isnan(nothing.ratio)

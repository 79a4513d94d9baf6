"""Early stopping: a rule of successive halving or Optuna's within the group of candidates that are no costlier."""

from __future__ import annotations

import random
import typing
from collections.abc import Sequence
from dataclasses import dataclass

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nas.config import SearchConfig
from nas.pruning import PRUNERS, CurvePruner, Rungs

EPOCHS = 8
RULES = [name for name in PRUNERS if name != "none"]


def run(pruner: CurvePruner, number: int, quality: float, cost: float) -> int | None:
    """Epoch at which a candidate with a straight learning curve is stopped; None when it is not."""
    pruner.start(number, [cost])
    for epoch in range(1, EPOCHS):
        if pruner.should_stop(number, epoch, quality * epoch / EPOCHS):
            pruner.finish(number, complete=False)
            return epoch
    pruner.finish(number, complete=True)
    return None


def seeded(name: str, cost: float = 1.0) -> CurvePruner:
    pruner = CurvePruner(name, EPOCHS)
    for number in range(5):
        assert run(pruner, number, 0.5 + number / 100, cost) is None, (
            "none is stopped before there are five rivals"
        )
    return pruner


@pytest.mark.parametrize("name", RULES)
def test_a_hopeless_candidate_is_stopped(name: str) -> None:
    pruner = seeded(name)
    stopped = [run(pruner, number, 0.1, 1.0) for number in range(5, 25)]
    assert any(epoch is not None for epoch in stopped)


@pytest.mark.parametrize("name", PRUNERS)
def test_the_best_so_far_is_never_stopped(name: str) -> None:
    assert run(seeded(name), 5, 0.9, 1.0) is None


@pytest.mark.parametrize("name", RULES)
def test_a_faster_candidate_is_not_stopped_for_being_less_accurate(name: str) -> None:
    assert run(seeded(name, cost=1.0), 5, 0.1, cost=0.5) is None


def test_a_candidate_is_compared_only_with_what_is_no_costlier() -> None:
    pruner = seeded("median", cost=1.0)
    for number in range(5, 10):
        assert run(pruner, number, 0.95, cost=2.0) is None
    assert run(pruner, 10, 0.6, cost=1.5) is None, "above the median of the cheap ones"
    assert run(pruner, 11, 0.55, cost=2.5) is not None, "below the median of all"


def test_none_never_stops() -> None:
    pruner = seeded("none")
    assert run(pruner, 5, 0.0, 9.0) is None


@pytest.mark.parametrize("name", RULES)
def test_replayed_curves_decide_as_if_they_had_just_happened(name: str) -> None:
    lived, replayed = seeded(name), CurvePruner(name, EPOCHS)
    for number in range(5):
        curve = {epoch: (0.5 + number / 100) * epoch / EPOCHS for epoch in range(1, EPOCHS)}
        replayed.replay(number, [1.0], curve, complete=True)
    for number in range(5, 15):
        quality = 0.4 + (number % 5) / 20
        assert run(lived, number, quality, 1.0) == run(replayed, number, quality, 1.0)


def test_an_unknown_pruner_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"unknown pruner 'best'; known: median, successive_halving, asha, hyperband, none"
    ):
        CurvePruner("best", EPOCHS)


def test_the_configuration_offers_every_pruner() -> None:
    assert typing.get_args(SearchConfig.model_fields["pruner"].annotation) == PRUNERS


@dataclass(frozen=True)
class Event:
    number: int
    epoch: int
    quality: float


@st.composite
def interleavings(draw: st.DrawFn) -> tuple[list[float], list[Event]]:
    """Costs of a few candidates, and their reports in any order that the epochs of each allow."""
    costs = draw(st.lists(st.sampled_from([1.0, 2.0, 3.0]), min_size=1, max_size=14))
    turns = draw(st.permutations([number for number in range(len(costs)) for _ in range(9)]))
    epochs = [0] * len(costs)
    events = []
    for number in turns:
        epochs[number] += 1
        events.append(Event(number, epochs[number], draw(st.sampled_from([0.1, 0.2, 0.3, 0.4, 0.5]))))
    return costs, events


def reference(costs: Sequence[float], events: Sequence[Event], startup: int) -> list[bool]:
    """Asynchronous successive halving by its definition, with rungs at 1 and 3 of 9 epochs: what each report earns."""
    stopped: set[int] = set()
    history: list[Event] = []
    verdicts = []
    for event in events:
        verdict = False
        if event.number not in stopped and event.epoch in (1, 3):
            rung = [
                other
                for other in history
                if other.epoch == event.epoch and costs[other.number] <= costs[event.number]
            ]
            ranking = sorted([other.quality for other in rung] + [event.quality], reverse=True)
            worst_that_goes_on = ranking[max(len(ranking) // 3, 1) - 1]
            verdict = event.quality < worst_that_goes_on and len(rung) >= startup
        if event.number not in stopped:
            history.append(event)
        if verdict:
            stopped.add(event.number)
        verdicts.append(verdict)
    return verdicts


def decisions(pruner: CurvePruner, costs: Sequence[float], events: Sequence[Event]) -> list[bool]:
    for number, cost in enumerate(costs):
        pruner.start(number, [cost])
    stopped: set[int] = set()
    verdicts = []
    for event in events:
        verdict = event.number not in stopped and pruner.should_stop(event.number, event.epoch, event.quality)
        if verdict:
            stopped.add(event.number)
            pruner.finish(event.number, complete=False)
        elif event.epoch == 9 and event.number not in stopped:
            pruner.finish(event.number, complete=True)
        verdicts.append(verdict)
    return verdicts


@settings(max_examples=80, deadline=None)
@given(interleavings(), st.sampled_from([0, 2, 5]))
def test_asha_decides_as_its_definition(given_: tuple[list[float], list[Event]], startup: int) -> None:
    costs, events = given_
    assert decisions(CurvePruner("asha", 9, startup), costs, events) == reference(costs, events, startup)


@settings(max_examples=40, deadline=None)
@given(interleavings(), st.integers(0, 13))
def test_a_straggler_changes_nothing_for_the_others(
    given_: tuple[list[float], list[Event]], straggler: int
) -> None:
    costs, events = given_
    before_first_rung = [event for event in events if event.number != straggler]
    with_straggler = decisions(CurvePruner("asha", 9, 2), [*costs, 0.0], before_first_rung)
    assert with_straggler == decisions(CurvePruner("asha", 9, 2), costs, before_first_rung)


@settings(max_examples=40, deadline=None)
@given(interleavings())
def test_the_costs_that_matter_are_those_of_no_costlier_ones(
    given_: tuple[list[float], list[Event]],
) -> None:
    costs, events = given_
    cheap = [event for event in events if costs[event.number] < 3.0]
    verdicts = decisions(CurvePruner("asha", 9, 0), costs, events)
    assert [
        verdict for event, verdict in zip(events, verdicts, strict=True) if costs[event.number] < 3.0
    ] == decisions(CurvePruner("asha", 9, 0), costs, cheap)


@pytest.mark.parametrize("name", ["asha", "hyperband"])
def test_running_candidates_set_the_bar_at_once(name: str) -> None:
    numbers = [
        number for number in range(200) if Rungs(1, 9, brackets=name == "hyperband").bracket(number) == 0
    ]
    pruner = CurvePruner(name, 9)
    for number in numbers[:20]:
        pruner.start(number, [1.0])
    stops = [pruner.should_stop(number, 1, 1.0 - place / 100) for place, number in enumerate(numbers[:20])]
    assert stops[:5] == [False] * 5, "too few to compare with"
    assert all(stops[7:]), "none of the twenty has finished"
    assert not pruner.should_stop(numbers[0], 3, 0.0), "the first at its rung"


def best_third(rule: str, seed: int, trials: int) -> tuple[list[list[float]], list[int]]:
    """Random curves, and the epoch in which the toolkit's pruner ends each, one candidate after the other."""
    rng = random.Random(seed)
    curves = [[rng.choice([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]) for _ in range(27)] for _ in range(trials)]
    pruner = CurvePruner(rule, 27, startup=0)
    ends = []
    for number, curve in enumerate(curves):
        pruner.start(number, [1.0])
        for epoch, quality in enumerate(curve, start=1):
            if pruner.should_stop(number, epoch, quality):
                break
        pruner.finish(number, complete=epoch == 27)
        ends.append(epoch)
    return curves, ends


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rule", ["asha", "hyperband"])
def test_one_after_the_other_optuna_decides_the_same(rule: str, seed: int) -> None:
    curves, ends = best_third(rule, seed, 60)
    optuna_rule: optuna.pruners.BasePruner = optuna.pruners.SuccessiveHalvingPruner(
        min_resource=3, reduction_factor=3
    )
    if rule == "hyperband":
        optuna_rule = optuna.pruners.HyperbandPruner(min_resource=3, max_resource=27, reduction_factor=3)
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize", pruner=optuna_rule, study_name="curves")
    optuna.logging.set_verbosity(verbosity)
    expected = []
    for curve in curves:
        trial = study.ask()
        # At the last epoch Optuna has one rung more, which saves nothing any more.
        for epoch, quality in enumerate(curve, start=1):
            trial.report(quality, epoch)
            if epoch < 27 and trial.should_prune():
                break
        study.tell(trial, curve[-1])
        expected.append(epoch)
    assert ends == expected
    assert 3 in ends
    assert 27 in ends


def test_brackets_begin_later_and_share_the_epochs() -> None:
    rungs = Rungs(1, 27, brackets=True)
    brackets = [rungs.bracket(number) for number in range(4000)]
    shares = [brackets.count(bracket) / 4000 for bracket in range(4)]
    assert shares == pytest.approx([share / 50 for share in (27, 12, 6, 4)], abs=0.03)
    low, high = brackets.index(0), brackets.index(3)
    for number in range(4000, 4100):
        if rungs.bracket(number) == 0:
            rungs.reach(number, 1, 0.9, lambda other: True)
    assert rungs.reach(low, 1, 0.1, lambda other: True)[0] is False
    assert rungs.reach(high, 1, 0.1, lambda other: True) == (True, 0), (
        "its bracket has no rung before the end"
    )
    with_one = Rungs(1, 27)
    assert {with_one.bracket(number) for number in range(50)} == {0}


def test_a_candidate_that_is_moved_keeps_its_place_at_the_rungs_behind_it() -> None:
    rungs = Rungs(1, 9)
    everybody = lambda other: True  # noqa: E731
    for number in range(6):
        rungs.reach(number, 1, 0.1 * number, everybody)
    assert rungs.reach(2, 2, 0.9, everybody) == (True, 0), "between rungs, after it was moved"
    assert rungs.reach(6, 1, 0.45, everybody) == (True, 6), "of the seven, 0.5 alone is better"
    assert rungs.reach(7, 1, 0.3, everybody) == (False, 7)


def test_nan_is_stopped_and_sets_no_bar() -> None:
    rungs = Rungs(1, 9)
    assert rungs.reach(0, 1, float("nan"), lambda other: True) == (False, 0)
    assert rungs.reach(1, 1, 0.1, lambda other: True) == (True, 0)


@pytest.mark.parametrize("epochs", [1, 2, 3])
@pytest.mark.parametrize("name", ["asha", "hyperband"])
def test_short_trainings_are_never_stopped_in_their_last_epoch(name: str, epochs: int) -> None:
    pruner = CurvePruner(name, epochs, startup=0)
    for number in range(20):
        pruner.start(number, [1.0])
        assert not pruner.should_stop(number, epochs, 1.0 - number / 20)

"""Early stopping: Optuna's rule within the group of candidates that are no costlier."""

from __future__ import annotations

import pytest

from nas.pruning import CurvePruner

EPOCHS = 8


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


@pytest.mark.parametrize("name", ["median", "successive_halving"])
def test_a_hopeless_candidate_is_stopped(name: str) -> None:
    pruner = seeded(name)
    stopped = [run(pruner, number, 0.1, 1.0) for number in range(5, 15)]
    assert any(epoch is not None for epoch in stopped)


@pytest.mark.parametrize("name", ["median", "successive_halving", "none"])
def test_the_best_so_far_is_never_stopped(name: str) -> None:
    assert run(seeded(name), 5, 0.9, 1.0) is None


@pytest.mark.parametrize("name", ["median", "successive_halving"])
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


@pytest.mark.parametrize("name", ["median", "successive_halving"])
def test_replayed_curves_decide_as_if_they_had_just_happened(name: str) -> None:
    lived, replayed = seeded(name), CurvePruner(name, EPOCHS)
    for number in range(5):
        curve = {epoch: (0.5 + number / 100) * epoch / EPOCHS for epoch in range(1, EPOCHS)}
        replayed.replay(number, [1.0], curve, complete=True)
    for number in range(5, 15):
        quality = 0.4 + (number % 5) / 20
        assert run(lived, number, quality, 1.0) == run(replayed, number, quality, 1.0)


def test_an_unknown_pruner_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown pruner 'best'; known: median"):
        CurvePruner("best", EPOCHS)

"""Who is taken for dead, and what is done again when a server cannot be reached."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from sqlalchemy.exc import OperationalError

from nas.drivers import Watch, poll_seconds
from nas.errors import RunStopped
from nas.steady import Steady


class Clock:
    """A monotonic clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def watched(lease: float = 10.0) -> tuple[Watch, Clock, Callable[..., None]]:
    clock = Clock()
    watch = Watch(lease, clock)

    def pass_time(seconds: float, beat: Callable[[float], object]) -> None:
        steps = round(seconds / poll_seconds(lease))
        for _ in range(steps):
            clock.now += poll_seconds(lease)
            watch.look({"a": beat(clock.now)})

    return watch, clock, pass_time


def test_silence_for_a_lease_is_death_and_nothing_less() -> None:
    watch, _, pass_time = watched()
    pass_time(60, lambda now: now)
    assert not watch.lapsed("a")
    pass_time(9, lambda now: "still")
    assert not watch.lapsed("a")
    pass_time(2.1, lambda now: "still")
    assert watch.lapsed("a")
    pass_time(1, lambda now: "again")
    assert not watch.lapsed("a")


def test_a_watcher_that_was_paused_takes_nobody_for_dead() -> None:
    watch, clock, pass_time = watched()
    pass_time(5, lambda now: "still")
    clock.now += 1e6
    watch.look({"a": "still"})
    assert not watch.lapsed("a")
    clock.now -= 1e7  # no monotonic clock does that
    watch.look({"a": "still"})
    assert not watch.lapsed("a")


def test_a_driver_without_an_entry_is_waited_for_like_any_other() -> None:
    watch, clock, _ = watched()
    assert not watch.lapsed("gone")
    for _ in range(20):
        watch.look({})
        clock.now += 1.0
    assert watch.lapsed("gone")


def away() -> OperationalError:
    return OperationalError("SELECT 1", {}, Exception("server closed the connection unexpectedly"))


def test_work_goes_on_when_the_server_is_back() -> None:
    steady, tries = Steady("the study", "nas resume here"), []

    def work() -> str:
        tries.append(1)
        if len(tries) < 3:
            raise away()
        return "done"

    assert steady(work) == "done"
    assert len(tries) == 3


def test_a_server_that_stays_away_is_given_up_with_the_way_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nas.steady._PATIENCE", 0.2)
    steady, tries = Steady("the study", "nas resume here"), []

    def work() -> None:
        tries.append(1)
        raise away()

    with pytest.raises(
        RunStopped, match=r"the study cannot be reached .*server closed.* go on with: nas resume here"
    ):
        steady(work)
    count = len(tries)
    assert count >= 2
    with pytest.raises(RunStopped):
        steady(work)
    assert len(tries) == count + 1


def test_what_will_not_pass_is_not_tried_again() -> None:
    tries = []

    def work() -> None:
        tries.append(1)
        raise ValueError("nonsense")

    with pytest.raises(RunStopped, match=r"the study cannot be written: ValueError: nonsense"):
        Steady("the study", "nas resume here")(work)
    assert len(tries) == 1

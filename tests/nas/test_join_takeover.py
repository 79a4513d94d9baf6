"""Drivers of a shared study that die: who is taken for dead, and what becomes of their trials."""

from __future__ import annotations

from pathlib import Path

import pytest

from nas.files import read_record
from nas.reader import read_run
from nas.study import MAX_INTERRUPTIONS, TakenOver
from tests.nas import _joined
from tests.nas._joined import LEASE, Drivers, kill, look
from tests.nas.toys.runs import architectures, toy_result

drivers = _joined.drivers  # a fixture is found by a name in the module of its tests


def test_a_dead_drivers_trial_is_taken_over_and_its_late_result_refused(drivers: Drivers) -> None:
    a, b = drivers("a"), drivers("b")
    trial = a.suggest(architectures()[0])
    look(b)
    assert b.take_over() is None
    b._watch._silent[a._driver] = LEASE
    taken = b.take_over()
    assert taken is not None
    assert (taken.number, taken.interruptions) == (0, 1)
    with pytest.raises(TakenOver, match="trial 0 was taken over by another driver"):
        a.record(trial, toy_result(trial, "failed"))
    assert read_record(drivers.folder / "a" / "trials" / "0" / "result.refused.json")["state"] == "failed"
    assert not (drivers.folder / "a" / "trials" / "0" / "result.json").exists()
    b.record(taken, toy_result(taken))
    assert [(t.number, t.state) for t in look(a)] == [(0, "complete")]
    assert [t.state for t in read_run(drivers.folder / "a").study.trials()] == ["complete"]


def test_parking_what_is_no_longer_ours_changes_nothing(drivers: Drivers) -> None:
    a, b = drivers("a"), drivers("b")
    trial = a.suggest(architectures()[0])
    look(b)
    b._watch._silent[a._driver] = LEASE
    taken = b.take_over()
    assert taken is not None
    a.park(trial)
    b.record(taken, toy_result(taken))
    assert [t.state for t in look(a)] == ["complete"]


def test_two_that_take_over_at_once(drivers: Drivers) -> None:
    a, b, c = drivers("a"), drivers("b"), drivers("c")
    a.suggest(architectures()[0])
    kill(drivers, "a", b, c)
    assert b.take_over() is not None
    assert c.take_over() is None


def test_a_result_that_a_dead_driver_had_left_is_not_evaluated_again(drivers: Drivers) -> None:
    a, b = drivers("a"), drivers("b")
    trial = a.suggest(architectures()[0])
    a._records.write_result(trial, toy_result(trial))
    kill(drivers, "a", b)
    assert b.take_over() is None
    assert [(t.number, t.state) for t in look(b)] == [(0, "complete")]


def test_who_comes_back_goes_on_with_its_own_without_waiting(drivers: Drivers) -> None:
    a = drivers("a")
    begun, left = a.suggest(architectures()[0]), a.suggest(architectures()[1])
    a._records.write_result(left, toy_result(left))
    again = drivers("a")
    assert again.recover() == []
    taken = again.take_over()
    assert taken is not None
    assert (taken.number, taken.interruptions) == (begun.number, 1)
    assert again.take_over() is None
    assert [(t.number, t.state) for t in look(again)] == [(1, "complete")]


def test_a_copy_of_a_directory_does_not_pass_for_the_driver_itself(drivers: Drivers, tmp_path: Path) -> None:
    import shutil

    a = drivers("a")
    a.suggest(architectures()[0])
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    copy = drivers("copy")
    assert copy._driver != a._driver
    assert copy.take_over() is None


def test_a_candidate_that_takes_its_drivers_along_fails_in_the_end(drivers: Drivers) -> None:
    drivers("a").suggest(architectures()[0])
    for count in range(1, MAX_INTERRUPTIONS):
        taken = drivers("a").take_over()
        assert taken is not None
        assert taken.interruptions == count
    last = drivers("a")
    assert last.take_over() is None
    (failed,) = look(last)
    assert failed.result is not None
    assert failed.result.failure is not None
    assert (
        failed.result.failure["reason"]
        == f"the driver died {MAX_INTERRUPTIONS} times while this candidate ran"
    )


def test_a_torn_record_of_a_killed_driver_does_not_spoil_what_the_others_write(tmp_path: Path) -> None:
    drivers = Drivers(tmp_path, f"journal:{tmp_path}/journal")
    try:
        a = drivers("a")
        a.suggest(architectures()[0])
        with open(tmp_path / "journal", "ab") as file:
            file.write(b'{"op_code": 6, "worker')
        a.suggest(architectures()[1])
        b = drivers("b")
        assert [trial.number for trial in b.trials()] == [0, 1]
        assert (tmp_path / "journal.torn-1").read_bytes() == b'{"op_code": 6, "worker'
    finally:
        drivers.close()

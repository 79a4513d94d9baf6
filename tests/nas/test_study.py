"""The study: what is durable when, how it is taken up again, and what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nas.errors import RunStopped, UserMistake
from nas.files import read_record
from nas.reader import read_run
from nas.recorded import write_start
from nas.run_directory import RunDirectory
from nas.storage import DamagedStorage
from nas.study import MAX_INTERRUPTIONS, Study, TrialResult
from spaces import Choice, Float, Int, SearchSpace
from tests.nas.toys import toy
from tests.nas.toys.runs import (
    OBJECTIVES,
    STATES,
    architectures,
    made_run,
    opened,
    summary,
    toy_config,
    toy_result,
)


@pytest.fixture(params=["sqlite", "journal"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str | None:
    """The run's own database, and a journal."""
    return f"journal:{tmp_path}/journal" if request.param == "journal" else None


@pytest.mark.parametrize("place", [None, "journal:{}/journal", "sqlite+pysqlite:///{}/server.db"])
def test_what_was_recorded_is_read_again(tmp_path: Path, place: str | None) -> None:
    """The last of these places is a database that is not known to be a file, as on a server."""
    url = place.format(tmp_path) if place else None
    run = made_run(tmp_path / "run", url, [*STATES, "waiting", "running"])
    study, lines = opened(run, url)
    try:
        assert lines == []
        assert [trial.state for trial in study.trials()] == [*STATES, "waiting", "running"]
        assert [trial.number for trial in study.trials()] == list(range(8))
        assert [trial.architecture for trial in study.trials()] == architectures()
        for trial in study.trials()[:6]:
            assert trial.result is not None
            assert trial.result.same_as(toy_result(trial, trial.state))
            assert read_record(run.trial(trial.number) / "result.json")["key"] == trial.key
    finally:
        run.release()
    reader = Study.read(run, toy.SPACE, OBJECTIVES, toy_config(url).dump())
    assert summary(reader) == summary(study)


def test_what_ran_at_the_death_of_its_driver_waits_again(tmp_path: Path, url: str | None) -> None:
    run = made_run(tmp_path / "run", url, ["complete", "running", "waiting"])
    for deaths in range(1, MAX_INTERRUPTIONS):
        study, _ = opened(run, url)
        waiting = study.recover()
        assert [(trial.number, trial.interruptions) for trial in waiting] == [(1, deaths), (2, 0)]
        claimed = study.claim(waiting[0])
        assert claimed.state == "running"
        with pytest.raises(RunStopped, match="trial 1 was taken by another driver"):
            study.claim(waiting[0])
        run.release()
    study, _ = opened(run, url)
    assert [trial.number for trial in study.recover()] == [2]
    given_up = study.trials()[1].result
    assert given_up is not None
    assert given_up.failure == {
        "kind": "interrupted",
        "reason": f"the driver died {MAX_INTERRUPTIONS} times while this candidate ran",
        "log_tail": "",
    }
    run.release()


@pytest.mark.parametrize("state", ["running", "waiting"])
def test_a_result_that_its_driver_did_not_live_to_record(tmp_path: Path, url: str | None, state: str) -> None:
    run = made_run(tmp_path / "run", url, ["complete", state])
    study, _ = opened(run, url)
    result = toy_result(study.trials()[1])
    study._records.write_result(study.trials()[1], result)
    run.release()
    reader = Study.read(run, toy.SPACE, OBJECTIVES, toy_config(url).dump())
    assert reader.trials()[1].state == "complete"
    study, _ = opened(run, url)
    assert study.trials()[1].state == state
    assert study.recover() == []
    assert study.trials()[1].result is not None
    assert study.trials()[1].result.same_as(result)
    run.release()


def test_a_result_that_came_while_the_run_was_stopped_is_recorded_by_parking(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", states=[])
    study, _ = opened(run)
    trial = study.suggest(architectures()[0])
    study._records.write_result(trial, toy_result(trial))
    assert study.park(trial).state == "complete"
    assert study.park(study.suggest(architectures()[1])).state == "waiting"
    run.release()


def test_a_saved_result_of_another_architecture_is_not_believed(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", states=["complete", "running"])
    shutil.copy(run.trial(0) / "result.json", run.trial(1) / "result.json")
    study, _ = opened(run)
    assert [trial.number for trial in study.recover()] == [1]
    run.release()


def test_a_finished_trial_cannot_be_recorded_again(tmp_path: Path, url: str | None) -> None:
    run = made_run(tmp_path / "run", url, ["complete"])
    study, _ = opened(run, url)
    trial = study.trials()[0]
    other = replace(toy_result(trial), values={"score": 9.0, "cost": 9.0})
    with pytest.raises(RunStopped, match="trial 0 was recorded by another driver"):
        study.record(trial, other)
    run.release()
    study, _ = opened(run, url)
    assert study.trials()[0].result == trial.result
    run.release()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_objectives_are_finite(tmp_path: Path, value: float) -> None:
    run = made_run(tmp_path / "run", states=[])
    study, _ = opened(run)
    trial = study.suggest(architectures()[0])
    with pytest.raises(ValueError, match="objectives must be finite numbers"):
        study.record(trial, TrialResult("complete", values={"score": value, "cost": 1.0}))
    run.release()


def test_nothing_is_written_without_the_lock_or_for_reading(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run")
    study, _ = opened(run)
    run.release()
    with pytest.raises(RunStopped, match="without holding its lock"):
        study.suggest(architectures()[7])
    reader = Study.read(run, toy.SPACE, OBJECTIVES, toy_config().dump())
    run.acquire()
    with pytest.raises(RunStopped, match="opened for reading only"):
        reader.suggest(architectures()[7])
    run.release()


# -- what must not have changed ----------------------------------------------------------------------------------------


def test_a_changed_space_or_objective_is_refused(tmp_path: Path, url: str | None) -> None:
    run = made_run(tmp_path / "run", url)
    config = toy_config(url).dump()
    smaller = SearchSpace("toy", {name: p for name, p in toy.SPACE.parameters.items() if name != "width"})
    run.acquire()
    with pytest.raises(UserMistake, match="the search space 'toy' has changed since this run was started"):
        Study.open(run, smaller, OBJECTIVES, config)
    with pytest.raises(UserMistake, match="started with objectives"):
        Study.open(run, toy.SPACE, [("score", "minimize"), ("cost", "minimize")], config)
    run.release()
    study, lines = opened(run, url)
    run.release()
    assert lines == []
    assert len(study.trials()) == len(STATES)


def test_the_configuration_is_kept_as_started_until_another_is_adopted(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run")
    run.acquire()
    longer = toy_config(trials=99).dump()
    study, _ = Study.open(run, toy.SPACE, OBJECTIVES, longer)
    assert study.started_config()["trials"] == 8
    study.adopt(longer)
    run.release()
    study, _ = opened(run)
    assert study.started_config()["trials"] == 99
    run.release()


# -- storages that several runs share ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sqlite:///{}/shared.db", "journal:{}/shared"])
def test_runs_share_a_storage_without_touching_each_other(tmp_path: Path, kind: str) -> None:
    url = kind.format(tmp_path)
    first = made_run(tmp_path / "first", url)
    second = made_run(tmp_path / "second", url, ["complete", "running"])
    for run, states in ((first, list(STATES)), (second, ["complete", "running"])):
        study, lines = opened(run, url)
        run.release()
        assert lines == []
        assert [trial.state for trial in study.trials()] == states


@pytest.mark.parametrize("kind", ["sqlite:///{}/shared.db", "journal:{}/shared"])
def test_a_run_killed_before_it_had_a_study_takes_nothing_from_the_others(tmp_path: Path, kind: str) -> None:
    url = kind.format(tmp_path)
    other = made_run(tmp_path / "other", url)
    run = RunDirectory(tmp_path / "run")
    run.acquire()
    write_start(run, toy_config(url), {})
    run.release()
    study, lines = opened(run, url)
    run.release()
    assert lines == []
    assert study.trials() == []
    study, lines = opened(other, url)
    other.release()
    assert lines == []
    assert len(study.trials()) == len(STATES)
    assert not list(tmp_path.glob("shared*.damaged-*"))


@pytest.mark.parametrize("kind", ["sqlite:///{}/no/study.db", "journal:{}/no/journal"])
def test_asking_for_a_storage_makes_nothing(tmp_path: Path, kind: str) -> None:
    run = RunDirectory(tmp_path / "run")
    with pytest.raises(UserMistake, match=r"there is no directory .*no; make it, or give another file"):
        Study.require_free(run, {"storage": kind.format(tmp_path)})
    (tmp_path / "no").mkdir()
    Study.require_free(run, {"storage": kind.format(tmp_path)})
    assert list((tmp_path / "no").iterdir()) == []


@pytest.mark.parametrize(
    "kind", ["sqlite:///{}/shared.db", "journal:{}/shared", "sqlite+pysqlite:///{}/server.db"]
)
def test_the_study_of_another_run_of_the_same_name_is_not_taken_over(tmp_path: Path, kind: str) -> None:
    url = kind.format(tmp_path)
    made_run(tmp_path / "a" / "run", url)
    run = RunDirectory(tmp_path / "b" / "run")
    run.acquire()
    config = toy_config(url)
    with pytest.raises(UserMistake, match="a study named 'run' is already there"):
        Study.require_free(run, config.dump())
    Study.require_free(RunDirectory(tmp_path / "b" / "another"), config.dump())
    facts = write_start(run, config, {})
    with pytest.raises(UserMistake, match="a study named 'run' is already there"):
        Study.create(run, toy.SPACE, OBJECTIVES, config.dump(), facts)
    with pytest.raises(UserMistake, match="the study 'run' there belongs to another run"):
        Study.open(run, toy.SPACE, OBJECTIVES, config.dump(), facts)
    run.release()


def test_a_damaged_shared_file_is_mended_by_each_of_its_runs(tmp_path: Path) -> None:
    url = f"journal:{tmp_path}/shared"
    runs = [made_run(tmp_path / name, url) for name in ("first", "second")]
    data = (tmp_path / "shared").read_bytes()
    (tmp_path / "shared").write_bytes(b"x" + data[1:])
    told = []
    for run in runs:
        study, lines = opened(run, url)
        run.release()
        assert [trial.state for trial in study.trials()] == list(STATES)
        told.append(lines)
    assert told[0][-1] == "shared was built again with 6 trials; the old file is kept as shared.damaged-1"
    assert told[1] == ["shared lacked 6 trials, restored from their records"]
    for run in runs:
        study, lines = opened(run, url)
        run.release()
        assert lines == []


@pytest.mark.parametrize("kind", ["sqlite:///{}/shared.db", "journal:{}/shared"])
def test_the_record_of_another_run_in_a_damaged_file_is_not_ours(tmp_path: Path, kind: str) -> None:
    url = kind.format(tmp_path)
    made_run(tmp_path / "first", url)
    second = made_run(tmp_path / "second", url)
    path = tmp_path / ("shared" if url.startswith("journal") else "shared.db")
    data = path.read_bytes()
    last = data.rfind(b'"score": 0.9')
    path.write_bytes(data[:last] + b'"score": 0.8' + data[last + 12 :])
    second.environment.unlink()
    assert summary(read_run(second.path).study)[0][1] == toy.SPACE.key(architectures()[0])
    study, _ = opened(second, url)
    second.release()
    assert [trial.state for trial in study.trials()] == list(STATES)


def test_a_run_is_read_without_its_server(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    url = f"sqlite+pysqlite:///{tmp_path}/gone/server.db"
    (tmp_path / "gone").mkdir()
    run = made_run(tmp_path / "run", url)
    shutil.rmtree(tmp_path / "gone")
    found = read_run(run.path)
    assert [trial.state for trial in found.study.trials()] == list(STATES)
    assert "cannot be opened" in caplog.text
    with pytest.raises(UserMistake, match="cannot be opened"):
        opened(run, url)
    run.release()


def test_a_damaged_server_is_not_rebuilt_behind_its_owner(tmp_path: Path) -> None:
    import sqlite3

    url = f"sqlite+pysqlite:///{tmp_path}/server.db"
    run = made_run(tmp_path / "run", url)
    with sqlite3.connect(tmp_path / "server.db") as connection:
        connection.execute("UPDATE trial_values SET value = 0")
    connection.close()
    with pytest.raises(UserMistake, match="its values disagree with its result; repair it on its server"):
        opened(run, url)
    run.release()


@pytest.mark.parametrize("moment", ["study", "half", "nothing"])
@pytest.mark.parametrize("place", [None, "journal:{}/journal", "sqlite+pysqlite:///{}/server.db"])
def test_killed_while_the_study_was_made(tmp_path: Path, place: str | None, moment: str) -> None:
    url = place.format(tmp_path) if place else None
    from nas.storage import close_storage, open_storage
    from nas.stored import make_study

    run = RunDirectory(tmp_path / "run")
    run.acquire()
    write_start(run, toy_config(url), {})
    if moment != "nothing":
        storage = open_storage(Study.url(run, url))
        if moment == "study":
            make_study(storage, "run", OBJECTIVES)
        close_storage(storage, Study.url(run, url))
    run.release()
    study, lines = opened(run, url)
    trial = study.suggest(architectures()[0])
    study.record(trial, toy_result(trial))
    run.release()
    assert lines == []
    study, lines = opened(run, url)
    run.release()
    assert lines == []
    assert len(study.trials()) == 1


def test_a_renamed_directory_is_the_same_run(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run")
    run.path.rename(tmp_path / "renamed")
    study, lines = opened(RunDirectory(tmp_path / "renamed"))
    study.run.release()
    assert lines == []
    assert len(study.trials()) == len(STATES)


# -- odd parameters and odd folders ------------------------------------------------------------------------------------


def test_every_kind_of_value_survives(tmp_path: Path, url: str | None) -> None:
    space = SearchSpace(
        "kinds",
        {
            "mixed": Choice([None, True, 1, 1.5, "x", ""]),
            "other": Choice([False, 0, "0"]),
            "whole": Int(-5, 10**9, step=5),
            "rate": Float(1e-12, 1e12, log=True),
            "plain": Float(-1.0, 1.0),
            "käse/ü": Choice(["ß", "\n"]),
        },
    )
    run = RunDirectory(tmp_path / "run")
    run.acquire()
    config: dict[str, Any] = {"storage": url}
    study = Study.create(run, space, [("x", "minimize")], config)
    points = [
        {"mixed": None, "other": 0, "whole": -5, "rate": 1e-12, "plain": 0.1 + 0.2, "käse/ü": "\n"},
        {
            "mixed": 1,
            "other": False,
            "whole": 10**9,
            "rate": 0.30000000000000004,
            "plain": -1.0,
            "käse/ü": "ß",
        },
        {"mixed": True, "other": "0", "whole": 0, "rate": 1e12, "plain": 1e-320, "käse/ü": "ß"},
    ]
    for point in points:
        study.record(study.suggest(point), TrialResult("complete", values={"x": 1e-300}))
    run.release()
    run.acquire()
    again, lines = Study.open(run, space, [("x", "minimize")], config)
    run.release()
    assert lines == []
    found = [trial.architecture for trial in again.trials()]
    assert found == points
    assert [[type(value) for value in point.values()] for point in found] == [
        [type(value) for value in space.canonical(point).values()] for point in points
    ]


def test_a_stray_folder_among_the_trials_is_left_alone(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run")
    for name in ("999999999", "notes", "17"):
        (run.trials / name).mkdir()
    (run.trials / "999999999" / "architecture.json").write_text("{}")
    study, lines = opened(run)
    run.release()
    assert lines == []
    assert len(study.trials()) == len(STATES)
    run.database.unlink()
    study, lines = opened(run)
    run.release()
    assert lines == ["study.db lacked 6 trials, restored from their records"]
    assert (run.trials / "notes").exists()


def test_records_of_another_run_are_not_taken_for_ours(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", states=["complete"])
    other = made_run(tmp_path / "other", states=["complete", "complete"])
    shutil.copytree(other.trial(1), run.trial(1))
    study, lines = opened(run)
    run.release()
    assert lines == []
    assert len(study.trials()) == 1


def test_nothing_at_all_is_damage_only_if_something_was_there(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", states=[])
    run.database.write_bytes(b"x" * 3000)
    with pytest.raises(DamagedStorage, match=r"study\.db is damaged"):
        Study.read(run, toy.SPACE, OBJECTIVES, toy_config().dump())
    study, lines = opened(run)
    run.release()
    assert study.trials() == []
    assert "damaged" in lines[0]


def test_the_sealed_records_can_be_read_by_a_person(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run")
    text = (run.trial(0) / "architecture.json").read_text()
    found = json.loads(text)
    assert text.count("\n") > 8
    assert found["architecture"] == architectures()[0]
    assert found["name"] == "plain"
    assert found["number"] == 0

"""A study that several drivers share: who gets which architecture, whose result counts, what is refused."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from nas.cli.main import main as nas
from nas.drivers import PREFIX
from nas.errors import UserMistake
from nas.joining import JoinedStudy
from nas.reader import read_run
from nas.run_directory import RunDirectory
from nas.shared import joined_settings, require_shareable, shared_identity
from nas.study import KeyTaken, StudyFull
from spaces import Choice, SearchSpace
from tests.nas import _joined
from tests.nas._joined import Drivers, look
from tests.nas.toys import toy
from tests.nas.toys.runs import architectures, made_run, toy_config, toy_result

drivers = _joined.drivers  # a fixture is found by a name in the module of its tests


# -- reserving ---------------------------------------------------------------------------------------------------------


def test_an_architecture_is_reserved_by_one_driver_alone(drivers: Drivers) -> None:
    a, b = drivers("a"), drivers("b")
    first, second, third = architectures()[:3]
    assert a.suggest(first).number == 0
    with pytest.raises(KeyTaken, match="trial 0 is of the same architecture"):
        b.suggest(first)
    assert b.suggest(second, seed=lambda number: 10 + number).seed == 11
    assert a.suggest(third).number == 2
    assert [trial.key for trial in look(a)] == [toy.SPACE.key(second)]
    assert {trial.number for trial in b.trials()} == {0, 1}
    assert [trial.number for trial in look(b)] == [0, 2]
    assert look(a) == look(b) == []


def test_many_threads_of_many_drivers_never_get_the_same(drivers: Drivers) -> None:
    if not drivers.url.startswith("journal:"):
        pytest.skip("SQLite has no lock on a row; tests/nas/faults/test_postgresql.py tries a server")
    studies = [drivers(name, trials=20) for name in "abc"]
    everything = list(toy.SPACE.enumerate())[:30]
    got: list[int] = []

    def reserve(study: JoinedStudy) -> None:
        for architecture in everything:
            try:
                got.append(study.suggest(architecture).number)
            except KeyTaken:
                continue
            except StudyFull:
                return

    threads = [threading.Thread(target=reserve, args=(study,)) for study in studies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == list(range(20))
    look(studies[0])
    assert len({trial.key for trial in studies[0].trials()}) == 20


def test_the_total_is_one_for_all_and_only_grows(drivers: Drivers) -> None:
    a, b = drivers("a", trials=2), drivers("b", trials=1)
    assert b.total(1) == 2
    for architecture, study in zip(architectures()[:2], (a, b), strict=True):
        study.suggest(architecture)
    with pytest.raises(StudyFull, match="all 2 trials are reserved"):
        a.suggest(architectures()[2])
    b.adopt(toy_config(trials=3).dump())
    look(a)
    assert a.total(2) == 3
    assert a.suggest(architectures()[2]).number == 2


def test_each_driver_has_a_seed_of_its_own_and_keeps_it(drivers: Drivers) -> None:
    seeds = {name: drivers(name).controller_seed(5) for name in "abc"}
    assert seeds["a"] == 5
    assert len(set(seeds.values())) == 3
    assert {name: drivers(name).controller_seed(5) for name in "cab"} == seeds


# -- results -----------------------------------------------------------------------------------------------------------


def test_results_reach_the_others_once_and_every_directory_reports_all(drivers: Drivers) -> None:
    a, b = drivers("a"), drivers("b")
    mine, other = a.suggest(architectures()[0]), b.suggest(architectures()[1])
    look(a)
    b.record(other, toy_result(other))
    told = look(a)
    assert [(trial.number, trial.state) for trial in told] == [(1, "complete")]
    assert told[0].result is not None
    assert told[0].result.same_as(toy_result(other))
    assert look(a) == []
    a.record(mine, toy_result(mine, "failed"))
    assert not a.others_at_work()
    for name in "ab":
        assert [trial.state for trial in read_run(drivers.folder / name).study.trials()] == [
            "failed",
            "complete",
        ]
    assert not (drivers.folder / "a" / "trials" / "1").exists()


def test_what_is_parked_is_run_by_whoever_comes_first(drivers: Drivers) -> None:
    a, b, c = drivers("a"), drivers("b"), drivers("c")
    trial = a.suggest(architectures()[0], name="plain", seed=7)
    assert b.take_over() is None
    a.park(trial)
    look(b), look(c)
    taken = b.take_over()
    assert taken is not None
    assert (taken.number, taken.key, taken.name, taken.seed, taken.interruptions) == (
        0,
        trial.key,
        "plain",
        7,
        0,
    )
    assert c.take_over() is None
    assert (drivers.folder / "b" / "trials" / "0" / "architecture.json").exists()
    b.record(taken, toy_result(taken))
    assert [t.state for t in look(c)] == ["complete"]


def test_weights_of_the_others_are_there_for_the_report(drivers: Drivers) -> None:
    a, b = drivers("a"), drivers("b")

    def leave(study: JoinedStudy, number: int, text: str, sha256: str) -> None:
        (study.run.trial(number) / "weights.safetensors").write_text(text)
        (study.run.trial(number) / "weights.safetensors.sha256").write_text(
            f"{sha256}  weights.safetensors\n"
        )

    for study, architecture in zip((a, b), architectures(), strict=False):
        trial = study.suggest(architecture)
        leave(study, trial.number, f"weights.safetensors of {trial.number}", str(trial.number) * 64)
        study.record(trial, replace(toy_result(trial), weights_sha256=str(trial.number) * 64))
    look(b)
    b._records.write_suggestion(b.trials()[0])
    leave(b, 0, "those of an attempt that came too late", "f" * 64)
    b.gather()
    for number in (0, 1):
        weights = drivers.folder / "b" / "trials" / str(number) / "weights.safetensors"
        assert weights.read_text() == f"weights.safetensors of {number}"
    assert not (drivers.folder / "a" / "trials" / "1").exists()
    (drivers.folder / "b" / "trials" / "0" / "weights.safetensors").unlink()
    assert (drivers.folder / "a" / "trials" / "0" / "weights.safetensors").exists()


# -- what gets lost on the way ----------------------------------------------------------------------------------------


def test_signs_of_life_are_written(tmp_path: Path) -> None:
    drivers = Drivers(tmp_path, f"journal:{tmp_path}/journal")
    try:
        a, b = drivers("a"), drivers("b")

        def beat() -> Any:
            return b._steady(lambda: b._ledger_here().study_attributes())[PREFIX + a._driver]["beat"]

        before = beat()
        a._beat(before + 1)
        assert beat() == before + 1
    finally:
        drivers.close()


def away() -> OperationalError:
    return OperationalError("SELECT 1", {}, Exception("server closed the connection unexpectedly"))


def lose_the_answer(study: JoinedStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next change reaches the server, and the word that it has does not reach us."""
    original = type(study)._exclusively
    lost: list[int] = []

    from contextlib import contextmanager

    @contextmanager
    def exclusively(self: JoinedStudy) -> Iterator[Any]:
        with original(self) as ledger:
            yield ledger
        if self is study and not lost:
            lost.append(1)
            raise away()

    monkeypatch.setattr(JoinedStudy, "_exclusively", exclusively)


def test_an_answer_that_is_lost_makes_nothing_happen_twice(
    drivers: Drivers, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = drivers("a"), drivers("b")
    with monkeypatch.context() as context:
        lose_the_answer(a, context)
        trial = a.suggest(architectures()[0])
    assert trial.number == 0
    assert len(a.trials()) == 1
    with monkeypatch.context() as context:
        lose_the_answer(a, context)
        assert a.record(trial, toy_result(trial)).state == "complete"
    waiting = a.suggest(architectures()[1])
    with monkeypatch.context() as context:
        lose_the_answer(a, context)
        a.park(waiting)
    look(b)
    with monkeypatch.context() as context:
        lose_the_answer(b, context)
        assert b.take_over() is not None
    assert [t.state for t in b.trials()] == ["complete", "running"]
    assert look(b) == []


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (None, r"--join: needs a storage that all drivers reach; give --storage postgresql://"),
        (
            "sqlite:///x.db",
            r"--storage sqlite:///x\.db: drivers cannot share a SQLite file .* or journal:FILE",
        ),
        ("journal:/nowhere/at/all", r"there is no directory /nowhere/at"),
    ],
)
def test_storages_that_cannot_be_shared(url: str | None, message: str) -> None:
    with pytest.raises(UserMistake, match=message):
        require_shareable(url)


def test_the_command_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as ended:
        nas(["search", "--space", f"{toy.__file__}:SPACE", "--join", "x", "--out", str(out)])
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not out.exists()


def test_a_study_whose_driver_is_alone_is_not_joined(tmp_path: Path) -> None:
    url = f"journal:{tmp_path}/journal"
    made_run(tmp_path / "alone", url)
    with pytest.raises(
        UserMistake, match=r"--join alone: the study of this name .* was not begun with --join"
    ):
        shared_identity(RunDirectory(tmp_path / "new"), url, "alone")


def test_other_settings_are_refused_and_own_ones_taken(drivers: Drivers) -> None:
    a = drivers("a", trials=4, workers=2, time_budget=60, trial_timeout=77, cpus_per_trial=2)
    identity = shared_identity(a.run, drivers.url, "shared")
    assert identity is not None
    with pytest.raises(UserMistake, match=r"--join shared: .*other settings \(controller: tpe -> random\)"):
        joined_settings({"join": "shared", "controller": "random"}, identity)
    with pytest.raises(UserMistake, match=r"evaluator: .*toy\.py:evaluate -> .*toy\.py:odd"):
        joined_settings({"join": "shared", "evaluator": "toy.py:odd"}, identity)
    mine = joined_settings({"space": "elsewhere/toy.py:SPACE", "workers": 3, "join": "shared"}, identity)
    assert (mine["space"], mine["workers"], mine["trials"]) == ("elsewhere/toy.py:SPACE", 3, 4)
    theirs = joined_settings({"join": "shared"}, identity)
    assert not {"workers", "time_budget", "cpus_per_trial"} & theirs.keys()
    assert theirs["trial_timeout"] == 77


def test_another_space_is_refused(drivers: Drivers) -> None:
    drivers("a")
    other = SearchSpace("toy", {"depth": Choice([1, 2])})
    with pytest.raises(UserMistake, match=r"--join shared: the study there has another search space"):
        drivers("b", space=other)


def test_a_study_that_is_gone_is_not_made_again_on_resume(drivers: Drivers, tmp_path: Path) -> None:
    drivers("a")
    drivers.leave("a")
    for name in ("journal", "server.db"):
        (tmp_path / name).unlink(missing_ok=True)
    with pytest.raises(UserMistake, match=r"there is no study 'shared'; restore it from its backup"):
        drivers("a")


def test_a_directory_that_is_not_there_needs_a_study_of_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"journal:{tmp_path}/journal"
    made_run(tmp_path / "one", url)
    with pytest.raises(SystemExit) as ended:
        nas(["resume", str(tmp_path / "two"), "--storage", url])
    assert ended.value.code == 2
    assert (
        "there is no study 'two' (it has one); give the run directory the study's name"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "two").exists()


def test_a_shared_study_is_joined_and_not_resumed_from_nothing(
    drivers: Drivers, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drivers("a")
    drivers.close()
    with pytest.raises(SystemExit) as ended:
        nas(["resume", str(tmp_path / "shared"), "--storage", drivers.url])
    assert ended.value.code == 2
    assert "join it: nas search --join shared --storage ... --out" in capsys.readouterr().err

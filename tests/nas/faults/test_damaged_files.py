"""Faults 10 and 11 for the files that people read: each is kept twice, and damage to one copy costs nothing."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nas.doctor import repair
from nas.errors import UserMistake
from nas.executors import InlineExecutor
from nas.files import read_record, write_record
from nas.reader import read_run
from nas.recorded import read_recorded
from nas.run_directory import RunDirectory
from nas.session import Session
from tests.nas.faults.bench import Bench, Zygote
from tests.nas.toys.runs import STATES, made_run, opened, summary, toy_config

SLOW = [pytest.mark.slow, pytest.mark.timeout(600)]


class Notes:
    """An observer that keeps what a person would be told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.finished_trials: list[int] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def finished(self, trial: Any) -> None:
        self.finished_trials.append(trial.number)

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


class Original:
    """A finished run, and copies of it to be damaged."""

    def __init__(self, folder: Path, storage: str | None = None):
        self.folder = folder
        self.run = made_run(folder / "run", storage)
        study, _ = opened(self.run, storage)
        self.summary = summary(study)
        self.run.release()
        shutil.copytree(self.run.path, folder / "kept")
        self.recipe = self.run.recipe.read_bytes()
        self.config = read_recorded(self.run).config

    def restore(self) -> RunDirectory:
        shutil.rmtree(self.run.path)
        shutil.copytree(self.folder / "kept", self.run.path)
        return RunDirectory(self.run.path)

    def resume(self, **given: Any) -> list[str]:
        """What the same command says; it may run nothing again."""
        notes = Notes()
        Session(self.run.path, notes, InlineExecutor()).run({"trials": len(STATES), **given})
        assert notes.finished_trials == []
        return notes.notes


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Original:
    return Original(tmp_path_factory.mktemp("files"))


@pytest.fixture(autouse=True)
def _plain_report(monkeypatch: pytest.MonkeyPatch) -> None:
    import nas.conclude

    monkeypatch.setattr(nas.conclude, "write_report_files", lambda report, run: None)


def damages(data: bytes, step: int) -> Iterator[bytes]:
    """Cut short, and with one bit flipped, at many places; nothing at all, and zeros, as after a loss of power."""
    yield b""
    yield bytes(len(data))
    for position in range(0, len(data), step):
        yield data[:position]
        yield data[:position] + bytes([data[position] ^ (1 << position % 8)]) + data[position + 1 :]


def check_told(lines: list[str], path: Path) -> None:
    assert any(str(path) in line and "damaged" in line for line in lines), lines
    assert all("\n" not in line for line in lines)


@pytest.mark.parametrize("step", [173, pytest.param(5, marks=SLOW)])
@pytest.mark.parametrize(
    "name", ["trials/0/architecture.json", "trials/3/result.json", "trials/2/result.json"]
)
def test_records_of_a_trial(original: Original, name: str, step: int) -> None:
    path = original.run.path / name
    whole = (original.folder / "kept" / name).read_bytes()
    told = 0
    for data in damages(whole, step):
        run = original.restore()
        path.write_bytes(data)
        assert summary(read_run(run.path).study) == original.summary
        study, lines = opened(run)
        run.release()
        assert summary(study) == original.summary
        assert json.loads(path.read_text()) == json.loads(whole)
        if lines:  # white space can change without harm
            told += 1
            check_told(lines, path)
            assert path.with_name(f"{path.name}.damaged-1").read_bytes() == data
    assert told > 3


def test_record_and_row_of_different_trials_damaged(original: Original) -> None:
    """Two faults at once: as long as one copy of each is whole, nothing is lost."""
    run = original.restore()
    data = run.database.read_bytes()
    run.database.write_bytes(
        data.replace(b'"number": 1, "architecture": {"depth": 1', b'"number": 1, "architecture": {"depth": 2')
    )
    assert run.database.read_bytes() != data
    for name in ("trials/0/architecture.json", "trials/0/result.json", "trials/3/result.json"):
        (run.path / name).write_bytes(b"")
    assert summary(read_run(run.path).study) == original.summary
    study, lines = opened(run)
    run.release()
    assert summary(study) == original.summary
    assert "study.db was built again with 6 trials" in " ".join(lines)


def test_both_copies_of_one_trial_damaged(original: Original, caplog: pytest.LogCaptureFixture) -> None:
    """What is lost is named, the others stay, and numbers do not shift."""
    run = original.restore()
    data = run.database.read_bytes()
    run.database.write_bytes(
        data.replace(b'"number": 1, "architecture": {"depth": 1', b'"number": 1, "architecture": {"depth": 2')
    )
    (run.path / "trials/1/architecture.json").write_bytes(b"{")
    others = [entry for entry in original.summary if entry[0] != 1]
    with caplog.at_level(logging.WARNING):
        assert summary(read_run(run.path).study) == others
    assert "trial 1 is left out: " in caplog.text
    study, lines = opened(run)
    run.release()
    assert summary(study) == others
    assert any(line.startswith("trial 1 is lost: ") for line in lines), lines
    again, more = opened(run)
    run.release()
    assert more == []
    assert summary(again) == others


@pytest.mark.parametrize("step", [499, pytest.param(13, marks=SLOW)])
def test_environment(original: Original, step: int, caplog: pytest.LogCaptureFixture) -> None:
    path = original.run.environment
    whole = (original.folder / "kept" / "environment.json").read_bytes()
    facts = read_record(original.folder / "kept" / "environment.json")
    for data in damages(whole, step):
        run = original.restore()
        path.write_bytes(data)
        caplog.clear()
        assert read_run(run.path).facts == facts
        lines = original.resume()
        if lines:
            check_told(lines, path)
        assert read_record(path) == facts


@pytest.mark.parametrize("step", [307, pytest.param(9, marks=SLOW)])
def test_recipe(original: Original, step: int) -> None:
    """A recipe that cannot be used is put back. One that says something else could be a person's wish: it is told, or
    refused where it would change what results mean, and ``nas doctor --repair`` puts the original back."""
    outcomes = {"told": 0, "refused": 0, "same": 0}
    path = original.run.recipe
    for data in damages(original.recipe, step):
        run = original.restore()
        path.write_bytes(data)
        assert summary(read_run(run.path).study) == original.summary
        try:
            lines = original.resume()
        except UserMistake as mistake:
            outcomes["refused"] += 1
            assert str(path) in str(mistake)
            assert "nas doctor --repair" in str(mistake)
        else:
            outcomes["told" if lines else "same"] += 1
            assert all(str(path) in line for line in lines)
            if not lines:
                assert read_recorded(run).config.dump() == {**original.config.dump(), "trials": len(STATES)}
        run = original.restore()
        path.write_bytes(data)
        lines = repair(run.path)
        assert read_recorded(run).config == original.config
        assert lines or data.split() == original.recipe.split() or read_recorded(run).damage == {}
        assert repair(run.path) == []
    assert outcomes["told"] > 1
    assert outcomes["refused"] > 0 or step > 50


@pytest.mark.parametrize(
    "name",
    ["recipe.yaml", "environment.json", "study.db", "trials/0/architecture.json", "trials/0/result.json"],
)
@pytest.mark.parametrize("storage", ["sqlite", "journal"])
def test_deleted(tmp_path: Path, name: str, storage: str) -> None:
    url = f"journal:{tmp_path / 'journal'}" if storage == "journal" else None
    if storage == "journal" and name == "study.db":
        name = "../journal"
    original = Original(tmp_path, url)
    (original.run.path / name).unlink()
    assert summary(read_run(original.run.path).study) == original.summary
    original.resume()
    assert (original.run.path / name).exists()
    study, lines = opened(original.run, url)
    original.run.release()
    assert lines == []
    assert summary(study) == original.summary


def test_finalists(original: Original, caplog: pytest.LogCaptureFixture) -> None:
    run = original.restore()
    write_record(run.finalists, {"finalists": [{"number": 0, "median_ms": 1.5}]})
    whole = run.finalists.read_bytes()
    assert read_run(run.path).report().finalists == [{"number": 0, "median_ms": 1.5}]
    for data in damages(whole, 41):
        run.finalists.write_bytes(data)
        caplog.clear()
        found = read_run(run.path).report().finalists
        assert found is None or json.loads(data) == json.loads(whole)
        assert found is not None or "the finalists will be judged again" in caplog.text
    run.finalists.write_bytes(whole[:-20])
    lines = repair(run.path)
    assert len(lines) == 1
    assert "measures the finalists again" in lines[0]
    assert not run.finalists.exists()
    assert repair(run.path) == []


def test_doctor_mends_everything_at_once(original: Original) -> None:
    run = original.restore()
    run.database.write_bytes(bytes(64) + run.database.read_bytes()[64:])
    run.recipe.write_text("seed: [")
    (run.path / "trials/4/result.json").write_bytes(b"\0" * 50)
    lines = repair(run.path)
    assert len(lines) >= 3
    assert repair(run.path) == []
    assert read_recorded(run).config == original.config
    assert [entry for entry in summary(read_run(run.path).study) if entry[0] != 4] == [
        entry for entry in original.summary if entry[0] != 4
    ]


def test_nothing_is_left_to_mend_with(original: Original) -> None:
    run = original.restore()
    for path in (run.recipe, run.environment, run.database):
        path.write_bytes(b"?")
    with pytest.raises(UserMistake, match=r"recipe\.yaml: .*no other copy of it can be read"):
        repair(run.path)
    with pytest.raises(UserMistake, match="no other copy"):
        read_run(run.path)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("recipe.yaml", b"trials: {"),
        ("study.db", b"x" * 5000),
        ("environment.json", b"{}"),
        ("trials/1/result.json", b""),
    ],
)
def test_the_command_itself_goes_on(
    drivers: Zygote, expected: dict[str, dict[str, float]], tmp_path: Path, name: str, data: bytes
) -> None:
    bench = Bench(tmp_path, trials=4)
    assert drivers.run(bench) == 0
    (bench.out / name).write_bytes(data)
    code, text = drivers.start(bench, report=True, arguments=["report", str(bench.out)]).finish()
    assert code == 0, text
    assert "Traceback" not in text
    before, recorded = bench.evaluations(), bench.recorded()
    bench.trials = 6
    assert drivers.run(bench) == 0, bench.log.read_text()
    text = bench.log.read_text()
    assert f"{Path(name).name} is damaged: " in text, text
    bench.check_evaluations(before, recorded, kills=0)
    assert bench.values() == expected
    for path in bench.out.rglob("*.damaged-*"):
        path.unlink()
    bench.check_finished(expected)


def test_a_setting_that_changes_the_meaning_of_results_is_refused(original: Original) -> None:
    run = original.restore()
    run.recipe.write_text(run.recipe.read_text().replace("seed: 0", "seed: 1"))
    text = (
        r"recipe\.yaml: differs from what the run was started with \(seed: 0 -> 1\); .* 'nas doctor --repair "
    )
    with pytest.raises(UserMistake, match=text):
        original.resume()
    assert read_run(run.path).config.seed == 0
    assert "had been edited and was written anew" in repair(run.path)[0]
    assert original.resume() == []


def test_changed_settings_are_told(original: Original) -> None:
    run = original.restore()
    run.recipe.write_text(run.recipe.read_text().replace("retries: 2", "retries: 5"))
    assert original.resume() == [f"{run.recipe} was changed since the last session: retries: 2 -> 5"]
    assert original.resume() == []
    assert toy_config().retries == 2

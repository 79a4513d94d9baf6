"""Faults 10 and 11 for ``study.db``: truncated, flipped bits in many places, zeroed, deleted, a damaged log."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from nas.reader import read_run
from nas.run_directory import RunDirectory
from nas.study import Study
from tests.nas.toys import toy
from tests.nas.toys.runs import OBJECTIVES, architectures, made_run, opened, summary, toy_config, toy_result

SLOW = [pytest.mark.slow, pytest.mark.timeout(900)]


class Original:
    """A run with its own database, and copies of it to be damaged."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.run = made_run(folder / "run")
        self.bytes = self.run.database.read_bytes()
        study, lines = opened(self.run)
        self.run.release()
        assert lines == []
        self.summary = summary(study)
        shutil.copytree(folder / "run", folder / "kept")

    def restore(self, data: bytes | None = None) -> RunDirectory:
        shutil.rmtree(self.run.path)
        shutil.copytree(self.folder / "kept", self.run.path)
        if data is not None:
            self.run.database.write_bytes(data)
        return RunDirectory(self.run.path)

    def check(self, run: RunDirectory) -> list[str]:
        """A reader sees everything and writes nothing; a driver mends the study and can go on; what was, is kept."""
        before = run.database.read_bytes() if run.database.exists() else None
        assert summary(read_run(run.path).study) == self.summary
        assert (run.database.read_bytes() if run.database.exists() else None) == before
        study, lines = opened(run)
        try:
            assert summary(study) == self.summary
            trial = study.suggest(architectures()[7])
            study.record(trial, toy_result(trial))
        finally:
            run.release()
        again, more = opened(run)
        run.release()
        assert more == []
        assert summary(again)[:-1] == self.summary
        assert all(len(line) < 400 and "\n" not in line for line in lines), lines
        if before and "kept as" in " ".join(lines):
            assert (run.path / "study.db.damaged-1").stat().st_size == len(before)
        return lines


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Original:
    return Original(tmp_path_factory.mktemp("database"))


@pytest.mark.parametrize("step", [32768, pytest.param(2048, marks=SLOW)])
def test_truncated(original: Original, step: int) -> None:
    for size in [*range(0, len(original.bytes), step), len(original.bytes) - 1, 1, 100]:
        lines = original.check(original.restore(original.bytes[:size]))
        assert "study.db" in " ".join(lines), size


@pytest.mark.parametrize("step", [512 * 37, pytest.param(512, marks=SLOW)])
def test_flipped_bytes(original: Original, step: int) -> None:
    """Many places of a database hold nothing that is used: what counts is that nothing false is believed."""
    mended = 0
    for start in range(0, len(original.bytes), step):
        position = min(start + (start // 512 * 37) % 512, len(original.bytes) - 1)
        data = bytearray(original.bytes)
        data[position] ^= 0xFF
        mended += bool(original.check(original.restore(bytes(data))))
    assert mended >= 1


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda data: bytes(100) + data[100:], id="zeroed header"),
        pytest.param(lambda data: bytes(len(data)), id="all zero"),
        pytest.param(lambda data: b"not a database\n" * 400, id="text"),
        pytest.param(lambda data: data[:4096] + bytes(4096) + data[8192:], id="zeroed page"),
        pytest.param(lambda data: data.replace(b"COMPLETE", b"COMPLETF"), id="unknown states"),
        pytest.param(lambda data: data.replace(b"MAXIMIZE", b"MINIMIZE"), id="other directions"),
        pytest.param(lambda data: data.replace(b'"depth": 2', b'"depth": 3'), id="other architectures"),
        pytest.param(
            lambda data: data.replace(b'"score": 0.99', b'"score": 0.11'), id="other values in records"
        ),
    ],
)
def test_damaged(original: Original, change: Callable[[bytes], bytes]) -> None:
    data = change(original.bytes)
    assert data != original.bytes
    lines = original.check(original.restore(data))
    assert "study.db" in lines[0]
    assert "damaged" in lines[0]
    assert "study.db was built again with 6 trials; the old file is kept as study.db.damaged-1" in lines


def test_deleted(original: Original) -> None:
    run = original.restore()
    run.database.unlink()
    assert original.check(run) == ["study.db lacked 6 trials, restored from their records"]


@pytest.mark.parametrize(
    ("statement", "told"),
    [
        (
            "UPDATE trial_values SET value = value + 1e-9 WHERE trial_id = 2",
            "its values disagree with its result",
        ),
        ("UPDATE trial_params SET param_value = 1 WHERE trial_id = 2 AND param_name = 'width'", "parameters"),
        ("UPDATE trials SET state = 'WAITING' WHERE trial_id = 4", None),
        ("UPDATE trials SET state = 'FAIL' WHERE trial_id = 4", "it is failed without a result that says so"),
        ("UPDATE trials SET number = 5 WHERE trial_id = 4", "its number is 5"),
        ("UPDATE trials SET datetime_start = 'yesterday'", None),
        ("DELETE FROM trials WHERE trial_id = 3", "it was suggested as another trial"),
        ("DELETE FROM trials WHERE trial_id = 6", None),
        (
            "DELETE FROM trial_user_attributes WHERE trial_id = 3",
            "its suggestion is damaged: holds no record",
        ),
        ("DELETE FROM study_user_attributes", "the record of the study is damaged"),
        ("DELETE FROM study_system_attributes", "names of the objectives"),
        ("DELETE FROM study_directions", "directions"),
        ("UPDATE studies SET study_name = 'another'", None),
        (
            "UPDATE trial_params SET distribution_json = '{}' WHERE trial_id = 2",
            "its distributions are not those",
        ),
        ("DROP TABLE trial_params", "study.db is damaged"),
        ("UPDATE alembic_version SET version_num = 'v9'", "study.db is damaged"),
        (
            "UPDATE trial_user_attributes SET value_json = (SELECT value_json FROM trial_user_attributes "
            "WHERE trial_id = 6 AND key = 'result') WHERE trial_id = 4 AND key = 'result'",
            "its result is another one's",
        ),
    ],
)
def test_changed_by_hand(original: Original, statement: str, told: str | None) -> None:
    """What SQLite's own check cannot know: records that contradict their seals or each other."""
    run = original.restore()
    with sqlite3.connect(run.database) as connection:
        connection.execute(statement)
    connection.close()
    study, lines = opened(run)
    try:
        study.recover()
        assert summary(study) == original.summary
    finally:
        run.release()
    if told is not None:
        assert told in lines[0], lines


def killed_in_the_middle(folder: Path) -> tuple[RunDirectory, Path]:
    """A run, and an image of its directory as a killed driver leaves it, with SQLite's log beside the database."""
    run = RunDirectory(made_run(folder / "run", states=("complete",)).path)
    study, _ = opened(run)
    for architecture in architectures()[1:5]:
        trial = study.suggest(architecture, seed=3)
        study.record(trial, toy_result(trial))
    study.suggest(architectures()[5], seed=5)
    shutil.copytree(run.path, folder / "image")
    run.release()
    return run, folder / "image"


@pytest.mark.parametrize("step", [40000, pytest.param(1536, marks=SLOW)])
def test_damaged_log_of_a_killed_driver(tmp_path: Path, step: int) -> None:
    run, image = killed_in_the_middle(tmp_path)
    log = image / "study.db-wal"
    assert log.stat().st_size > 4096
    data = log.read_bytes()
    study = Study.read(RunDirectory(image), toy.SPACE, OBJECTIVES, toy_config().dump())
    expected = summary(study)
    assert [entry[2] for entry in expected] == ["complete"] * 5 + ["running"]
    shutil.copytree(image, tmp_path / "kept")
    for position in [*range(0, len(data), step)]:
        for damaged in (
            data[:position],
            data[:position] + bytes([data[position] ^ 0x10]) + data[position + 1 :],
        ):
            shutil.rmtree(run.path)
            shutil.copytree(tmp_path / "kept", run.path)
            (run.path / "study.db-wal").write_bytes(damaged)
            again = RunDirectory(run.path)
            found, _ = opened(again)
            try:
                waiting = found.recover()
                assert [trial.number for trial in waiting] == [5]
                assert [entry[:2] + entry[3:] for entry in summary(found)] == [
                    e[:2] + e[3:] for e in expected
                ]
            finally:
                again.release()
            assert not (run.path / "study.db-wal").exists()


def test_a_rebuild_that_is_killed_changes_nothing(
    original: Original, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until the new file is whole, the damaged one stays where it was."""
    from nas import storage

    data = bytes(100) + original.bytes[100:]
    run = original.restore(data)

    def fail(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(storage, "_set_aside", fail)
    with pytest.raises(KeyboardInterrupt):
        opened(run)
    run.release()
    assert run.database.read_bytes() == data
    monkeypatch.undo()
    original.check(RunDirectory(run.path))

"""Storages: opened without harm, closed as one file, locked so that a dead owner holds up nobody."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest

from nas.database_ledger import DatabaseLedger
from nas.errors import RunStopped, UserMistake
from nas.files import WriteFailed
from nas.journal import JournalLock, open_journal, repair_journal_tail
from nas.ledger import PublicLedger, make_ledger
from nas.storage import (
    DamagedStorage,
    MissingStudy,
    close_storage,
    keep_copy,
    local_file,
    open_storage,
    replace_storage,
    stop_on_error,
)
from nas.stored import distributions_of, make_study
from tests.nas.toys import toy
from tests.nas.toys.runs import OBJECTIVES, architectures


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("sqlite:///a/b.db", "a/b.db"),
        ("sqlite:////a/b c?.db", "/a/b c?.db"),
        ("journal:/a/j", "/a/j"),
        ("sqlite:///a.db?timeout=3", None),
        ("sqlite://", None),
        ("postgresql://me:secret@server/db", None),
    ],
)
def test_which_storages_are_files(url: str, path: str | None) -> None:
    assert local_file(url) == (Path(path) if path else None)


def test_a_bad_url_is_a_mistake_that_shows_no_password() -> None:
    with pytest.raises(UserMistake, match=r"--storage mysql\+nosuch://\*\*\*@host/db: "):
        open_storage("mysql+nosuch://me:secret@host/db")
    with pytest.raises(UserMistake, match="give a database URL that Optuna accepts, or journal:FILE"):
        open_storage("nonsense")


def test_a_directory_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    for url in (f"sqlite:///{tmp_path}/no/study.db", f"journal:{tmp_path}/no/journal"):
        with pytest.raises(UserMistake, match=r"there is no directory .*no; make it"):
            open_storage(url)
        with pytest.raises(MissingStudy):
            open_storage(url, reading=True)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("name", ["study.db", "a b%41{x}?#.db"])
def test_a_database_is_one_file_before_and_after(tmp_path: Path, name: str) -> None:
    url = f"sqlite:///{tmp_path / name}"
    storage = open_storage(url)
    make_study(storage, "one", OBJECTIVES)
    assert (tmp_path / f"{name}-wal").exists()
    close_storage(storage, url)
    assert os.listdir(tmp_path) == [name]
    connection = sqlite3.connect(tmp_path / name)
    assert connection.execute("PRAGMA journal_mode").fetchone()[0] == "delete"
    assert connection.execute("SELECT study_name FROM studies").fetchall() == [("one",)]
    connection.close()


def test_a_reader_changes_no_byte(tmp_path: Path) -> None:
    for url in (f"sqlite:///{tmp_path}/study.db", f"journal:{tmp_path}/journal"):
        storage = open_storage(url)
        make_study(storage, "one", OBJECTIVES)
        close_storage(storage, url)
        path = local_file(url)
        assert path is not None
        before = path.read_bytes()
        reader = open_storage(url, reading=True)
        assert [study.study_name for study in reader.get_all_studies()] == ["one"]
        close_storage(reader, url, reading=True)
        assert path.read_bytes() == before


def test_a_storage_that_cannot_be_opened_is_not_held(tmp_path: Path) -> None:
    """An open connection of a failed reader would keep the next driver from closing its log."""
    url = f"sqlite:///{tmp_path}/study.db"
    connection = sqlite3.connect(tmp_path / "study.db")
    connection.execute("CREATE TABLE half (made INTEGER)")
    connection.close()
    with pytest.raises(DamagedStorage) as kept:
        open_storage(url, reading=True)
    assert str(tmp_path / "study.db") in str(kept.value)
    open_files = [str(entry.resolve()) for entry in Path("/proc/self/fd").iterdir()]
    assert not [name for name in open_files if name.startswith(str(tmp_path))]


def test_damaged_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "study.db").write_bytes(b"nonsense" * 1000)
    with pytest.raises(DamagedStorage, match=r"study\.db is damaged: file is not a database"):
        open_storage(f"sqlite:///{tmp_path}/study.db")
    (tmp_path / "journal").write_bytes(b'{"op_code": 4}\nnonsense\n{"op_code": 4}\n')
    with pytest.raises(DamagedStorage, match=r"journal is damaged: line 2 is no record of a journal"):
        open_storage(f"journal:{tmp_path}/journal")


def test_copies_get_free_names_and_take_their_companions_along(tmp_path: Path) -> None:
    for round_ in (1, 2):
        for suffix in ("", "-wal", "-journal"):
            (tmp_path / f"study.db{suffix}").write_text(f"{round_}{suffix}")
        assert keep_copy(tmp_path / "study.db").name == f"study.db.damaged-{round_}"
        assert (tmp_path / f"study.db.damaged-{round_}-wal").read_text() == f"{round_}-wal"
    assert not (tmp_path / "study.db").exists()
    assert not (tmp_path / "study.db-journal").exists()


@pytest.mark.parametrize("kind", ["sqlite", "journal"])
def test_replacing_is_all_or_nothing(tmp_path: Path, kind: str) -> None:
    url = f"sqlite:///{tmp_path}/file" if kind == "sqlite" else f"journal:{tmp_path}/file"
    (tmp_path / "file").write_text("damaged")
    (tmp_path / ".file.999999999-3.tmp").write_text("of a replacement that was killed")

    def fail(storage: Any) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(WriteFailed, match="No space left on device"):
        replace_storage(url, fail)
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "damaged"
    kept = replace_storage(url, lambda storage: make_study(storage, "new", OBJECTIVES) and None)
    assert kept == tmp_path / "file.damaged-1"
    assert kept.read_text() == "damaged"
    storage = open_storage(url)
    assert [study.study_name for study in storage.get_all_studies()] == ["new"]
    close_storage(storage, url)
    assert sorted(os.listdir(tmp_path)) == ["file", "file.damaged-1"]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            OSError(28, "No space left on device", "/d/file"),
            r"^/d/file cannot be written: No space left on device; what",
        ),
        (
            WriteFailed(Path("/d/x"), 13, "Permission denied"),
            "^/d/x cannot be written: Permission denied; what was",
        ),
        (
            sqlite3.OperationalError("disk I/O error"),
            "^the study cannot be written: disk I/O error; what was recorded",
        ),
        (
            KeyError("gone"),
            "^the study cannot be written: KeyError: 'gone'; what was recorded before is safe$",
        ),
    ],
)
def test_errors_of_storages_stop_the_run_in_one_line(error: Exception, text: str) -> None:
    with pytest.raises(RunStopped, match=text), stop_on_error("the study"):
        raise error
    with pytest.raises(UserMistake), stop_on_error("the study"):
        raise UserMistake("x")


# -- the journal's lock ------------------------------------------------------------------------------------------------


def test_the_lock_of_a_killed_writer_holds_up_nobody(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from nas.journal import JournalLock; "
        "JournalLock(Path(sys.argv[1])).acquire(); os.kill(os.getpid(), 9)"
    )
    (tmp_path / "journal").touch()
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "journal")], timeout=60, check=False)
    assert os.path.lexists(tmp_path / "journal.lock")
    lock = JournalLock(tmp_path / "journal")
    began = time.monotonic()
    assert lock.acquire()
    assert time.monotonic() - began < 10  # Optuna waits for 30 seconds
    lock.release()
    assert os.listdir(tmp_path) == ["journal"]


def test_foreign_writers_are_kept_out_and_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.touch()
    ours = JournalLock(path)
    theirs = optuna.storages.journal.JournalFileSymlinkLock(str(path))
    ours.acquire()
    assert (tmp_path / "journal.lock").resolve() == path  # as Optuna expects of a link
    with pytest.raises(FileExistsError):
        os.symlink(path, f"{path}.lock")
    ours.release()
    theirs.acquire()
    waiting = subprocess.Popen(
        [sys.executable, "-c", "import sys; from pathlib import Path; from nas.journal import JournalLock; "
         "JournalLock(Path(sys.argv[1])).acquire(); print('mine', flush=True)", str(path)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with pytest.raises(subprocess.TimeoutExpired):
        waiting.wait(timeout=0.7)
    theirs.release()
    assert waiting.communicate(timeout=60)[0] == "mine\n"


def test_nothing_is_appended_to_another_file_of_the_same_name(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    backend = open_journal(path)
    backend.append_logs([{"op_code": 0}])
    path.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError):
        backend.append_logs([{"op_code": 1}])
    path.write_text("another\n")
    with pytest.raises(OSError, match="replaced by another file"):
        backend.append_logs([{"op_code": 1}])
    assert path.read_text() == "another\n"


def test_a_torn_tail_is_kept_aside(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.write_bytes(b'{"op_code": 1}\n{"op_co')
    assert repair_journal_tail(path) == 7
    assert repair_journal_tail(path) == 0
    path.write_bytes(b'{"op_code": 1}\n{"o')
    assert repair_journal_tail(path) == 3
    assert path.read_bytes() == b'{"op_code": 1}\n'
    assert (tmp_path / "journal.torn-1").read_bytes() == b'{"op_co'
    assert (tmp_path / "journal.torn-2").read_bytes() == b'{"o'
    assert repair_journal_tail(tmp_path / "none") == 0


# -- the ledgers -------------------------------------------------------------------------------------------------------


def test_both_ledgers_write_what_optuna_reads(tmp_path: Path) -> None:
    """Rows that are written directly are the rows that Optuna itself writes."""
    found = []
    for kind in (DatabaseLedger, PublicLedger):
        url = f"sqlite:///{tmp_path}/{kind.__name__}"
        storage = open_storage(url)
        assert isinstance(storage, optuna.storages.RDBStorage)
        study_id = make_study(storage, "one", OBJECTIVES)
        assert isinstance(make_ledger(storage, study_id, {}), DatabaseLedger)
        ledger = kind(storage, study_id, distributions_of(toy.SPACE))
        for number, architecture in enumerate(architectures()[:4]):
            trial_id, told = ledger.create("RUNNING", architecture, {"nas": {"number": number}})
            assert told == number
            assert ledger.update(trial_id, {"interruptions": 1}, "WAITING")
            assert ledger.update(trial_id, {"interruptions": 2}, "RUNNING")
            assert not ledger.update(trial_id, {}, "RUNNING")
        assert ledger.update(1, {"result": [1.5, "ä"]}, "COMPLETE", [0.5, 2.0])
        assert ledger.update(2, {"result": None}, "PRUNED")
        assert ledger.update(3, {}, "FAIL")
        assert not ledger.update(1, {"result": "again"}, "COMPLETE", [1.0, 1.0])
        ledger.create("COMPLETE", architectures()[5], {"nas": 1}, [1.0, 3.0])
        ledger.create("FAIL", {}, {"lost": "why"})
        trials = storage.get_all_trials(study_id)
        assert all(trial.datetime_start for trial in trials if trial.state.name != "WAITING")
        assert all((trial.datetime_complete is not None) == trial.state.is_finished() for trial in trials)
        found.append(
            [
                (
                    t.number,
                    t.state,
                    t.values,
                    t.params,
                    t.distributions,
                    t.user_attrs,
                    t.system_attrs,
                    t.intermediate_values,
                )
                for t in trials
            ]
        )
        rows = ledger.rows()
        assert [(row.number, row.state, row.values, row.params) for row in rows] == [
            (t.number, t.state.name, t.values, t.params) for t in trials
        ]
        assert [row.attributes for row in rows] == [t.user_attrs for t in trials]
        close_storage(storage, url)
    assert found[0] == found[1]


def test_an_unknown_schema_is_used_through_the_public_interface(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_storage(f"sqlite:///{tmp_path}/study.db")
    monkeypatch.setattr(type(storage), "get_current_version", lambda self: "v99", raising=True)
    assert isinstance(make_ledger(storage, make_study(storage, "one", OBJECTIVES), {}), PublicLedger)


def test_times_are_those_of_now(tmp_path: Path) -> None:
    from datetime import datetime

    storage = open_storage(f"sqlite:///{tmp_path}/study.db")
    study_id = make_study(storage, "one", OBJECTIVES)
    ledger = make_ledger(storage, study_id, distributions_of(toy.SPACE))
    trial_id, _ = ledger.create("RUNNING", architectures()[0], {})
    ledger.update(trial_id, {}, "COMPLETE", [1.0, 2.0])
    trial = storage.get_all_trials(study_id)[0]
    assert trial.datetime_start is not None
    assert trial.datetime_complete is not None
    assert abs((datetime.now() - trial.datetime_start).total_seconds()) < 60
    assert trial.datetime_complete >= trial.datetime_start

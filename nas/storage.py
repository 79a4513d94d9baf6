"""Opening an Optuna storage so that a torn or damaged file is noticed before anything is written to it."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import random
import re
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.errors import RunStopped, UserMistake
from nas.files import CorruptFile, atomic_path, sweep_temporary

if TYPE_CHECKING:
    from optuna.storages import BaseStorage, RDBStorage

__all__ = [
    "DamagedStorage",
    "MissingStudy",
    "close_storage",
    "error_text",
    "is_damage",
    "keep_copy",
    "local_file",
    "open_storage",
    "replace_storage",
    "require_place",
    "stop_on_error",
]

logger = logging.getLogger(__name__)

_WAIT_SECONDS = 60.0
_PASSING = ("locked", "unable to open", "readonly", "disk is full", "disk I/O error")
_OPENINGS = 8
"""Two drivers that open a new database together both make its tables, and all but one of them fail at that."""
_MADE_BY_ANOTHER = ("already exists", "unique", "duplicate", "deadlock", "no such table", "concurrently")
_COMPANIONS = ("-wal", "-shm", "-journal")
_LOCAL_FILE_SYSTEMS = frozenset(
    {"apfs", "bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "hfs", "overlay", "tmpfs", "xfs", "zfs"}
)


class DamagedStorage(RuntimeError):
    """The file of a study cannot be trusted; the message names it and what is wrong."""


class MissingStudy(DamagedStorage):
    """The storage is sound and does not hold the study."""


def local_file(url: str) -> Path | None:
    """The file behind a storage URL, or ``None`` when a server (or nothing that lasts) is behind it."""
    if url.startswith("sqlite:///") and not re.search(r"\?\w+=", url):
        return Path(url.removeprefix("sqlite:///"))
    if url.startswith("journal:"):
        return Path(url.removeprefix("journal:"))
    return None


def keep_copy(path: Path) -> Path:
    """Move a damaged file aside under the first free name ``NAME.damaged-N``; returns the new path."""
    copy = _free_name(path)
    os.replace(path, copy)
    for suffix in _COMPANIONS:
        # What SQLite keeps beside a database belongs to it, and would be replayed into the next one of that name.
        with contextlib.suppress(FileNotFoundError):
            os.replace(f"{path}{suffix}", f"{copy}{suffix}")
    return copy


def _free_name(path: Path) -> Path:
    number = 1
    while (copy := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    return copy


def require_place(url: str) -> None:
    """Raises UserMistake when the directory of a storage's file does not exist; it is never made."""
    path = local_file(url)
    if path is not None and not path.parent.is_dir():
        text = f"--storage {url}: there is no directory {path.parent}; make it, or give another file"
        raise UserMistake(text)


def open_storage(url: str, *, reading: bool = False) -> BaseStorage:
    """The Optuna storage at ``url``: a database URL, or ``journal:FILE``. With ``reading`` nothing is made or mended,
    and another driver may be writing.

    Raises DamagedStorage when a local file is not sound, UserMistake when the storage cannot be reached.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    path = local_file(url)
    if path is None:
        return _open_server(url, reading=reading)
    if not path.exists() and reading:
        raise MissingStudy(f"{path}: missing")
    require_place(url)
    try:
        opening = _open_journal if url.startswith("journal:") else _open_sqlite
        return opening(path, reading=reading)
    except (UserMistake, DamagedStorage):
        raise
    except Exception as error:  # a damaged file makes Optuna and SQLAlchemy raise whatever they stumble over
        raise _local_problem(path, error, reading=reading) from error


def _local_problem(path: Path, error: Exception, *, reading: bool) -> Exception:
    if isinstance(error, CorruptFile):
        return DamagedStorage(str(error))
    reason = error_text(error)
    if not reading and (isinstance(error, OSError) or any(text in reason for text in _PASSING)):
        return UserMistake(f"{path}: {reason}; close the program that holds it, or check its permissions")
    return DamagedStorage(f"{path} is damaged: {reason}")


def error_text(error: BaseException) -> str:
    """What a library's error is about, in one line: its deepest cause says what happened to the file."""
    while (cause := getattr(error, "orig", None) or error.__cause__) is not None:
        error = cause
    text = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
    name = type(error).__name__
    line = " ".join(text.split())[:200]
    return (
        line
        if line and isinstance(error, (OSError, sqlite3.Error, CorruptFile))
        else f"{name}: {line}".rstrip(": ")
    )


def is_damage(error: BaseException) -> bool:
    """Whether an error of SQLite is about what is in the file, and not about its lock, its disk or its permissions."""
    while (cause := getattr(error, "orig", None) or error.__cause__) is not None:
        error = cause
    return isinstance(error, sqlite3.DatabaseError) and not any(text in str(error) for text in _PASSING)


@contextlib.contextmanager
def stop_on_error(what: str) -> Iterator[None]:
    """Turn whatever a storage or a disk raises inside the block into RunStopped, in one line that names ``what``."""
    try:
        yield
    except (RunStopped, UserMistake):
        raise
    except OSError as error:
        place = getattr(error, "path", None) or error.filename or what
        raise RunStopped(
            f"{place} cannot be written: {error_text(error)}; what was recorded before is safe"
        ) from error
    except Exception as error:
        raise RunStopped(
            f"{what} cannot be written: {error_text(error)}; what was recorded before is safe"
        ) from error


# -- kinds of storage --------------------------------------------------------------------------------------------------


def _open_server(url: str, *, reading: bool) -> BaseStorage:
    shown = f"--storage {_hide_password(url)}"
    try:
        return _made_or_found(url)
    except ImportError as error:
        reason = str(error.__cause__ or error)
        way_out = "install it"
        if url.startswith("postgres"):
            way_out = "pip install 'nas-toolkit[postgresql]'"
        raise UserMistake(f"{shown}: its driver is missing ({reason}); {way_out}") from None
    except Exception as error:
        if reading:
            raise DamagedStorage(f"{shown}: cannot be opened ({error_text(error)})") from None
        advice = "give a database URL that Optuna accepts, or journal:FILE"
        raise UserMistake(f"{shown}: cannot be opened ({error_text(error)}); {advice}") from None


def _made_or_found(url: str) -> BaseStorage:
    import optuna
    from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError

    for attempt in range(_OPENINGS):
        try:
            return optuna.storages.RDBStorage(_with_driver(url), engine_kwargs={"pool_pre_ping": True})
        except (
            IntegrityError,
            OperationalError,
            ProgrammingError,
            optuna.exceptions.StorageInternalError,
        ) as error:
            text = f"{error} {error.__cause__}".lower()
            if attempt + 1 == _OPENINGS or not any(word in text for word in _MADE_BY_ANOTHER):
                raise
        # Some of them wait longer than others, or they would meet again.
        time.sleep(random.uniform(0.05, 0.3) * (attempt + 1))
    raise AssertionError("the last attempt returns or raises")


def _with_driver(url: str) -> str:
    """Which driver ``postgresql://`` means depends on SQLAlchemy's version: here it is the one that is installed."""
    scheme, separator, rest = url.partition("://")
    if scheme not in ("postgresql", "postgres"):
        return url
    found = [name for name in ("psycopg2", "psycopg") if importlib.util.find_spec(name) is not None]
    return f"postgresql+{found[0] if found else 'psycopg2'}{separator}{rest}"


def _open_journal(path: Path, *, reading: bool) -> BaseStorage:
    from optuna.storages.journal import JournalFileBackend, JournalStorage

    from nas.journal import check_journal, open_journal

    if reading:
        check_journal(path)
        return JournalStorage(JournalFileBackend(str(path)))
    return JournalStorage(open_journal(path))


def _open_sqlite(path: Path, *, reading: bool) -> BaseStorage:
    if path.exists() and path.stat().st_size:
        _check_sqlite(path)
    elif reading:
        raise MissingStudy(f"{path}: empty")
    # A commit to the write-ahead log is one flush to the disk, a commit to the rollback journal four or five. The log
    # needs memory shared between its users, which no network has.
    setting = "query_only = ON" if reading else "journal_mode = WAL" if _is_local(path) else None
    return _sqlite_storage(lambda: _connect(path, setting))


def _sqlite_storage(connect: Callable[[], sqlite3.Connection]) -> RDBStorage:
    import optuna

    made: list[sqlite3.Connection] = []

    def creator() -> sqlite3.Connection:
        made.append(connect())
        return made[-1]

    try:
        # The URL only names the dialect: a path may hold characters that mean something in a URL.
        storage = optuna.storages.RDBStorage("sqlite:///study.db", engine_kwargs={"creator": creator})
    except BaseException:
        # Nobody else can reach them, and an open one keeps others from closing the log.
        for connection in made:
            connection.close()
        raise
    made.clear()
    return storage


def _connect(path: Path, setting: str | None) -> sqlite3.Connection:
    # A dashboard that reads the same file may hold it for a moment: wait rather than fail.
    connection = sqlite3.connect(path, timeout=_WAIT_SECONDS, check_same_thread=False)
    if setting is not None:
        connection.execute(f"PRAGMA {setting}").close()
    return connection


def _check_sqlite(path: Path) -> None:
    connection = sqlite3.connect(_uri(path), uri=True, timeout=_WAIT_SECONDS)
    try:
        found = str(connection.execute("PRAGMA integrity_check(1)").fetchone()[0])
    finally:
        connection.close()
    if found != "ok":
        raise CorruptFile(path, found.splitlines()[-1])


def _uri(path: Path) -> str:
    """Opens a database that is there, and never makes one."""
    return f"{path.resolve().as_uri()}?mode=rw"


def close_storage(storage: BaseStorage, url: str, *, reading: bool = False) -> None:
    """Close the files of a storage; a SQLite database that this process has written is one file again afterwards."""
    engine = getattr(storage, "engine", None)
    if engine is None:
        return
    with contextlib.suppress(Exception):  # of a database that is gone
        storage.remove_session()
        engine.dispose()
    path = local_file(url)
    if reading or path is None or not path.exists():
        return
    # Somebody who reads it now keeps the log alive; then the next driver, or SQLite itself, folds it in.
    with contextlib.suppress(sqlite3.Error, UnicodeError):
        connection = sqlite3.connect(_uri(path), uri=True, timeout=0)
        try:
            connection.execute("PRAGMA journal_mode = DELETE")
        finally:
            connection.close()


def replace_storage(url: str, fill: Callable[[BaseStorage], None]) -> Path | None:
    """Make a new local storage with what ``fill`` writes and put it in the place of the damaged one, which is kept;
    returns where. Whatever moment this is killed at, the old file or the new one is there whole.

    Raises WriteFailed.
    """
    path = local_file(url)
    if path is None:
        raise ValueError(f"{url} is not a file")
    sweep_temporary(path.parent)
    with atomic_path(path) as temporary:
        if url.startswith("journal:"):
            _fill_journal(temporary, fill)
        else:
            _fill_sqlite(temporary, fill)
        kept = _set_aside(path)
    return kept


def _fill_journal(path: Path, fill: Callable[[BaseStorage], None]) -> None:
    import json

    from optuna.storages.journal import BaseJournalBackend, JournalStorage

    class Lines(BaseJournalBackend):
        def __init__(self) -> None:
            self.logs: list[dict[str, Any]] = []

        def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
            yield from self.logs[log_number_from:]

        def append_logs(self, logs: list[dict[str, Any]]) -> None:
            self.logs += json.loads(json.dumps(logs))

    backend = Lines()
    fill(JournalStorage(backend))
    text = "".join(json.dumps(log, separators=(",", ":")) + "\n" for log in backend.logs)
    path.write_text(text, encoding="utf-8")


def _fill_sqlite(path: Path, fill: Callable[[BaseStorage], None]) -> None:
    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(path, check_same_thread=False)
        # Nobody sees this file before it is whole, and one flush at the end is enough.
        connection.execute("PRAGMA journal_mode = OFF").close()
        connection.execute("PRAGMA synchronous = OFF").close()
        return connection

    storage = _sqlite_storage(connect)
    try:
        fill(storage)
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _set_aside(path: Path) -> Path | None:
    """Keep what is at ``path`` under another name too, and take away what SQLite left beside it."""
    copy = _free_name(path)
    kept = None
    if path.exists() and path.stat().st_size:
        try:
            os.link(path, copy)
        except OSError:  # a file system without links
            shutil.copy2(path, copy)
        kept = copy
    for suffix in _COMPANIONS:
        with contextlib.suppress(FileNotFoundError):
            os.replace(f"{path}{suffix}", f"{copy}{suffix}")
    return kept


def _is_local(path: Path) -> bool:
    """Whether the file system is one of this machine; an unknown one counts as a network's."""
    import psutil

    place = str(path.resolve())
    mounts = {part.mountpoint.rstrip("/") + "/": part.fstype for part in psutil.disk_partitions(all=True)}
    holding = max((mount for mount in mounts if f"{place}/".startswith(mount)), key=len, default="")
    return mounts.get(holding) in _LOCAL_FILE_SYSTEMS


def _hide_password(url: str) -> str:
    scheme, separator, rest = url.partition("://")
    if "@" not in rest:
        return url
    return f"{scheme}{separator}***@{rest.rsplit('@', 1)[1]}"

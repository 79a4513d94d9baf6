"""Kill a process with SIGKILL at the n-th durable step: just before it, or just after it.

Steps are the calls by which something reaches the disk: opening a file for writing, fsync, rename, link, unlink,
truncate, mkdir, a commit of SQLite. A moment is counted before and after each of them, and before and after each
writing method of the storage, but two moments with no step in between are one: the disk is the same at both.
"""

from __future__ import annotations

import builtins
import functools
import os
import signal
import sqlite3
from collections.abc import Callable
from typing import Any

_OS = ("fsync", "replace", "rename", "symlink", "link", "unlink", "ftruncate", "mkdir")
_STORAGE = (
    "create_new_study",
    "set_study_user_attr",
    "set_study_system_attr",
    "create_new_trial",
    "set_trial_user_attr",
    "set_trial_state_values",
)


def _kill_this_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Killer:
    """Counts moments; at moment ``at`` (from 1; 0: never) it strikes. The names of all moments go to ``names``."""

    def __init__(self, at: int, names: str | None = None, strike: Callable[[], None] = _kill_this_process):
        self.at = at
        self.count = 0
        self.names = names
        self.owner = os.getpid()
        self._strike = strike
        self._changed = True

    def step(self, name: str) -> None:
        if os.getpid() != self.owner:  # a child that was forked to become a worker
            return
        if not self._changed:
            return
        self._changed = False
        self.count += 1
        if self.names is not None:
            descriptor = os.open(self.names, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(descriptor, f"{name}\n".encode())
            os.close(descriptor)
        if self.count == self.at:
            self._strike()

    def around(self, name: str, function: Callable[..., Any], *, changes: bool = True) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.step(f"before {name}")
            value = function(*args, **kwargs)
            self._changed = self._changed or changes
            self.step(f"after {name}")
            return value

        return call

    def install(self, *, storages: bool = True) -> None:
        """Put the steps into this process. There is no way back."""
        for name in _OS:
            setattr(os, name, self.around(name, getattr(os, name)))
        builtins.open = self._opening(builtins.open)  # type: ignore[assignment]
        if storages:
            self._install_sqlite()
            self._install_storages()

    def _opening(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            handle = function(file, mode, *args, **kwargs)
            if any(letter in mode for letter in "wax+"):
                self._changed = True
                self.step("after open for writing")
                self._changed = True  # what will be written to it
            return handle

        return call

    def _install_sqlite(self) -> None:
        killer = self
        connect = sqlite3.connect

        class Connection(sqlite3.Connection):
            def commit(self) -> None:
                if self.in_transaction:
                    killer._changed = True
                    killer.step("before commit")
                    super().commit()
                    killer._changed = True
                    killer.step("after commit")
                else:
                    super().commit()

        def connect_and_count(*args: Any, **kwargs: Any) -> Any:
            return connect(*args, factory=Connection, **kwargs)

        sqlite3.connect = connect_and_count  # type: ignore[assignment]

    def _install_storages(self) -> None:
        from optuna.storages import JournalStorage, RDBStorage

        from nas.database_ledger import DatabaseLedger

        for kind in (JournalStorage, RDBStorage):
            for name in _STORAGE:
                setattr(kind, name, self.around(name, getattr(kind, name), changes=False))
        for name in ("create", "update"):
            setattr(DatabaseLedger, name, self.around(name, getattr(DatabaseLedger, name), changes=False))

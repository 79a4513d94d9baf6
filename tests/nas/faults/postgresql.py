"""A PostgreSQL server of this machine's own binaries, in a temporary directory, on the loopback interface only."""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest

__all__ = ["Server", "start_server"]


def _binaries() -> Path | None:
    found = shutil.which("initdb")
    if found is not None:
        return Path(found).resolve().parent
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    return places[-1].parent if places else None


def _other_user() -> str | None:
    """PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return next((name for name in ("postgres", "nobody") if name in names), "")


def _free_port() -> int:
    """None of those that the system gives to whoever asks for any, so that it stays free while no server runs."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as found, contextlib.suppress(OSError):
            found.bind(("127.0.0.1", port))
            return port


class Server:
    """Its data, and how to start and stop it."""

    def __init__(self, binaries: Path, user: str | None):
        self._binaries = binaries
        self._user = user
        self._place = Path(tempfile.mkdtemp(prefix="nas-pg-"))  # a socket's path must be short
        if user is not None:
            shutil.chown(self._place, user)
        self._port = _free_port()
        self._call(
            "initdb", "-D", "data", "-A", "trust", "-U", "nas", "--no-sync", "-E", "UTF8", "--locale=C"
        )

    def _call(self, program: str, *words: str) -> None:
        command = [str(self._binaries / program), *words]
        if self._user is not None:
            entry = pwd.getpwnam(self._user)
            groups = [f"--reuid={entry.pw_uid}", f"--regid={entry.pw_gid}", "--clear-groups"]
            command = ["setpriv", *groups, *command]
        done = subprocess.run(command, cwd=self._place, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, f"{program}: {done.stdout}{done.stderr}"

    def start(self) -> None:
        """Start, and wait until it answers."""
        options = f"-p {self._port} -c listen_addresses=127.0.0.1 -k {self._place} -c fsync=off"
        self._call("pg_ctl", "-D", "data", "-l", "log", "-w", "-o", options, "start")

    def stop(self, *, at_once: bool = False) -> None:
        """Stop; with ``at_once`` as if the machine had crashed."""
        self._call("pg_ctl", "-D", "data", "-w", "-m", "immediate" if at_once else "fast", "stop")

    def remove(self) -> None:
        """Stop if it runs, and remove everything."""
        try:
            if (self._place / "data" / "postmaster.pid").exists():
                self.stop(at_once=True)
        finally:
            shutil.rmtree(self._place, ignore_errors=True)

    def create(self, database: str, isolation: str | None = None) -> str:
        """The URL of a new, empty database, with another isolation of transactions by default if asked for."""
        where = ("-h", "127.0.0.1", "-p", str(self._port), "-U", "nas")
        self._call("createdb", *where, database)
        if isolation is not None:
            text = f"ALTER DATABASE {database} SET default_transaction_isolation = '{isolation}'"
            self._call("psql", *where, "-c", text, database)
        return f"postgresql://nas@127.0.0.1:{self._port}/{database}"


def start_server() -> Server:
    """A running server. Skips the test, with the reason, where there can be none."""
    pytest.importorskip("psycopg2", reason="pip install 'nas-toolkit[postgresql]'")
    binaries, user = _binaries(), _other_user()
    if binaries is None:
        pytest.skip(
            "no PostgreSQL server: neither on PATH nor in /usr/lib/postgresql/*/bin (apt install postgresql)"
        )
    if user == "" or (user is not None and shutil.which("setpriv") is None):
        pytest.skip("PostgreSQL does not run as root, and there is no other user or no setpriv to become one")
    server = Server(binaries, user)
    try:
        server.start()
    except BaseException:
        server.remove()
        raise
    return server

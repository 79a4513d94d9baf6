"""Runs of the toy space in real processes, and what must hold of them whatever was done to them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from nas.reader import read_run
from nas.study import StoredTrial

ROOT = Path(__file__).parents[3]
TOYS = Path(__file__).parents[1] / "toys" / "toy.py"
MARKER = "NAS_FAULTS_RUN"
HELD = "tests.nas.faults.evaluators:held"
"""An evaluator: candidates are held until the file ``Bench.go`` is there."""


def wait_until(condition: Any, seconds: float, what: str) -> None:
    """Poll until ``condition()`` is true. Raises AssertionError naming ``what`` after ``seconds``."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"{what}: not within {seconds:g} s"
        time.sleep(0.01)


def pause(pid: int) -> None:
    """Stop a process, and return when it has stopped: on another core that is a moment after the signal was sent."""
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: _has_stopped(pid), 60, "the stop of a process")


def _has_stopped(pid: int) -> bool:
    threads = [psutil.Process(thread.id) for thread in psutil.Process(pid).threads()]
    return all(thread.status() == psutil.STATUS_STOPPED for thread in threads)


def processes_with(marker: str) -> list[int]:
    """Living processes that inherited ``marker`` in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if (
                    marker.encode() in (entry / "environ").read_bytes()
                    and " Z " not in (entry / "stat").read_text()
                ):
                    found.append(int(entry.name))
    return found


@dataclass
class Bench:
    """One run directory and the command that fills it."""

    folder: Path
    storage: str = "sqlite"
    evaluator: str = f"{TOYS}:evaluate"
    trials: int = 6
    workers: int = 1
    extra: list[str] = field(default_factory=list)
    seconds: float = 0.0
    command: list[str] = field(default_factory=lambda: [sys.executable, "-m", "nas"])
    extra_environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.out = self.folder / "run"
        self.marks = self.folder / "marks"
        # Beside the folder, which may be made read-only.
        self.go = self.folder.with_name(f"{self.folder.name}-go")
        self.marker = uuid.uuid4().hex
        self.log = self.folder / "output"

    @property
    def journal(self) -> Path:
        return self.folder / "journal.log"

    @property
    def study_file(self) -> Path:
        return self.journal if self.storage == "journal" else self.out / "study.db"

    def arguments(self) -> list[str]:
        storage = ["--storage", f"journal:{self.journal}"] if self.storage == "journal" else []
        return [
            "search", "--space", f"{TOYS}:SPACE", "--evaluator", self.evaluator, "--objective", "score:maximize",
            "--objective", "cost:minimize", "--trials", str(self.trials), "--workers", str(self.workers),
            "--out", str(self.out), *storage, *self.extra,
        ]  # fmt: skip

    def environment(self) -> dict[str, str]:
        return {
            MARKER: self.marker,
            "TOY_MARKS": str(self.marks),
            "TOY_SECONDS": str(self.seconds),
            "NAS_FAULTS_GO": str(self.go),
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            **self.extra_environment,
        }

    # -- running ---------------------------------------------------------------------------------------------------

    def start(self, arguments: list[str] | None = None, **options: Any) -> subprocess.Popen[str]:
        environment = {**os.environ, **self.environment()}
        environment.pop("NAS_DEBUG", None)
        return subprocess.Popen(
            [*self.command, *(arguments or self.arguments())],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            **options,
        )

    def run(self, arguments: list[str] | None = None, seconds: float = 90, **options: Any) -> tuple[int, str]:
        """Exit code (minus the signal) and output of the command, which has to end within ``seconds``."""
        process = self.start(arguments, **options)
        try:
            text, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            text, _ = process.communicate()
            raise AssertionError(f"still running after {seconds:g} s:\n{text}") from None
        return process.returncode, text

    def nas(self, *arguments: str) -> tuple[int, str]:
        """Another sub-command."""
        return self.run(list(arguments))

    # -- what is there ---------------------------------------------------------------------------------------------

    def stored(self) -> list[StoredTrial]:
        """The trials as a reader sees them."""
        return read_run(self.out).study.trials()

    def values(self) -> dict[str, dict[str, float]]:
        """Key of the architecture -> values, of the complete trials."""
        return {
            trial.key: trial.result.values
            for trial in self.stored()
            if trial.result and trial.state == "complete"
        }

    def evaluations(self) -> Counter[str]:
        """How often each architecture was evaluated."""
        return Counter(self.marks.read_text().split() if self.marks.exists() else [])

    def recorded(self) -> set[str]:
        """Keys of the architectures whose sealed result is whole on the disk, whatever the storage says."""
        from nas.files import CorruptFile, read_record

        found = set()
        for path in self.out.glob("trials/*/result.json"):
            with contextlib.suppress(CorruptFile, OSError):
                found.add(read_record(path)["key"])
        return found

    def orphans(self) -> list[int]:
        return processes_with(f"{MARKER}={self.marker}")

    # -- what must hold --------------------------------------------------------------------------------------------

    def check_no_orphans(self) -> None:
        wait_until(lambda: not self.orphans(), 60, "the last process to end")

    def check_no_leftovers(self) -> None:
        names = [
            path
            for path in self.folder.rglob("*")
            if path.name.endswith((".tmp", ".lock", ".rename", "-journal", "-wal", "-shm"))
        ]
        names = [path for path in names if path.name != "driver.lock"]
        assert not names, f"left over: {names}"

    def check_finished(self, expected: dict[str, dict[str, float]]) -> None:
        """The run is complete and its results are ``expected``; nothing is left over."""
        trials = self.stored()
        assert [trial.number for trial in trials] == list(range(self.trials))
        assert {trial.state for trial in trials} == {"complete"}
        assert self.values() == expected
        assert "Traceback" not in (self.log.read_text() if self.log.exists() else "")
        self.check_no_leftovers()
        self.check_no_orphans()

    def check_evaluations(self, before: Counter[str], finished_before: set[str], kills: int) -> None:
        """What was recorded ran no more after ``before`` was counted; the rest at most once more per kill."""
        now = self.evaluations()
        again = {key for key in finished_before if now[key] > before[key]}
        assert not again, f"evaluated again although it was recorded: {again}"
        assert sum(now.values()) <= self.trials + kills, now


class Driver:
    """A driver that a zygote started. Its output goes to the log of its bench."""

    def __init__(self, zygote: Zygote, bench: Bench, pid: int):
        self.pid = pid
        self._zygote = zygote
        self._bench = bench

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def finish(self, seconds: float = 60) -> tuple[int, str]:
        """Exit code (minus the signal) and everything that was printed, once it has ended."""
        status: list[int] = []

        def ended() -> bool:
            found = self._zygote.ask({"do": "wait", "pid": self.pid})["status"]
            status.extend([] if found is None else [found])
            return bool(status)

        try:
            wait_until(ended, seconds, "the end of the driver")
        except AssertionError:
            os.kill(self.pid, signal.SIGKILL)
            raise
        return status[0], self.text()

    def text(self) -> str:
        """What it has printed so far."""
        return self._bench.log.read_text() if self._bench.log.exists() else ""


class Zygote:
    """Runs drivers of benches without importing everything anew; see ``zygote.py``."""

    def __init__(self) -> None:
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.nas.faults.zygote"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        """The answer to one order."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def start(
        self,
        bench: Bench,
        kill_at: int | None = None,
        *,
        report: bool = False,
        names: Path | None = None,
        handles: int | None = None,
        obey: bool = False,
        arguments: list[str] | None = None,
    ) -> Driver:
        """Start a driver. Without ``report`` it leaves the files of the report out; ``handles`` limits its open files;
        ``obey`` lets file permissions hold for root too."""
        order = {
            "do": "start",
            "arguments": arguments or bench.arguments(),
            "environment": bench.environment(),
            "log": str(bench.log),
            "kill_at": kill_at,
            "names": str(names) if names else None,
            "plain_report": not report,
            "handles": handles,
            "obey": obey,
        }
        return Driver(self, bench, self.ask(order)["pid"])

    def run(self, bench: Bench, kill_at: int | None = None, **options: Any) -> int:
        """Exit code of one driver, minus the signal that ended it."""
        return self.start(bench, kill_at, **options).finish(120)[0]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=20)
        if self._process.stdout is not None:
            self._process.stdout.close()


@contextlib.contextmanager
def zygote() -> Iterator[Zygote]:
    made = Zygote()
    try:
        yield made
    finally:
        made.close()

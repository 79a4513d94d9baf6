"""Random kills of real drivers, and a look from outside at what they leave: is anything lost or done twice?

A run of a space without models is started by the ordinary command and killed at a random moment, again and again, with
the same command after each kill. What must hold then is counted against marks that every evaluation leaves:

* lost: a finished trial is no longer there, or says something else than before, or something that is not true;
* duplicated: an architecture ran again after its result had been recorded, or is there as two trials;
* unreadable: a reader could not open the run, or the same command did not go on.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nas.config import SearchConfig
from nas.reader import read_run
from nas.storage import local_file
from nas.study import StoredTrial
from spaces import Choice, SearchSpace

__all__ = ["SPACE", "Chaos", "Count", "evaluate", "run_chaos"]

SPACE = SearchSpace("chaos", {f"gate{index}": Choice([0, 1, 2, 3]) for index in range(10)})
"""About a million architectures."""

MARKS = "NAS_CHAOS_MARKS"
MARKER = "NAS_CHAOS"

_LONGEST_LIFE = 5.0
_NEW_RUN = 0.08
_TORN = 0.3
_EXIT_SECONDS = 60.0


def evaluate(architecture: dict[str, Any]) -> dict[str, float]:
    """A score that follows from the architecture, after a short while; every call leaves a mark."""
    key = SPACE.key(architecture)
    descriptor = os.open(os.environ[MARKS], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.write(descriptor, f"{key}\n".encode())
    os.close(descriptor)
    time.sleep(0.02 + int(key[:4], 16) / 0xFFFF * 0.15)
    return true_values(architecture)


def true_values(architecture: dict[str, Any]) -> dict[str, float]:
    """What ``evaluate`` returns."""
    gates = list(architecture.values())
    return {
        "score": sum(math.sin(gate * (place + 1)) for place, gate in enumerate(gates)),
        "cost": float(sum(gates)),
    }


@dataclass
class Count:
    """What happened, and what must not have happened."""

    runs: int = 1
    driver_kills: int = 0
    candidate_kills: int = 0
    stops: int = 0
    torn_journals: int = 0
    finished: int = 0
    given_up: int = 0
    lost: int = 0
    duplicated: int = 0
    unreadable: int = 0
    orphans: int = 0
    leftovers: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        """Processes killed with SIGKILL."""
        return self.driver_kills + self.candidate_kills

    @property
    def sound(self) -> bool:
        """Whether nothing happened that must not."""
        return not (self.lost or self.duplicated or self.unreadable or self.orphans or self.leftovers)

    def line(self) -> str:
        """The result in one line."""
        text = f"kills {self.kills}, lost {self.lost}, duplicated {self.duplicated}, unreadable {self.unreadable}"
        more = {"orphans": self.orphans, "leftovers": self.leftovers}
        return text + "".join(f", {name} {number}" for name, number in more.items() if number)

    def blame(
        self, what: Literal["lost", "duplicated", "unreadable", "orphans", "leftovers"], text: str
    ) -> None:
        """Count one thing that must not have happened."""
        setattr(self, what, getattr(self, what) + 1)
        self.problems.append(f"{what}: {text}")


class Chaos:
    """Kills drivers for some time. ``seed`` decides what is done when; when that is in the driver's life is chance.

    Args:
        folder: where the runs are made.
        seed: of the kills.
        storage: the driver's own database, or a journal.
        workers: candidates at a time.
    """

    def __init__(
        self, folder: Path, seed: int = 0, storage: Literal["sqlite", "journal"] = "sqlite", workers: int = 2
    ):
        self.count = Count()
        self._folder = folder
        self._rng = random.Random(f"chaos:{seed}")
        self._seed = seed
        self._storage = storage
        self._workers = workers
        self._marker = uuid.uuid4().hex
        self._known: dict[int, StoredTrial] = {}
        self._marks_then: dict[str, int] = {}

    # -- the driver ------------------------------------------------------------------------------------------------

    @property
    def out(self) -> Path:
        """The run directory of now."""
        return self._folder / f"run-{self.count.runs}"

    @property
    def _marks(self) -> Path:
        return self._folder / f"marks-{self.count.runs}"

    @property
    def _url(self) -> str | None:
        return (
            f"journal:{self._folder / f'journal-{self.count.runs}'}" if self._storage == "journal" else None
        )

    def command(self) -> list[str]:
        """The command that is typed again and again."""
        words = [
            sys.executable,
            "-m",
            "nas",
            "search",
            "--space",
            "nas.chaos:SPACE",
            "--evaluator",
            "nas.chaos:evaluate",
        ]
        words += [
            "--objective",
            "score:maximize",
            "--objective",
            "cost:minimize",
            "--controller",
            "evolution",
        ]
        words += [
            "--trials",
            "100000",
            "--workers",
            str(self._workers),
            "--seed",
            str(self._seed),
            "--out",
            str(self.out),
        ]
        return [*words, "--storage", self._url] if self._url else words

    def _start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(),
            env={**os.environ, MARKER: self._marker, MARKS: str(self._marks)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, seconds: float) -> Count:
        """Kill for that many seconds, then stop a last driver in the ordinary way, and look at everything."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self._round()
            if self._rng.random() < _NEW_RUN and self._known:
                self._conclude()
                self._known, self._marks_then = {}, {}
                self.count.runs += 1
        self._conclude()
        return self.count

    def _round(self) -> None:
        driver = self._start()
        try:
            # Short lives are as frequent as long ones: half of the moments worth dying at are in the first second.
            self._live(driver, math.exp(self._rng.uniform(math.log(0.05), math.log(_LONGEST_LIFE))))
            self._kill_candidates(driver)
            if driver.poll() is None and self._rng.random() < 0.1:
                driver.send_signal(self._rng.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP]))
                self._live(driver, self._rng.uniform(0.0, 0.5), may_end=True)
                self.count.stops += 1
            if driver.poll() is None:
                driver.kill()
                self.count.driver_kills += 1
        finally:
            driver.kill()
            driver.communicate()
        self._after()

    def _live(self, driver: subprocess.Popen[str], seconds: float, *, may_end: bool = False) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            text, _ = driver.communicate(timeout=seconds)
            if not may_end:
                self.count.blame(
                    "unreadable", f"the driver ended with code {driver.returncode}: {_last_line(text)}"
                )

    def _kill_candidates(self, driver: subprocess.Popen[str]) -> None:
        # As many kills in one driver's life as it tries a candidate again: one more, all of them on the same candidate,
        # would rightly be that candidate's end, and not a loss.
        for _ in range(SearchConfig.model_fields["retries"].default):
            if self._rng.random() >= 0.2:
                return
            self._kill_a_candidate(driver)
            self._live(driver, self._rng.uniform(0.0, 1.0))

    def _kill_a_candidate(self, driver: subprocess.Popen[str]) -> None:
        import psutil

        with contextlib.suppress(psutil.Error):
            workers = psutil.Process(driver.pid).children()
            if workers:
                self._rng.choice(workers).kill()
                self.count.candidate_kills += 1

    # -- looking from outside --------------------------------------------------------------------------------------

    def _after(self) -> None:
        self._check_orphans()
        path = local_file(self._url) if self._url else None
        if path is not None and path.exists() and self._rng.random() < _TORN:
            data = path.read_bytes()
            with open(path, "r+b") as file:
                file.truncate(max(0, len(data) - self._rng.randrange(1, 600)))
            self.count.torn_journals += 1
        self._check_run()

    def _check_run(self) -> None:
        if not (self.out / "recipe.yaml").exists():
            return
        try:
            trials = read_run(self.out).study.trials()
        except Exception as error:  # whatever a reader can raise is what is looked for
            if self._known or (self.out / "trials").exists():
                self.count.blame("unreadable", f"{type(error).__name__}: {error}")
            return
        self._compare({trial.number: trial for trial in trials})

    def _compare(self, now: dict[int, StoredTrial]) -> None:
        marks = Counter(self._marks.read_text().split() if self._marks.exists() else [])
        for number, before in self._known.items():
            if number not in now or now[number].result != before.result:
                self.count.blame("lost", f"trial {number}")
            elif marks[before.key] > self._marks_then[before.key]:
                self.count.blame("duplicated", f"trial {number} ran again after it was recorded")
                self._marks_then[before.key] = marks[before.key]
        for key, times in Counter(trial.key for trial in now.values()).items():
            if times > 1:
                self.count.blame("duplicated", f"architecture {key} is there {times} times")
        for number, trial in now.items():
            if trial.result is None or number in self._known:
                continue
            self._known[number] = trial
            self._marks_then[trial.key] = marks[trial.key]
            self.count.finished += 1
            self._check_truth(trial)

    def _check_truth(self, trial: StoredTrial) -> None:
        assert trial.result is not None  # only finished trials are looked at
        if trial.state == "complete" and trial.result.values != true_values(trial.architecture):
            self.count.blame("lost", f"trial {trial.number} has values that are not its architecture's")
        if trial.result.failure is not None and trial.result.failure["kind"] == "interrupted":
            self.count.given_up += 1
        elif trial.state != "complete":
            self.count.blame("lost", f"trial {trial.number} is {trial.state}: {trial.result.failure}")

    def _check_orphans(self) -> None:
        until = time.monotonic() + 10
        while left := _processes_with(f"{MARKER}={self._marker}"):
            if time.monotonic() > until:
                self.count.blame("orphans", f"processes {left}")
                for pid in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                return
            time.sleep(0.02)

    def _conclude(self) -> None:
        """Let a last driver take up what is there, and stop it as a person would."""
        driver = self._start()
        try:
            self._live(driver, 6.0)
            driver.send_signal(signal.SIGINT)
            text, _ = driver.communicate(timeout=_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self.count.blame("unreadable", f"the last driver did not stop within {_EXIT_SECONDS:g} s")
            driver.kill()
            text, _ = driver.communicate()
        if driver.returncode != 128 + signal.SIGINT:
            self.count.blame(
                "unreadable", f"the last driver ended with code {driver.returncode}: {_last_line(text)}"
            )
        self._check_orphans()
        self._check_run()
        for path in self._folder.rglob("*"):
            if path.name.endswith((".tmp", ".rename", "-journal", "-wal", "-shm")):
                self.count.blame("leftovers", str(path))
        if any(trial.state == "running" for trial in read_run(self.out).study.trials()):
            self.count.blame("unreadable", "a trial is still running although its driver has stopped")


def _processes_with(marker: str) -> list[int]:
    """Living processes with ``marker`` in their environment (Linux; elsewhere none are found)."""
    from nas.files import is_running

    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if marker.encode() in (entry / "environ").read_bytes() and is_running(int(entry.name)):
                found.append(int(entry.name))
    return found


def _last_line(text: str | None) -> str:
    lines = (text or "").strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def run_chaos(
    minutes: float, seed: int, storage: Literal["sqlite", "journal"], workers: int = 2
) -> tuple[Count, Path | None]:
    """Chaos in a temporary folder: what was counted, and the folder if it is worth looking at."""
    folder = Path(tempfile.mkdtemp(prefix="nas-chaos-"))
    count = Chaos(folder, seed, storage, workers).run(minutes * 60)
    if count.sound:
        shutil.rmtree(folder)
        return count, None
    return count, folder

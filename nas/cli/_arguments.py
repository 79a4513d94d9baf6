"""Reading ``[RUN] TRIAL``: the run may be left out, the newest one is meant then."""

from __future__ import annotations

from pathlib import Path

from nas.errors import UserMistake
from nas.reader import ReadRun, newest_run, read_run

__all__ = ["run_and_trial"]


def run_and_trial(words: list[str], run: Path | None) -> tuple[ReadRun, int | None]:
    """The run and the trial's number (``None`` when no number is among ``words``). Raises UserMistake."""
    numbers = [word.removeprefix("#") for word in words if word.removeprefix("#").isdecimal()]
    paths = [Path(word) for word in words if not word.removeprefix("#").isdecimal()]
    if len(numbers) > 1 or len(paths) + (run is not None) > 1:
        raise UserMistake(f"{' '.join(words)}: give one trial number, and at most one run directory")
    directory = run or (paths[0] if paths else newest_run())
    return read_run(directory), int(numbers[0]) if numbers else None

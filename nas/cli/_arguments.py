"""Arguments that several commands read: ``[RUN] TRIAL``, and files that they are to write."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from nas.errors import UserMistake
from nas.reader import ReadRun, newest_run, read_run

__all__ = ["check_writable", "run_and_trial"]


def run_and_trial(words: list[str], run: Path | None) -> tuple[ReadRun, int | None]:
    """The run, by default the newest, and the trial's number (``None`` when none is among ``words``).

    Raises UserMistake.
    """
    numbers = [word.removeprefix("#") for word in words if word.removeprefix("#").isdecimal()]
    paths = [Path(word) for word in words if not word.removeprefix("#").isdecimal()]
    if len(numbers) > 1 or len(paths) + (run is not None) > 1:
        raise UserMistake(f"{' '.join(words)}: give one trial number, and at most one run directory")
    directory = run or (paths[0] if paths else newest_run())
    return read_run(directory), int(numbers[0]) if numbers else None


def check_writable(paths: Mapping[str, Path | None]) -> None:
    """Refuse files that cannot be written, or that two options name: before minutes of work, not after.

    Args:
        paths: option -> what it was given; None for one that was not.

    Raises:
        UserMistake: naming the option and the way out.
    """
    seen: dict[Path, str] = {}
    for option, path in paths.items():
        if path is None:
            continue
        if why := _why_not(path):
            raise UserMistake(f"{option} {path}: {why}; give the path of a file in an existing directory")
        other = seen.setdefault(path.resolve(), option)
        if other != option:
            raise UserMistake(f"{other} and {option}: both name {path}; give each a file of its own")


def _why_not(path: Path) -> str | None:
    if path.is_dir():
        return "is a directory"
    # Files are replaced by a rename: a device or a pipe would be gone.
    if path.parent == Path("/dev") or (path.exists() and not path.is_file()):
        return "is no ordinary file"
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        return f"{path.parent} is not a directory that can be written"
    return None

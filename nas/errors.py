"""Errors by consequence: the user's mistake, this trial fails, the run stops."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from nas.files import CorruptFile, WriteFailed
from spaces.errors import ArchitectureError, SpaceError, UnknownNameError, UserMistake, nearest

__all__ = [
    "ArchitectureError",
    "FailureKind",
    "RunStopped",
    "SpaceError",
    "SpaceExhausted",
    "TrialFailure",
    "UnknownNameError",
    "UserMistake",
    "first_line",
    "mistakes_end",
    "nearest",
]

FailureKind = Literal["error", "nan", "memory", "timeout", "killed", "budget", "interrupted"]


class TrialFailure(RuntimeError):
    """This candidate failed and the search goes on; ``kind`` is recorded with the reason."""

    def __init__(self, kind: FailureKind, reason: str):
        super().__init__(reason)
        self.kind: FailureKind = kind
        self.reason = reason


class SpaceExhausted(RuntimeError):
    """Every architecture of the space has been proposed."""


class RunStopped(RuntimeError):
    """The run cannot go on (exit code 1); what was recorded is safe."""


def first_line(error: BaseException, limit: int | None = None) -> str:
    """What ``error`` says, in one line of at most ``limit`` characters; the name of its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:limit]


@contextmanager
def mistakes_end(parser: ArgumentParser) -> Iterator[None]:
    """For scripts: errors of ours end them in one line, a UserMistake with exit code 2, the others with 1."""
    try:
        yield
    except UserMistake as mistake:
        parser.error(str(mistake))
    except (RunStopped, CorruptFile, WriteFailed) as stopped:
        parser.exit(1, f"{parser.prog}: error: {stopped}\n")

"""Errors by consequence: the user's mistake, this trial fails, the run stops."""

from __future__ import annotations

from typing import Literal

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

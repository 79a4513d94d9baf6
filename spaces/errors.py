"""Errors that a user can mend, and the nearest-name suggestion they carry."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["ArchitectureError", "SpaceError", "UnknownNameError", "UserMistake", "nearest"]


class UserMistake(ValueError):
    """Something the caller gave is wrong; the message is one line and names the way out (exit code 2)."""


class SpaceError(UserMistake):
    """A search space is defined wrongly, or asked for something it cannot do."""


class ArchitectureError(UserMistake):
    """An architecture is not a point of its search space."""


class UnknownNameError(UserMistake):
    """A name (space, attention mechanism, task, ...) is not registered."""

    def __init__(self, what: str, name: str, known: Iterable[str]):
        names = sorted(known)
        super().__init__(
            f"unknown {what} {name!r}{nearest(name, names)}; known: {', '.join(names) or 'none'}"
        )


def nearest(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the closest of ``known``, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""

"""Work on a server that may be out of reach for a while."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from nas.errors import RunStopped
from nas.storage import error_text, stop_on_error

__all__ = ["Steady", "is_passing"]

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_PATIENCE = 180.0
_PATIENCE_WHEN_STOPPED = 5.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 5.0


class Steady:
    """Does one thing at a time, and again while the server cannot be reached, after pauses that become longer.

    Args:
        what: what messages call the thing that is worked on.
        way_back: the command that goes on later.
        let_through: errors that are answers.
    """

    def __init__(self, what: str, way_back: str, let_through: tuple[type[Exception], ...] = ()):
        self.mutex = threading.RLock()
        self.stopping = threading.Event()
        self._what = what
        self._way_back = way_back
        self._let_through = let_through
        self._given_up = False

    def __call__(self, work: Callable[[], _T]) -> _T:
        """What ``work`` returns, which must be fit to be done twice: an answer can be lost on its way.

        Raises RunStopped when the server stays away for three minutes, or a few seconds once ``stopping`` is set.
        """
        began: float | None = None
        pause = _FIRST_PAUSE
        while True:
            try:
                with self.mutex:
                    done = work()
                self._given_up = False
                return done
            except self._let_through:
                raise
            except Exception as error:
                if not is_passing(error):
                    with stop_on_error(self._what):
                        raise
                began = self._bear(error, began)
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _bear(self, error: Exception, began: float | None) -> float:
        """When the server was first out of reach, given that it is so now. Raises RunStopped after too long."""
        now = time.monotonic()
        if began is None and not self._given_up:
            logger.warning("%s cannot be reached (%s); trying again", self._what, error_text(error))
            return now
        began = now if began is None else began
        patience = _PATIENCE_WHEN_STOPPED if self.stopping.is_set() else _PATIENCE
        if now - began >= patience or self._given_up:
            self._given_up = True  # whoever has waited once does not wait again for each of its candidates
            raise RunStopped(
                f"{self._what} cannot be reached ({error_text(error)}); what was recorded before is safe, "
                f"go on with: {self._way_back}"
            ) from error
        return began


def is_passing(error: BaseException) -> bool:
    """Whether an error of a database on a server is about the connection to it, and may be gone at the next try."""
    from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError

    found: BaseException | None = error
    while found is not None:
        if isinstance(found, DBAPIError):
            paused = "idle-in-transaction" in str(found)
            return (
                found.connection_invalidated
                or paused
                or isinstance(found, (InterfaceError, OperationalError))
            )
        found = found.__cause__
    return False

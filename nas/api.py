"""``nas.search``: a whole search from a script."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.errors import UserMistake
from nas.session import Session, SessionObserver, default_directory

if TYPE_CHECKING:
    from nas.config import SearchConfig
    from nas.executors import Executor
    from nas.records import StoredTrial
    from nas.report.data import RunReport
    from spaces import SearchSpace

__all__ = ["search"]


def search(
    space: str | SearchSpace,
    *,
    evaluate: Callable[..., Mapping[str, float]] | None = None,
    objectives: Sequence[str] | None = None,
    out: str | Path | None = None,
    observer: SessionObserver | None = None,
    **settings: Any,
) -> RunReport:
    """Search a space; the same call with the same ``out`` goes on where it was stopped.

    Args:
        space: a name as in ``nas spaces``, or a SearchSpace made in the script.
        evaluate: your own function of an architecture, returning metrics; it may take ``report``, ``seed`` and
            ``directory`` by name, and then ``report(step, value)`` returns True when it should return early. It is
            called in this process, so a crash of it is a crash of yours: for isolation give
            ``evaluator="file.py:function"`` instead. Without it, candidates are trained on the space's task.
        objectives: "name:maximize" or "name:minimize"; needed with ``evaluate``.
        out: run directory; ``runs/SPACE-TIME`` by default.
        observer: is told of each step; nothing is printed without one.
        settings: any key of a recipe, such as ``trials=50, controller="evolution", epochs=10``.

    Raises:
        UserMistake: a setting is wrong; the message is one line and names the way out.
        RunStopped: the run cannot go on.
    """
    given = dict(settings)
    if objectives is not None:
        given["objectives"] = list(objectives)
    executor: Executor | None = None
    made = None
    if not isinstance(space, str):
        made, given["space"] = space, f"script:{space.name}"
    else:
        given["space"] = space
    if evaluate is not None:
        from nas.executors import InlineExecutor
        from nas.trial import provide

        given["evaluator"] = f"script:{getattr(evaluate, '__name__', 'evaluate')}"
        provide(given["evaluator"], evaluate)
        executor = InlineExecutor()
    elif made is not None:
        raise UserMistake(
            "search: a SearchSpace object needs evaluate=FUNCTION, because no other process can import it; "
            "or put it into a file and give space='file.py:NAME'"
        )
    session = Session(
        Path(out) if out else default_directory(str(given["space"])), observer or _Silent(), executor, made
    )
    return session.run(given)


class _Silent:
    def space(self, space: SearchSpace, config: SearchConfig, found: Mapping[str, Any]) -> None: ...

    def searching(self, config: SearchConfig, finished: Sequence[StoredTrial]) -> None: ...

    def concluding(self, text: str) -> None: ...

    def started(self, trial: StoredTrial) -> None: ...

    def stage(self, trial: StoredTrial, event: dict[str, Any]) -> None: ...

    def finished(self, trial: StoredTrial) -> None: ...

    def note(self, text: str) -> None: ...

"""Where candidates run: isolated local processes, or inline for functions that no other process can import.

The names are imported on first use, so that a worker process, which imports this package to reach
``nas.executors.worker``, starts without what only the driver needs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nas.executors.base import Channel, Executor, Failure, OnEvent, Outcome
    from nas.executors.inline import InlineExecutor
    from nas.executors.local import LocalExecutor

__all__ = ["Channel", "Executor", "Failure", "InlineExecutor", "LocalExecutor", "OnEvent", "Outcome"]

_HOMES = {"InlineExecutor": "nas.executors.inline", "LocalExecutor": "nas.executors.local"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "nas.executors.base")), name)

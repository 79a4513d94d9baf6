"""Where candidates run: isolated local processes, the nodes of a Ray cluster, or inline for functions that no other
process can import.

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
    from nas.executors.ray import RayExecutor

__all__ = [
    "Channel",
    "Executor",
    "Failure",
    "InlineExecutor",
    "LocalExecutor",
    "OnEvent",
    "Outcome",
    "RayExecutor",
]

_HOMES = {
    "InlineExecutor": "nas.executors.inline",
    "LocalExecutor": "nas.executors.local",
    "RayExecutor": "nas.executors.ray",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "nas.executors.base")), name)

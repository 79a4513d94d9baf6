"""Neural architecture search by quality and by latency measured on the device that will run the model.

import nas
report = nas.search("efficient_transformer", trials=24, out="runs/first")
print(report.verdict())
model = nas.load_model("runs/first/export-17")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nas.api import search
    from nas.errors import RunStopped, TrialFailure, UserMistake
    from nas.export import load_model
    from nas.reader import read_run

__all__ = ["RunStopped", "TrialFailure", "UserMistake", "load_model", "read_run", "search"]

_HOMES = {
    "RunStopped": "nas.errors",
    "TrialFailure": "nas.errors",
    "UserMistake": "nas.errors",
    "load_model": "nas.export",
    "read_run": "nas.reader",
    "search": "nas.api",
}


def __getattr__(name: str) -> Any:
    # Imported on first use: a worker process imports this package and must start fast.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)

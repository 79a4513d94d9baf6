"""Passes that make a given model smaller and faster, and the pipeline that runs, measures and saves them.

>>> from compress import compress
>>> result = compress(model, ["ofb:target=0.5", "sit"], train=loader, validation=held_out)  # doctest: +SKIP
>>> result.export("deit-small-fast")  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compress.passes import list_passes, make_pass, parse_pass, register_pass
    from compress.passes.base import Budget, Context, Pass, PassFailed
    from compress.pipeline import compress
    from compress.result import CompressionResult, Step, load
    from compress.structure import StructureError

__all__ = [
    "Budget",
    "CompressionResult",
    "Context",
    "Pass",
    "PassFailed",
    "Step",
    "StructureError",
    "compress",
    "list_passes",
    "load",
    "make_pass",
    "parse_pass",
    "register_pass",
]

_HOMES = {
    **dict.fromkeys(("list_passes", "make_pass", "parse_pass", "register_pass"), "compress.passes"),
    **dict.fromkeys(("Budget", "Context", "Pass", "PassFailed"), "compress.passes.base"),
    **dict.fromkeys(("CompressionResult", "Step", "load"), "compress.result"),
    "StructureError": "compress.structure",
    "compress": "compress.pipeline",
}


def __getattr__(name: str) -> Any:
    # Loading a saved model must not pay for the training code, nor import a pass.
    if name not in _HOMES:
        raise AttributeError(f"module 'compress' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)

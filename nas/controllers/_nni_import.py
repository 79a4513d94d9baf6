"""NNI's modules for the controllers, whose messages name the controller and what can take its place."""

from __future__ import annotations

from typing import Any

from nas import nni_import

__all__ = ["nni_module"]


def nni_module(name: str, controller: str) -> Any:
    """The module ``name`` below "nni"; see ``nas.nni_import``. Raises UserMistake when it cannot be imported."""
    return nni_import.nni_module(name, f"controller {controller!r}", "controller 'tpe' or 'evolution'")

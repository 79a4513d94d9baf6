"""Imports of NNI: late, quiet, and with a clear word where NNI cannot be imported."""

from __future__ import annotations

import importlib
import sys
import warnings
from typing import Any

from nas.errors import UserMistake

__all__ = ["nni_module"]

_INSTALL = "pip install 'nas-toolkit[nni]'"


def nni_module(name: str, controller: str) -> Any:
    """The module ``name`` of NNI, without NNI's handler that writes its messages to the standard output.

    Args:
        name: dotted name below "nni", such as "algorithms.hpo.tpe_tuner".
        controller: who needs it, in messages.

    Raises:
        UserMistake: NNI or something that it needs is missing or does not fit.
    """
    first = "nni" not in sys.modules
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = importlib.import_module(f"nni.{name}")
            if first:
                importlib.import_module("nni.runtime.log").silence_stdout()
    except (
        Exception
    ) as error:  # outdated packages fail on import in every way: missing names, attributes, types
        raise UserMistake(_reason(controller, error)) from error
    return module


def _reason(controller: str, error: Exception) -> str:
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    root = (missing or "").partition(".")[0]
    if root == "nni":
        what = "needs NNI 3.0, which is not installed"
    elif root == "pkg_resources":
        what = "needs NNI, and NNI needs pkg_resources, which setuptools 81 and later do not have any more"
    elif root:
        what = f"needs NNI, and NNI needs the package {root!r}, which is not installed"
    else:
        what = f"needs NNI, and importing NNI failed ({type(error).__name__}: {' '.join(str(error).split())})"
    return f"controller {controller!r} {what}; install it with: {_INSTALL}, or use controller 'tpe' or 'evolution'"

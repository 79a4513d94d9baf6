"""Imports of NNI: late, quiet, and with a clear word where NNI cannot be imported."""

from __future__ import annotations

import importlib
import sys
import warnings
from typing import Any

from nas.errors import UserMistake

__all__ = ["nni_module"]

_INSTALL = "pip install 'nas-toolkit[nni]'"


def nni_module(name: str, needed_by: str, instead: str) -> Any:
    """The module ``name`` of NNI, without NNI's handler that writes its messages to the standard output.

    Args:
        name: dotted name below "nni", such as "algorithms.hpo.tpe_tuner".
        needed_by: who needs it, in messages: "controller 'nni:tpe'".
        instead: what to use without NNI, in messages: "controller 'tpe' or 'evolution'".

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
        why = _reason(error)
        raise UserMistake(f"{needed_by} {why}; install it with: {_INSTALL}, or use {instead}") from error
    return module


def _reason(error: Exception) -> str:
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    root = (missing or "").partition(".")[0]
    if root == "nni":
        return "needs NNI 3.0, which is not installed"
    if root == "pkg_resources":
        return "needs NNI, and NNI needs pkg_resources, which setuptools 81 and later do not have any more"
    if root:
        return f"needs NNI, and NNI needs the package {root!r}, which is not installed"
    text = " ".join(str(error).split())
    return f"needs NNI, and importing NNI failed ({type(error).__name__}: {text})"

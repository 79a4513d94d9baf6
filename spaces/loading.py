"""Objects by the text that names them: ``package.module:ATTRIBUTE`` or ``path/to/file.py:ATTRIBUTE``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from hashlib import blake2b
from pathlib import Path
from types import ModuleType
from typing import Any

from spaces.errors import UserMistake, nearest

__all__ = ["cause_of", "importable", "load_object"]


def load_object(name: str) -> Any:
    """What ``package.module:ATTRIBUTE`` or ``path/to/file.py:ATTRIBUTE`` names.

    A file is loaded under a private module name that depends on its path alone, so that all processes agree
    on it, and again once it has changed.

    Raises:
        UserMistake: no such file, module or attribute, or a failing import (with file, line and cause).
    """
    place, colon, attribute = name.rpartition(":")
    if not (place and colon and attribute):
        raise UserMistake(f"{name!r} must be 'package.module:ATTRIBUTE' or 'path/to/file.py:ATTRIBUTE'")
    module = _load_file(Path(place), name) if place.endswith(".py") else _load_module(place, name)
    if hasattr(module, attribute):
        return getattr(module, attribute)
    known = [key for key in vars(module) if not key.startswith("_")]
    where = getattr(module, "__file__", None) or module.__name__
    raise UserMistake(f"{name!r}: {where} has no attribute {attribute!r}{nearest(attribute, known)}")


def importable(module: str) -> bool:
    """Whether there is a module of that dotted name, be it a broken one; imports its parent packages."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError as error:
        return not f"{module}.".startswith(f"{error.name}.")
    except ValueError:  # __main__, or a name with empty parts
        return False
    except Exception:  # a parent package fails: importing the module will tell
        return True


def cause_of(error: BaseException, file: str | None = None) -> str:
    """``file, line 3: TypeError: ...`` in one line: the innermost line of ``file``, or of any if None."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}: {type(error).__name__}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)[1:]  # the first is whoever caught it
    own = [
        frame for frame in frames if (frame.filename == file if file else "importlib" not in frame.filename)
    ]
    where = f"{own[-1].filename}, line {own[-1].lineno}: " if own else ""
    return f"{where}{type(error).__name__}: {' '.join(str(error).split())}"


def _load_module(module: str, name: str) -> ModuleType:
    if not importable(module):
        raise UserMistake(
            f"{name!r}: there is no module {module!r} on the Python path; "
            "name a file elsewhere as 'path/to/file.py:ATTRIBUTE'"
        )
    try:
        return importlib.import_module(module)
    except Exception as error:
        raise UserMistake(f"{name!r}: {cause_of(error)}") from error


def _load_file(path: Path, name: str) -> ModuleType:
    if not path.is_file():
        raise UserMistake(f"{name!r}: there is no file {str(path)!r}")
    path = path.resolve()
    module_name = f"_nas_file_{blake2b(str(path).encode(), digest_size=8).hexdigest()}"
    version = (path.stat().st_mtime_ns, path.stat().st_size)
    loaded = sys.modules.get(module_name)
    if loaded is not None and getattr(loaded, "__nas_version__", None) == version:
        return loaded
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise UserMistake(f"{name!r}: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up by its name while it is being executed
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise UserMistake(f"{name!r}: {cause_of(error, str(path))}") from error
    module.__nas_version__ = version  # type: ignore[attr-defined]  # our own mark
    return module

"""Search spaces by name.

A built-in space is a module in ``spaces.vision``, ``spaces.sequence`` or ``spaces.video`` that registers it
on import; nothing else has to know of it. Other distributions name theirs in the entry-point group
``nas.spaces``.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import pkgutil
import re
from collections.abc import Callable
from typing import TypeVar

from spaces.errors import SpaceError, UnknownNameError, UserMistake
from spaces.loading import cause_of, importable, load_object
from spaces.space import SearchSpace

__all__ = ["get_space", "list_spaces", "load_object", "register_space"]

Factory = Callable[[], SearchSpace]
_F = TypeVar("_F", bound=Factory)

_PACKAGES = ("spaces.vision", "spaces.sequence", "spaces.video")
_GROUP = "nas.spaces"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")

_log = logging.getLogger(__name__)
_factories: dict[str, dict[str, Factory]] = {}
_made: dict[Factory, SearchSpace] = {}
_walked: set[str] = set()


def register_space(name: str, *, scale: str = "default") -> Callable[[_F], _F]:
    """Decorator: makes what a function without arguments returns available as ``get_space("name:scale")``.

    The function is called when the space is first asked for. The scale registered first is the one that the
    name alone stands for.

    Raises:
        SpaceError: a name or scale with other characters than letters, digits, ``_`` and ``-``, or one that
            another function has taken.
    """
    for label, text in (("name", name), ("scale", scale)):
        if not _NAME.fullmatch(text):
            raise SpaceError(f"register_space: {label}={text!r} must consist of letters, digits, '_' and '-'")

    def register(factory: _F) -> _F:
        taken = _factories.get(name, {}).get(scale)
        if taken is not None and _origin(taken) != _origin(factory):
            raise SpaceError(
                f"search space '{name}:{scale}' is registered by {_origin(taken)} "
                f"and again by {_origin(factory)}; rename one of them"
            )
        _factories.setdefault(name, {})[scale] = factory
        return factory

    return register


def get_space(name: str, task: str | None = None) -> SearchSpace:
    """The search space called ``name``; the same object each time.

    Args:
        name: ``"name"`` (with ``task``: its first scale for that task if it has one; otherwise its first
            scale), ``"name:scale"``, ``"package.module:ATTRIBUTE"`` or ``"path/to/file.py:ATTRIBUTE"``.
            An attribute is a SearchSpace or a function without arguments that returns one.
        task: name of a task, to choose among the scales of a name.

    Raises:
        UnknownNameError: nothing of that name, or no such scale; gives the nearest and all known ones.
        UserMistake: a module or file that cannot be imported (with file, line and cause), or that has no
            such attribute.
        SpaceError: what was found is not a search space.
    """
    place, colon, detail = name.rpartition(":")
    if not colon:
        if name.endswith(".py"):
            raise UserMistake(
                f"space {name!r}: say which of its attributes is the space, as in '{name}:SPACE'"
            )
        return _by_task(name, task)
    if place.endswith(".py"):
        return _as_space(load_object(name), name)
    scales = _near_at_hand(place)
    if scales is None and importable(place):
        return _as_space(load_object(name), name)
    scales = scales or _find(place)
    if detail not in scales:
        raise UnknownNameError(f"scale of search space {place!r}", detail, scales)
    return _make(scales[detail], name)


def list_spaces() -> dict[str, list[str]]:
    """Name -> scales of every registered space, names sorted, scales in the order of registration.

    Imports every module that holds one. One that cannot be imported is logged as a warning and left out.
    """
    for package in _PACKAGES:
        if package not in _walked:
            _walked.add(package)
            _walk(package)
    for entry in _entry_points():
        if entry.name not in _factories:
            try:
                _load_entry_point(entry)
            except Exception as error:
                _log.warning("search space %r is not available: %s", entry.name, error)
    return {name: list(_factories[name]) for name in sorted(_factories)}


def _by_task(name: str, task: str | None) -> SearchSpace:
    scales = _near_at_hand(name) or _find(name)
    if task is not None:
        for scale, factory in scales.items():
            space = _make(factory, f"{name}:{scale}")
            if space.task == task:
                return space
    return _make(next(iter(scales.values())), name)


def _near_at_hand(name: str) -> dict[str, Factory] | None:
    """The scales of ``name`` if they are registered by the module or the entry point of that name."""
    if name not in _factories and _NAME.fullmatch(name):
        for package in _PACKAGES:
            if importable(f"{package}.{name}"):
                importlib.import_module(f"{package}.{name}")
        for entry in _entry_points():
            if entry.name == name and name not in _factories:
                _load_entry_point(entry)
    return _factories.get(name)


def _find(name: str) -> dict[str, Factory]:
    known = list_spaces()
    if name in _factories:
        return _factories[name]
    if any(mark in name for mark in "./\\"):
        raise UserMistake(
            f"space {name!r} is neither a known name ({', '.join(known) or 'none'}) nor a module that can be "
            "imported; write a file as 'path/to/file.py:ATTRIBUTE' and a module as 'package.module:ATTRIBUTE'"
        )
    raise UnknownNameError("search space", name, known)


def _make(factory: Factory, name: str) -> SearchSpace:
    if factory not in _made:
        space = factory()
        if not isinstance(space, SearchSpace):
            raise SpaceError(
                f"space {name!r}: {_origin(factory)} returned {type(space).__name__}, not a SearchSpace"
            )
        _made[factory] = space
    return _made[factory]


def _origin(factory: Factory) -> str:
    return f"{getattr(factory, '__module__', '?')}.{getattr(factory, '__qualname__', repr(factory))}"


def _walk(package: str) -> None:
    for found in pkgutil.iter_modules(importlib.import_module(package).__path__):
        if found.name.startswith("_"):
            continue
        try:
            importlib.import_module(f"{package}.{found.name}")
        except Exception as error:
            _log.warning("search spaces of %s.%s are not available: %s", package, found.name, cause_of(error))


def _entry_points() -> list[importlib.metadata.EntryPoint]:
    return sorted(importlib.metadata.entry_points(group=_GROUP), key=lambda entry: (entry.name, entry.value))


def _load_entry_point(entry: importlib.metadata.EntryPoint) -> None:
    """A module (which registers on import), a SearchSpace, or a function that returns one."""
    try:
        found = entry.load()
    except Exception as error:
        raise UserMistake(f"space {entry.name!r}: entry point {entry.value!r}: {cause_of(error)}") from error
    if entry.name in _factories:
        return
    if isinstance(found, SearchSpace):
        register_space(entry.name)(lambda: found)
    elif callable(found):
        register_space(entry.name)(found)
    else:
        raise SpaceError(
            f"space {entry.name!r}: entry point {entry.value!r} registers no space of that name; "
            "it must name a module that does so, a SearchSpace, or a function that returns one, "
            f"not {type(found).__name__}"
        )


def _as_space(found: object, name: str) -> SearchSpace:
    if isinstance(found, SearchSpace):
        return found
    if callable(found) and not isinstance(found, type):
        return _make(found, name)
    raise SpaceError(
        f"space {name!r} must be a SearchSpace or a function without arguments that returns one, "
        f"not {type(found).__name__}"
    )

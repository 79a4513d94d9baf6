"""One registry for everything that is found by name: a decorator puts it in, a package is walked to find it."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import pkgutil
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from spaces.errors import UnknownNameError

__all__ = ["Registry"]

T = TypeVar("T")
Named = TypeVar("Named")


class Registry(Generic[T]):
    """Names of one kind of thing, each defined in some module of ``package``.

    A name is looked for in the module of the same name first, so that asking for one thing does not import all
    the others; only when it is not there is the whole package walked. Other distributions add names through the
    entry-point group that is called like the package.

    Args:
        what: what a name stands for, in messages ("controller").
        package: dotted name of the package whose modules register the names.
    """

    def __init__(self, what: str, package: str):
        self._what = what
        self._package = package
        self._found: dict[str, T] = {}
        self._walked = False

    def register(self, name: str) -> Callable[[Named], Named]:
        """Decorator that gives ``name`` to what it decorates. Raises ValueError if the name is taken by another."""

        def decorate(thing: Named) -> Named:
            known = self._found.get(name)
            if known is not None and _origin(known) != _origin(thing):
                raise ValueError(
                    f"{self._what} {name!r} is registered twice, by {_origin(known)} and {_origin(thing)}; "
                    "rename one of them"
                )
            self._found[name] = thing  # type: ignore[assignment]  # the caller registers what the registry is of
            return thing

        return decorate

    def get(self, name: str) -> T:
        """What ``name`` stands for. Raises UnknownNameError with the nearest name and the list."""
        if name not in self._found and name.isidentifier():
            module = f"{self._package}.{name}"
            if importlib.util.find_spec(module) is not None:
                importlib.import_module(module)
        if name not in self._found:
            known = self.names()
            if name in known and name not in self._found:
                self.register(name)(self._entry_points()[name].load())
            if name not in self._found:
                raise UnknownNameError(self._what, name, known)
        return self._found[name]

    def names(self) -> list[str]:
        """All names, sorted; imports every module of the package."""
        if not self._walked:
            package = importlib.import_module(self._package)
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{self._package}.{module.name}")
            self._walked = True
        return sorted({*self._found, *self._entry_points()})

    def _entry_points(self) -> dict[str, importlib.metadata.EntryPoint]:
        return {point.name: point for point in entry_points(group=self._package)}


def _origin(thing: object) -> str:
    return f"{getattr(thing, '__module__', '?')}.{getattr(thing, '__qualname__', thing)}"

"""Tasks by name. Adding one is one file in this package with ``@register_task("name")`` on its class.

Other distributions add theirs through the entry-point group ``nas.tasks``; any class can be named as
``package.module:Class``. Importing this package imports no task: what a task needs (torch, scikit-learn,
tokenizers, ...) is loaded when it is made.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from nas.errors import UnknownNameError, UserMistake, nearest

if TYPE_CHECKING:
    from nas.tasks.base import Task

__all__ = ["list_tasks", "make_task", "register_task"]

_GROUP = "nas.tasks"
_REGISTRY: dict[str, type[Task]] = {}
_TaskClass = TypeVar("_TaskClass", bound="type[Task]")


def register_task(name: str) -> Callable[[_TaskClass], _TaskClass]:
    """Class decorator: makes a ``Task`` known as ``name`` and sets its attribute ``name``.

    Raises ValueError when another class has the name already.
    """

    def add(cls: _TaskClass) -> _TaskClass:
        known = _REGISTRY.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"task {name!r} is already registered by {known.__module__}:{known.__name__}")
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return add


def make_task(name: str, **options: Any) -> Task:
    """The task ``name``, made from JSON options.

    Args:
        name: a registered name, or ``package.module:Class``.
        options: those of the task's constructor; every built-in task takes ``data``, ``data_root``,
            ``cache_dir`` and ``seed``.

    Raises:
        UnknownNameError: no such task.
        UserMistake: an option that the task does not have or of another type, or data that cannot be used.
    """
    cls = _find(name)
    _check_options(name, cls, options)
    return cls(**options)


def list_tasks() -> list[str]:
    """Sorted names of all tasks: built-in, registered, and of installed entry points."""
    _load_built_ins()
    return sorted({*_REGISTRY, *_entry_points()})


def _find(name: str) -> type[Task]:
    if ":" in name:
        return _from_module(name)
    if name not in _REGISTRY and name.isidentifier() and importlib.util.find_spec(f"{__name__}.{name}"):
        # The file that carries the name is tried alone, so that no other task is imported for it.
        importlib.import_module(f"{__name__}.{name}")
    if name not in _REGISTRY:
        _load_built_ins()
    if name not in _REGISTRY and name in _entry_points():
        register_task(name)(_entry_points()[name].load())
    if name not in _REGISTRY:
        raise UnknownNameError("task", name, list_tasks())
    return _REGISTRY[name]


def _from_module(name: str) -> type[Task]:
    module_name, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise UserMistake(f"task {name!r} cannot be loaded ({error}); give package.module:Class") from error
    from nas.tasks.base import Task

    if not (isinstance(found, type) and issubclass(found, Task)):
        raise UserMistake(f"task {name!r} is not a subclass of nas.tasks.base.Task")
    if not hasattr(found, "name"):
        found.name = name
    return found


def _load_built_ins() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")


def _entry_points() -> Mapping[str, Any]:
    return {point.name: point for point in entry_points(group=_GROUP)}


def _check_options(name: str, cls: type[Task], options: Mapping[str, Any]) -> None:
    """Names and types of ``options`` against the constructor, so that a recipe's slip is one clear line."""
    parameters = inspect.signature(cls).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for unknown in options.keys() - parameters.keys():
        hint, known = nearest(unknown, parameters), ", ".join(parameters)
        raise UserMistake(f"task {name!r} has no option {unknown!r}{hint}; known: {known}")
    from pydantic import TypeAdapter, ValidationError  # 0.1 s that no import of this package should cost

    hints = get_type_hints(cls.__init__)
    for option, value in options.items():
        try:
            TypeAdapter(hints.get(option, Any)).validate_python(value, strict=True)
        except ValidationError:
            allowed = inspect.formatannotation(hints[option]).replace("typing.", "")
            raise UserMistake(f"task {name!r}: option {option}={value!r} must be {allowed}") from None

"""Tasks by name. Adding one is one file in this package with ``@register_task("name")`` on its class.

Other distributions add theirs through the entry-point group ``nas.tasks``; any class can be named as
``package.module:Class``. Importing this package imports no task: what a task needs (torch, scikit-learn,
tokenizers, ...) is loaded when it is made.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from nas.errors import UserMistake, nearest
from spaces.names import Registry

if TYPE_CHECKING:
    from nas.tasks.base import Task

__all__ = ["list_tasks", "make_task", "register_task"]

_REGISTRY: Registry[type[Task]] = Registry("task", "nas.tasks")
_TaskClass = TypeVar("_TaskClass", bound="type[Task]")


def register_task(name: str) -> Callable[[_TaskClass], _TaskClass]:
    """Class decorator: makes a ``Task`` known as ``name`` and sets its attribute ``name``.

    Raises ValueError when another class has the name already.
    """

    def add(cls: _TaskClass) -> _TaskClass:
        registered = _REGISTRY.register(name)(cls)
        registered.name = name
        return registered

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
    return _REGISTRY.names()


def _find(name: str) -> type[Task]:
    return _from_module(name) if ":" in name else _REGISTRY.get(name)


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

"""Controllers: what proposes architectures. One file each, found by its decorator; nothing else is edited.

One accuracy to raise and one latency to lower:

    from nas.controllers import make_controller
    controller = make_controller("evolution", space, ["maximize", "minimize"], seed=0, population=30)
    architecture = controller.ask()
    controller.tell(architecture, [accuracy, latency_ms])
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from nas.controllers.base import Controller
from nas.errors import UserMistake, nearest
from spaces.names import Registry

if TYPE_CHECKING:
    from nas.pareto import Direction
    from spaces import SearchSpace

__all__ = ["Controller", "list_controllers", "make_controller", "register_controller"]

ControllerClass = TypeVar("ControllerClass", bound="type[Controller]")

_registry: Registry[type[Controller]] = Registry("controller", __name__)


def register_controller(name: str) -> Callable[[ControllerClass], ControllerClass]:
    """Class decorator: makes a :class:`Controller` known as ``name``. ValueError if the name is another's."""

    def register(cls: ControllerClass) -> ControllerClass:
        _registry.register(name)(cls)
        cls.name = name
        return cls

    return register


def make_controller(
    name: str, space: SearchSpace, directions: Sequence[Direction], seed: int = 0, **options: Any
) -> Controller:
    """The controller ``name`` for ``space``; ``directions`` has "maximize" or "minimize" for each objective.

    Raises:
        UnknownNameError: no controller has that name.
        UserMistake: the controller has no such option, or an option or direction is out of its range.
    """
    cls = _registry.get(name)
    allowed = _options(cls)
    for option in options:
        if option not in allowed:
            raise UserMistake(
                f"controller {name!r} has no option {option!r}{nearest(option, allowed)}; "
                f"options: {', '.join(allowed) or 'none'}"
            )
    return cls(space, directions, seed, **options)


def list_controllers() -> list[str]:
    """Names of all registered controllers, in alphabetical order; imports their modules."""
    return _registry.names()


def _options(cls: type[Controller]) -> list[str]:
    parameters = inspect.signature(cls).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY]

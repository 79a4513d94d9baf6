"""Compression passes, one per file, found by name.

``make_pass("ofb", target=0.5)`` and ``parse_pass("ofb:target=0.5")`` are the same.

Other distributions add theirs through the entry-point group ``compress.passes``.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from compress.passes._annotations import as_written, check_types, check_words
from nas.errors import first_line
from spaces.errors import UserMistake, nearest
from spaces.names import Registry

if TYPE_CHECKING:
    from compress.passes.base import Pass

__all__ = ["list_passes", "make_pass", "parse_pass", "register_pass"]

_PassClass = TypeVar("_PassClass", bound="type[Pass]")
_REGISTRY: Registry[type[Pass]] = Registry("pass", "compress.passes")


def register_pass(name: str) -> Callable[[_PassClass], _PassClass]:
    """Decorator that gives a subclass of ``Pass`` its name. Raises ValueError when another class has it already.

    Types of its options are looked at here, by the annotations of its ``__init__``; ranges are its own, as laws of
    ``compress.passes._laws``.
    """

    def add(cls: _PassClass) -> _PassClass:
        cls.name = name
        return _REGISTRY.register(name)(cls)

    return add


def list_passes() -> list[str]:
    """All names, sorted."""
    return _REGISTRY.names()


def make_pass(name: str, **options: Any) -> Pass:
    """The pass of that name.

    Raises UserMistake for an unknown name or option (with the nearest one), or a value of another type than the pass's
    ``__init__`` has in its annotation.
    """
    cls = _REGISTRY.get(name)
    allowed = [key for key in inspect.signature(cls).parameters if key != "self"]
    for option in options:
        if option not in allowed:
            known = ", ".join(allowed) or "none"
            raise UserMistake(
                f"pass {name!r}: unknown option {option!r}{nearest(option, allowed)}; known: {known}"
            )
    try:
        made = cls(**options)
    except UserMistake:
        raise  # what the pass itself has to say is the most exact
    except Exception as error:  # a wrong type may raise anything
        check_types(cls.__init__, name, options)
        if not isinstance(error, (TypeError, ValueError)):
            raise
        given = (
            ", ".join(f"{option}={as_written(value)}" for option, value in options.items()) or "no options"
        )
        raise UserMistake(
            f"pass {name!r}: cannot be made with {given} ({first_line(error)}); its options are "
            f"{', '.join(allowed) or 'none'}"
        ) from None
    check_types(cls.__init__, name, options)
    check_words(cls.__init__, name, options)
    return made


def parse_pass(text: str) -> Pass:
    """A pass written as text: ``name`` or ``name:option=value,option=value``.

    Values are read as YAML: ``0.5``, ``1e-3``, ``true``, ``null``, ``[3, 6, 9]``; commas within brackets do not
    separate.

    Raises:
        UserMistake: an unknown pass or option, or text of another form.
    """
    name, colon, rest = text.strip().partition(":")
    options: dict[str, Any] = {}
    for piece in _pieces(rest) if colon else ():
        key, equals, value = piece.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key.isidentifier() or key in options:
            raise UserMistake(
                f"pass {text!r}: {piece!r} is not option=value, or is given twice; write name:option=value,option=value"
            )
        try:
            options[key] = yaml.load(value, _Values)  # noqa: S506  # a SafeLoader
        except yaml.YAMLError:
            raise UserMistake(
                f"pass {text!r}: the value of {key!r} cannot be read; quote it as YAML"
            ) from None
    return make_pass(name.strip().replace("-", "_"), **options)


class _Values(yaml.SafeLoader):
    """YAML 1.1, but ``1e-3`` is a number as everywhere else (YAML 1.2); there it would need a dot and a sign."""


_Values.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+\Z"), list("-+0123456789")
)


def _pieces(text: str) -> list[str]:
    """Cut at the commas that are in no bracket."""
    pieces, depth = [""], 0
    for character in text:
        depth += {"[": 1, "{": 1, "(": 1, "]": -1, "}": -1, ")": -1}.get(character, 0)
        if character == "," and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += character
    return [piece.strip() for piece in pieces if piece.strip()]

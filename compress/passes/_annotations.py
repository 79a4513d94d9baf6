"""Options of passes against the annotations of their ``__init__``: one place that looks at types for all of them."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, Literal, Union

from spaces.errors import UserMistake, nearest

__all__ = ["as_written", "check_types", "check_words"]

_SINGLE: Mapping[Any, tuple[str, str]] = {
    int: ("a whole number", "numbers (whole)"),
    float: ("a number", "numbers"),
    bool: ("true or false", "true or false"),
    str: ("a word", "words"),
    type(None): ("null", "null"),
}
_SERIES = (list, tuple, Sequence)


def check_types(make: Callable[..., Any], name: str, options: Mapping[str, Any]) -> None:
    """Raises UserMistake for the first option whose value is not of the type of its annotation.

    Looked at are int, float, bool, str, None, lists and tuples of these, unions, and the types of a Literal's words;
    whatever else is annotated is left to the pass.

    Args:
        make: ``__init__`` of the pass.
        name: of the pass, for the message.
        options: name -> value.
    """
    for option, (value, hint) in _annotated(make, options).items():
        if not _fits(value, hint):
            raise UserMistake(
                f"pass {name!r}: {option}={as_written(value)} must be {' or '.join(_described(hint))}"
            )


def check_words(make: Callable[..., Any], name: str, options: Mapping[str, Any]) -> None:
    """Raises UserMistake for a value that is none of a Literal's."""
    for option, (value, hint) in _annotated(make, options).items():
        allowed = [word for one in _members(hint) for word in _words(one)]
        if not allowed or any(_fits(value, one) for one in _members(hint) if not _words(one)):
            continue
        if value not in allowed:
            hinted = nearest(str(value), [str(word) for word in allowed])
            raise UserMistake(
                f"pass {name!r}: {option}={as_written(value)}{hinted}; allowed: {', '.join(map(str, allowed))}"
            )


def as_written(value: Any) -> str:
    """As in the text of a pass."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return repr(value)


def _annotated(make: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    try:
        hints = typing.get_type_hints(make)
    except (NameError, AttributeError, TypeError):  # names that only a type checker imports
        return {}
    return {option: (value, hints[option]) for option, value in options.items() if option in hints}


def _members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else (hint,)


def _words(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()


def _fits(value: Any, hint: Any) -> bool:
    members = _members(hint)
    if len(members) > 1:
        return any(_fits(value, one) for one in members)
    if words := _words(hint):
        return any(type(value) is type(word) for word in words)
    if hint in (int, float):
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    if hint in (bool, str, type(None)):
        return isinstance(value, hint)
    if _series(hint):
        parts = [one for one in typing.get_args(hint) if one is not Ellipsis]
        if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
            return False
        return not parts or all(any(_fits(one, part) for part in parts) for one in value)
    return True


def _series(hint: Any) -> bool:
    return hint in _SERIES or typing.get_origin(hint) in (list, tuple, typing.get_origin(Sequence[int]))


def _described(hint: Any) -> list[str]:
    """What is allowed, in words, each once."""
    found: dict[str, None] = {}
    for one in _members(hint):
        if words := _words(one):
            found.update(dict.fromkeys(str(word) for word in words))
        elif _series(one):
            parts = [part for part in typing.get_args(one) if part is not Ellipsis]
            several = _SINGLE.get(parts[0], ("", "values"))[1] if parts else "values"
            found[f"a list of {several}"] = None
        else:
            found[_SINGLE.get(one, (getattr(one, "__name__", str(one)), ""))[0]] = None
    return list(found)

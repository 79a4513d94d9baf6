"""The palette of attention mechanisms: one per file, all called alike (``base.Attention``).

>>> import torch
>>> from spaces.attention import make_attention
>>> attention = make_attention("cosformer", dim=32, num_heads=4, causal=True)
>>> attention(torch.randn(2, 10, 32)).shape
torch.Size([2, 10, 32])

A new mechanism is one new file in this package with a class under ``@register_attention("name")``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from spaces.attention.base import Attention
from spaces.errors import SpaceError
from spaces.names import Registry

__all__ = ["Attention", "list_attention", "make_attention", "register_attention"]

_REGISTRY: Registry[type[Attention]] = Registry("attention mechanism", "spaces.attention")

Mechanism = TypeVar("Mechanism", bound=type[Attention])


def register_attention(name: str) -> Callable[[Mechanism], Mechanism]:
    """Class decorator that puts a mechanism into the palette under ``name``.

    Raises:
        SpaceError: what it decorates is not an ``Attention``.
        ValueError: the name is taken by another class.
    """

    def decorate(mechanism: Mechanism) -> Mechanism:
        if not (isinstance(mechanism, type) and issubclass(mechanism, Attention)):
            raise SpaceError(
                f"register_attention({name!r}): {mechanism!r} must be a class derived from spaces.attention.Attention"
            )
        return _REGISTRY.register(name)(mechanism)

    return decorate


def make_attention(name: str, dim: int, num_heads: int, **options: Any) -> Attention:
    """A fresh mechanism.

    Args:
        name: a name from ``list_attention()``.
        dim: width of query and output.
        num_heads: number of heads.
        options: arguments of ``base.Attention`` and whatever else the mechanism takes.

    Raises:
        UnknownNameError: ``name`` is not registered; the message holds the nearest name.
    """
    return _REGISTRY.get(name)(dim, num_heads, **options)


def list_attention() -> list[str]:
    """The names of all mechanisms, sorted."""
    return _REGISTRY.names()

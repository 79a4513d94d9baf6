"""What can be built: search spaces, and the architectures that they are made of."""

from __future__ import annotations

from spaces.errors import ArchitectureError, SpaceError, UnknownNameError, UserMistake
from spaces.parameters import Architecture, Choice, Constraint, Float, Int, Parameter, Scalar, When
from spaces.registry import get_space, list_spaces, register_space
from spaces.signature import ClickThroughRateSignature, ImageSignature, Signature, TranslationSignature
from spaces.space import SearchSpace

__all__ = [
    "Architecture",
    "ArchitectureError",
    "Choice",
    "ClickThroughRateSignature",
    "Constraint",
    "Float",
    "ImageSignature",
    "Int",
    "Parameter",
    "Scalar",
    "SearchSpace",
    "Signature",
    "SpaceError",
    "TranslationSignature",
    "UnknownNameError",
    "UserMistake",
    "When",
    "get_space",
    "list_spaces",
    "register_space",
]

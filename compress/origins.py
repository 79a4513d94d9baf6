"""Where a model came from: what has to be called to get one of its kind again, in JSON."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from compress.saved import TRUSTED, trusted_class
from compress.structure import StructureError
from nas.errors import UserMistake

__all__ = ["base_of", "origin_of"]

Origin = dict[str, Any]

# Sizes do not matter, they are differences like any other.
_SMALL_VIT = {
    "img_size": 16,
    "patch_size": 16,
    "embed_dim": 12,
    "depth": 1,
    "num_heads": 1,
    "num_classes": 1,
}


# Of names with a colon or a slash timm takes what lies in a folder, or on the network.
_TIMM_NAME = re.compile(r"\w+(\.\w+)?", re.ASCII)


def origin_of(model: nn.Module) -> Origin:
    """The origin of a timm model, or of a class that can be made without arguments.

    Of others it must be given: ``{"kind": "timm", "name": ..., "kwargs": {...}}``,
    ``{"kind": "class", "class": "package.module:Name", "kwargs": {...}}``, or
    ``{"kind": "space", "space": ..., "task": ..., "architecture": {...}, "signature": {...}}``.

    Raises:
        StructureError: it cannot be told from the model alone.
    """
    import timm

    config = getattr(model, "pretrained_cfg", None)
    name = (
        config.get("architecture") if isinstance(config, Mapping) else getattr(config, "architecture", None)
    )
    cls = type(model)
    if isinstance(name, str) and timm.is_model(name) and cls.__module__.startswith("timm."):
        return {"kind": "timm", "name": name, "kwargs": {}}
    kwargs = dict(_SMALL_VIT) if _is_timm_vit(cls) else {}
    text = f"{cls.__module__}:{cls.__qualname__}"
    required = [
        parameter.name
        for parameter in inspect.signature(cls).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if required or "<" in text or cls.__module__ == "__main__":
        why = f"needs arguments ({', '.join(required)})" if required else "cannot be imported by name"
        raise StructureError(
            f"{text}: {why}, so how to build it again cannot be told; give "
            "origin={'kind': 'class', 'class': 'package.module:Name', 'kwargs': {...}}"
        )
    return {"kind": "class", "class": text, "kwargs": kwargs}


def base_of(origin: Mapping[str, Any], trust: Iterable[str] = ()) -> nn.Module:
    """A new model of that origin, with random weights, on the CPU. Raises UserMistake when it cannot be made."""
    makers: dict[str, Callable[[], nn.Module]] = {
        "timm": lambda: _from_timm(origin),
        "class": lambda: _from_class(origin, trust),
        "space": lambda: _from_space(origin),
    }
    kind = origin.get("kind")
    if kind not in makers:
        raise UserMistake(f"origin: kind {kind!r}; allowed: {', '.join(makers)}")
    try:
        with torch.random.fork_rng(devices=[]):
            return makers[kind]().eval()
    except UserMistake:
        raise
    except (RuntimeError, ValueError, TypeError, AssertionError, KeyError, AttributeError) as error:
        raise UserMistake(
            f"origin {dict(origin)}: cannot be built: {type(error).__name__}: {error}"
        ) from None


def _from_timm(origin: Mapping[str, Any]) -> nn.Module:
    import timm

    name, kwargs = origin.get("name"), origin.get("kwargs", {})
    if not (isinstance(name, str) and _TIMM_NAME.fullmatch(name) and timm.is_model(name)):
        raise UserMistake(
            f"origin: timm name {name!r}: timm {timm.__version__} has no such model (see timm.list_models()), and "
            "nothing is fetched from elsewhere"
        )
    # What a file says must not make timm read further files, or the network.
    if reads := [
        name for name in kwargs if name.startswith("pretrained") or name in ("checkpoint_path", "cache_dir")
    ]:
        raise UserMistake(f"origin: {reads[0]!r} is not allowed; weights come with the saved model")
    model: nn.Module = timm.create_model(name, pretrained=False, **kwargs)
    return model


def _from_class(origin: Mapping[str, Any], trust: Iterable[str]) -> nn.Module:
    cls = trusted_class(str(origin["class"]), (*TRUSTED, *trust))
    return cls(**origin.get("kwargs", {}))


def _from_space(origin: Mapping[str, Any]) -> nn.Module:
    from pathlib import Path

    from nas.export import read_signature
    from spaces import get_space

    name = str(origin["space"])
    if ".py:" in name:
        raise UserMistake(
            f"origin: space {name!r} is a file, which is not run; give the name of an installed space"
        )
    space = get_space(name, task=origin.get("task"))
    signature = read_signature(dict(origin["signature"]), Path("origin"))
    model: nn.Module = space.build(space.canonical(origin["architecture"]), signature)
    return model


def _is_timm_vit(cls: type) -> bool:
    return cls.__module__ in ("timm.models.vision_transformer", "timm.models.deit") and cls.__name__ in (
        "VisionTransformer",
        "VisionTransformerDistilled",
    )

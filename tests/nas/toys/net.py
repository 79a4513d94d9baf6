"""A search space with a real, tiny model, for tests of what is done with weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from spaces import Choice, Int, SearchSpace


def _build(architecture: dict[str, Any], signature: Any) -> nn.Module:
    width = architecture["width"]
    layers: list[nn.Module] = [
        nn.Flatten(),
        nn.Linear(signature.channels * signature.height * signature.width, width),
    ]
    for _ in range(architecture["depth"]):
        layers += [nn.ReLU(), nn.Linear(width, width)]
    return nn.Sequential(*layers, nn.Linear(width, signature.classes))


SPACE = SearchSpace(
    "net", {"depth": Int(1, 3), "width": Choice([4, 8])}, build=_build, task="image_classification"
)

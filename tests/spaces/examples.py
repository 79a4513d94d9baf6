"""Search spaces that several test modules use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spaces import Choice, Constraint, Float, Int, SearchSpace

__all__ = ["cell", "constrained", "layered"]


def cell() -> SearchSpace:
    return SearchSpace(
        "cell",
        {
            "edge0": Choice(["conv", "pool", None]),
            "depth": Int(1, 6),
            "layer3.op": Choice(["attention", "mlp"], when=lambda a: a["depth"] > 3),
            "layer3.heads": Choice([2, 4, 8], when=lambda a: a.get("layer3.op") == "attention"),
            "dropout": Float(0.0, 0.5),
            "rate": Float(1e-4, 1e-1, log=True, when=lambda a: a["edge0"] is not None),
        },
        published={"plain": {"edge0": "conv", "depth": 1, "dropout": 0, "rate": 0.001}},
        baseline="plain",
    )


def layered() -> SearchSpace:
    """The CIFAR-10 space of the mixed-attention Transformer: three values of width, 12 to 14 layers."""
    parameters: dict[str, Any] = {"width": Choice([320, 384, 448]), "depth": Choice([12, 13, 14])}
    for layer in range(14):

        def when(a: Mapping[str, Any], layer: int = layer) -> bool:
            return bool(a["depth"] > layer)

        parameters[f"layer{layer}.ffn"] = Choice([1792, 1568, 1344, 896, 672], when=when)
        parameters[f"layer{layer}.heads"] = Choice([5, 6, 7], when=when)
        parameters[f"layer{layer}.attention"] = Choice(["cosformer", "softmax", "relative"], when=when)
    return SearchSpace("layered", parameters)


def constrained() -> SearchSpace:
    return SearchSpace(
        "constrained",
        {"width": Int(8, 64, step=8), "heads": Choice([1, 2, 3, 4, 5]), "depth": Int(1, 3)},
        constraints=[
            Constraint(
                "divisible", lambda a: a["width"] % a["heads"] == 0, "width must be a multiple of heads"
            ),
            Constraint("budget", lambda a: a["width"] * a["depth"] <= 128, "at most 128 units"),
        ],
    )

"""DeiT-Ti at 224 pixels with random weights: what every pass saves in time at half of the MACs, beside the peers."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from compress import compress
from compress.measuring import count
from compress.passes.base import Context
from nas.errors import UserMistake
from nas.latency import Target
from recipes.benchmarks._compression_others import merged, pruned

__all__ = ["OURS", "half_the_macs", "models_of"]

SHARE = 0.5
_TURNS = 6

Family = Callable[[float], list[str]]

OURS: dict[str, Family] = {
    "ofb": lambda s: [_ofb(1 - s)],
    "structured": lambda s: [f"structured:ratio={s},epochs=0"],
    "structured with embedding": lambda s: [f"structured:ratio={s},bottleneck=false,epochs=0"],
    "sit": lambda s: [_sit(s)],
    "token_merging": lambda s: [f"token_merging:strength={s}"],
    "low_rank": lambda s: [f"low_rank:ratio={s},keep=anyway,calibrate=false,epochs=0"],
    "activation_pruning": lambda s: [f"activation_pruning:share={s},epochs=0"],
    "ofb + sit": lambda s: [_ofb(1 - 0.6 * s), _sit(0.6 * s)],
    "sit + class_token_last_block": lambda s: [_sit(s), "class_token_last_block"],
    "ofb + class_token_last_block": lambda s: [_ofb(1 - s), "class_token_last_block"],
    "ofb + sit + class_token_last_block": lambda s: [
        _ofb(1 - 0.6 * s),
        _sit(0.6 * s),
        "class_token_last_block",
    ],
}
"""Passes at a strength in (0, 1). Those of several widths choose them by the size of weights: there is no training."""

FIXED = {
    "sit 98/49/24 after 3, 6, 9": ["sit:slim_after=[3, 6, 9],tokens=[98, 49, 24],epochs=0"],
    "class_token_last_block": ["class_token_last_block"],
    "dynamic_quantization": ["dynamic_quantization:keep_anyway=true"],
    "reparameterize": ["reparameterize"],
}
"""Passes without a strength; some refuse this model."""


def _ofb(target: float) -> str:
    return f"ofb:target={target:.4f},measure=macs,epochs=0,finetune_epochs=0,importance=magnitude"


def _sit(strength: float) -> str:
    return f"sit:keep={1 - strength:.4f},epochs=0,start=random"


def _deit() -> nn.Module:
    """The model, with its own random weights."""
    torch.manual_seed(0)
    return timm.create_model("deit_tiny_patch16_224").eval()


def half_the_macs(report: Callable[[str], None], known: Container[str] = ()) -> dict[str, Any]:
    """For each row not ``known`` the passes that leave half of the MACs, the weakest found by bisection; or why there
    are none."""
    model, found = _deit(), dict[str, Any]()
    example = (torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)),)
    dense = count(model, example)
    for name, family in OURS.items():
        if name in known:
            continue
        found[name] = _half(model, family, example, dense["macs"])
        report(f"{name}: {found[name]}")
    for name, passes in FIXED.items():
        if name in known:
            continue
        found[name] = _fixed(model, passes, example, dense)
        report(f"{name}: {found[name]}")
    return found


def _half(model: nn.Module, family: Family, example: tuple[Tensor, ...], dense: int) -> dict[str, Any]:
    low, high = 0.02, 0.98
    found: dict[str, Any] = {"refused": "does not reach half of the MACs"}
    for _ in range(_TURNS):
        middle = (low + high) / 2
        try:
            share = count(_applied(model, family(middle), example), example)["macs"] / dense
        except UserMistake as error:  # too strong, or of no use here at all
            high, found = middle, found if "passes" in found else {"refused": str(error)}
            continue
        if share <= SHARE:
            high, found = middle, {"passes": family(middle), "macs_ratio": round(share, 4)}
        else:
            low = middle
    return found


def _fixed(model: nn.Module, passes: list[str], example: tuple[Tensor, ...], dense: Any) -> dict[str, Any]:
    try:
        made = _applied(model, passes, example)
    except UserMistake as error:
        return {"passes": passes, "refused": str(error)}
    return {"passes": passes, "macs_ratio": round(count(made, example)["macs"] / dense["macs"], 4)}


def _applied(model: nn.Module, passes: Sequence[str], example: tuple[Tensor, ...]) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    batch = (torch.randn(2, 3, 224, 224, generator=generator), torch.tensor([0, 1]))
    result = compress(model, list(passes), train=[batch], example=example, epochs=0, measure_seconds=0)
    return result.model


def models_of(rows: dict[str, Any]) -> tuple[dict[str, nn.Module], tuple[Tensor, ...], dict[str, float]]:
    """The unpruned model, ours of ``half_the_macs``, and the peers; an example; the peers' shares of the MACs."""
    model = _deit()
    example = (torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0)),)
    models = {"unpruned": model}
    for name, row in rows.items():
        if "refused" not in row:
            models[name] = _applied(model, row["passes"], example)
    context = Context(example=example, target=Target.parse("cpu:1"))
    peers = {
        "ToMe r=16": merged(model, [16] * 12),
        "Torch-Pruning bottleneck 0.5": pruned(model, "GroupMagnitude", 0.5, context, bottleneck=True),
        "Torch-Pruning uniform 0.3125": pruned(model, "GroupMagnitude", 0.3125, context, bottleneck=False),
    }
    dense = count(model, example)["macs"]
    shares = {name: round(count(one, example)["macs"] / dense, 4) for name, one in peers.items()}
    return models | peers, example, shares

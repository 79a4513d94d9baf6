"""What the methods of the comparison take on the target.

A latency follows from the shapes alone, so settings are found on untrained models, and a trained model is measured by
one of the same widths.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compress.measuring import inputs_for_target, measure_against
from compress.passes import make_pass
from compress.passes.base import Context
from compress.structure import recognise
from compress.surgery import keep_embedding, keep_head_channels, keep_heads, keep_mlp_units
from nas.errors import RunStopped
from nas.latency import DeviceGate, Pair, Plan, Session, Target, measure_together

__all__ = ["BASE", "figures", "of_widths", "slimmed", "widths_of"]

BASE = "unpruned"


def figures(
    models: Mapping[str, nn.Module],
    example: Sequence[Tensor],
    batches: Sequence[int],
    seconds: float,
    *,
    base: str = BASE,
    rivals: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """For every batch and model the measured ratio to ``base`` with its interval, all in the same rounds.

    ``rivals``: name -> another that it is compared with besides.
    """
    found: dict[str, Any] = {}
    for batch in batches:
        target = Target.parse(f"cpu:1@{batch}")
        if rivals:
            session = _every_pair(models, example, target, seconds)
        else:
            session = measure_against(models, base, example, target, seconds=seconds)
        rows = {}
        for name in models:
            result = session.results[name]
            row: dict[str, Any] = {"ms": round(result.median_ms, 4), "trusted": result.trusted}
            if name != base:
                pair = session.pair(name, base)
                row |= _of_pair(pair) | {"faster": round(1 / pair.ratio, 3), "rounds": pair.rounds}
            if rivals and name in rivals:
                row[f"to {rivals[name]}"] = _of_pair(session.pair(name, rivals[name]))
            rows[name] = row
        found[str(target)] = rows
    return found


def _of_pair(pair: Pair) -> dict[str, Any]:
    return {"ratio": round(pair.ratio, 4), "low": round(pair.low, 4), "high": round(pair.high, 4)}


def _every_pair(
    models: Mapping[str, nn.Module], example: Sequence[Tensor], target: Target, seconds: float
) -> Session:
    inputs = inputs_for_target(example, target)
    with DeviceGate(str(target.torch_device())).exclusive() as lease:
        session = measure_together(
            {name: (model, inputs) for name, model in models.items()},
            target,
            plan=Plan(max_seconds=seconds),
            pairs=True,
            lease=lease,
        )
    if session.failures:
        raise RunStopped(f"latency could not be measured: {session.failures}")
    return session


def slimmed(model: nn.Module, places: Mapping[str, Any], example: Sequence[Tensor]) -> nn.Module:
    """``model`` with slimmings at ``slim_after`` that leave ``tokens``, untrained."""
    one = make_pass("sit", slim_after=places["slim_after"], tokens=places["tokens"])
    return one.apply(model, Context(example=tuple(example), probe=True))


def widths_of(model: nn.Module) -> dict[str, Any]:
    """``embedding``, and for each block heads, channels of a head, and hidden units."""
    structure = recognise(model)
    blocks = [[block.num_heads, block.head_dim, block.mlp.hidden] for block in structure.blocks]
    return {"embedding": structure.width, "blocks": blocks}


def of_widths(dense: nn.Module, widths: Mapping[str, Any]) -> nn.Module:
    """An untrained model of the widths that ``widths_of`` told."""
    model = copy.deepcopy(dense).eval()
    structure = recognise(model)
    for block, (heads, channels, hidden) in zip(structure.blocks, widths["blocks"], strict=True):
        keep_mlp_units(block, torch.arange(hidden))
        keep_heads(block, torch.arange(heads))
        keep_head_channels(block, torch.arange(channels))
    keep_embedding(structure, torch.arange(widths["embedding"]))
    return model

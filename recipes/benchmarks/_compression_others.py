"""The other tools, called as their authors say: ToMe (facebookresearch/ToMe) and Torch-Pruning (VainF/Torch-Pruning).

Neither is a requirement of this project. Without ToMe our own ``token_merging`` pass stands in for it and is named so.
What Torch-Pruning leaves to its user (heads, width of a head, scale) is put right here.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from compress.measuring import count
from compress.passes import make_pass
from compress.passes.base import Context
from nas.errors import UserMistake

__all__ = ["merged", "merging_counts", "merging_tool", "pruned", "pruned_to_macs", "pruning_tool"]

_TAYLOR_BATCHES = 10


def merging_tool() -> str:
    """Name of what merges tokens here."""
    try:
        importlib.import_module("tome")
    except ImportError:
        return "token_merging of this project (ToMe is not installed)"
    return "ToMe"


def pruning_tool() -> str:
    """Name and version of Torch-Pruning. Raises UserMistake where it is missing."""
    return f"Torch-Pruning {_torch_pruning().__version__}"


def merging_counts(mean: float, depth: int) -> list[int]:
    """r of each block for a mean of ``mean``: whole numbers that differ by at most 1, the larger ones in front."""
    whole = int(mean)
    more = round((mean - whole) * depth)
    return [whole + 1] * more + [whole] * (depth - more)


def merged(model: nn.Module, counts: Sequence[int]) -> nn.Module:
    """A copy of ``model`` that merges ``counts`` pairs of tokens in its blocks, untrained."""
    other = copy.deepcopy(model).eval()
    if merging_tool() != "ToMe":
        example = torch.zeros(1, *_image_of(model))
        return make_pass("token_merging", r=list(counts)).apply(other, Context(example=(example,)))
    tome: Any = importlib.import_module("tome")
    tome.patch.timm(other, prop_attn=True)
    other.r = list(counts)  # type: ignore[assignment]
    return other


def pruned(
    model: nn.Module, criterion: str, ratio: float, context: Context, *, bottleneck: bool
) -> nn.Module:
    """A copy of ``model`` less ``ratio`` of its units, untrained.

    Args:
        criterion: ``GroupMagnitude`` or ``GroupTaylor``.
        bottleneck: keeps the embedding whole (fc2's outputs are not pruned), which costs less accuracy.
    """
    tp = _torch_pruning()
    other: Any = copy.deepcopy(model).eval().requires_grad_(True)
    if criterion == "GroupTaylor":
        importance = tp.importance.GroupTaylorImportance()
        for number, (inputs, labels) in enumerate(context.train or ()):
            if number == _TAYLOR_BATCHES:
                break
            context.loss(other(inputs), labels).backward()
    else:
        importance = tp.importance.GroupMagnitudeImportance(p=2)
    ignored = [other.head, *(block.mlp.fc2 for block in other.blocks if bottleneck)]
    pruner = tp.pruner.BasePruner(
        other,
        context.example[0],
        importance=importance,
        global_pruning=False,
        pruning_ratio=ratio,
        ignored_layers=ignored,
        num_heads={block.attn.qkv: block.attn.num_heads for block in other.blocks},
        prune_num_heads=False,
        prune_head_dims=True,
        head_pruning_ratio=0.0,
    )
    pruner.step()
    for block in other.blocks:
        attention = block.attn
        attention.num_heads = pruner.num_heads[attention.qkv]
        attention.head_dim = attention.qkv.out_features // (3 * attention.num_heads)
        attention.attn_dim = attention.num_heads * attention.head_dim
        attention.scale = attention.head_dim**-0.5
    other.zero_grad()
    return other.eval()  # type: ignore[no-any-return]


def pruned_to_macs(
    model: nn.Module, criterion: str, share: float, context: Context, *, bottleneck: bool
) -> tuple[nn.Module, float]:
    """``pruned`` with the smallest ratio that leaves at most ``share`` of the MACs, and that ratio."""
    dense = count(model, context.example)["macs"]
    low, high, best = 0.0, 0.95, None
    for _ in range(8):
        ratio = (low + high) / 2
        # Which units go does not matter for their number.
        found = pruned(model, "GroupMagnitude", ratio, context, bottleneck=bottleneck)
        if count(found, context.example)["macs"] <= share * dense:
            high, best = ratio, ratio
        else:
            low = ratio
    if best is None:
        raise UserMistake(f"Torch-Pruning: no ratio leaves {share:g} of the MACs")
    return pruned(model, criterion, best, context, bottleneck=bottleneck), best


def _torch_pruning() -> Any:
    try:
        return importlib.import_module("torch_pruning")
    except ImportError:
        raise UserMistake("torch_pruning is missing; pip install torch-pruning") from None


def _image_of(model: Any) -> tuple[int, int, int]:
    return (model.patch_embed.proj.in_channels, *model.patch_embed.img_size)

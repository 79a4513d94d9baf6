"""Layers merged into one: normalisation into what precedes it, parallel branches, layers in sequence.

All is computed in float64 and rounded once. Sources: "RepVGG: Making VGG-style ConvNets Great Again", section 3.3;
"MobileOne", section 3.2; the multi-group rule of "FMViT"; consecutive convolutions as in "VanillaNet", section 3.1.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["Branch", "fold_norm", "foldable", "in_sequence", "is_norm", "parallel"]

Branch = nn.Module | None
"""A convolution without normalisation, a normalisation alone, or None for the input as it is."""

_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_norm(module: Any) -> TypeGuard[_BatchNorm]:
    """Whether it is a batch normalisation with running statistics (an activation may follow within it)."""
    known = type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    ours = known or type(module).__name__ == "BatchNormAct2d"
    return ours and isinstance(module, _BatchNorm) and module.running_var is not None


def foldable(layer: Any, norm: Any) -> bool:
    """Whether ``norm`` behind ``layer`` can be folded into it."""
    known = type(layer) in _PLAIN or type(layer).__name__ == "Conv2dSame"
    return known and is_norm(norm) and norm.num_features == len(layer.weight) and not _hooked(layer, norm)


@torch.no_grad()
def fold_norm(layer: nn.Module, norm: _BatchNorm) -> nn.Module:
    """A layer like ``layer`` that gives what ``norm`` (by its running statistics) made of its output."""
    made: Any = copy.deepcopy(layer)
    scale, shift = _scale_and_shift(norm)
    weight = made.weight.double() * scale.reshape(-1, *[1] * (made.weight.dim() - 1))
    bias = shift if made.bias is None else made.bias.double() * scale + shift
    return _with(made, weight, bias)


@torch.no_grad()
def parallel(branches: Sequence[Branch], *, dearer: bool = False) -> nn.Module | None:
    """One convolution that gives the sum of the branches; None when they are not of one geometry, or when it would
    have more weights than they and must not be ``dearer``."""
    convs = [one for one in branches if type(one) in _CONVS]
    if (
        not convs
        or _hooked(*branches)
        or any(one is not None and type(one) not in _CONVS and not is_norm(one) for one in branches)
    ):
        return None
    # Whose kernel has most weights; along an axis another branch may reach further.
    largest: Any = max(convs, key=lambda one: one.weight[0, 0].numel())  # type: ignore[union-attr, index]
    inputs, outputs, dims = largest.in_channels, largest.out_channels, len(largest.kernel_size)
    parts = [_as_kernel(one, inputs, dims, largest) for one in branches]
    known = [part for part in parts if part is not None]
    if len(known) < len(parts) or any(
        part[2] != (type(largest), inputs, outputs, largest.stride) for part in known
    ):
        return None
    shape = tuple(tuple(map(max, zip(*(part[3][side] for part in known), strict=True))) for side in (0, 1))
    if any(k - 2 * p != a - 2 * b for part in known for k, p, a, b in zip(*part[3], *shape, strict=True)):
        return None
    groups = math.gcd(*(part[4] for part in known))
    kernel = torch.zeros(outputs, inputs // groups, *shape[0], dtype=torch.float64)
    bias = torch.zeros(outputs, dtype=torch.float64)
    for weight, offset, _, (_, padding), own_groups in known:
        grouped = _regrouped(weight, own_groups, groups, inputs)
        place = [slice(b - p, b - p + k) for b, p, k in zip(shape[1], padding, weight.shape[2:], strict=True)]
        here = (slice(None), slice(None), *place)
        kernel[here] += grouped
        bias += offset
    if not dearer and kernel.numel() > sum(part[0].numel() for part in known):
        return None
    made = copy.deepcopy(largest)
    made.groups, made.kernel_size, made.dilation = groups, shape[0], (1,) * dims
    made.padding, made.padding_mode = shape[1], "zeros"
    made._reversed_padding_repeated_twice = [p for p in reversed(shape[1]) for _ in range(2)]
    return _with(made, kernel, bias)


@torch.no_grad()
def in_sequence(first: nn.Module, second: nn.Module) -> nn.Module | None:
    """One layer that gives ``second(first(x))``; None where that is not one layer of the kind, or would have more
    weights than both."""
    one: Any = first
    two: Any = second
    if type(one) is not type(two) or type(one) not in _PLAIN or _hooked(one, two):
        return None
    if type(one) is nn.Linear:
        weight = two.weight.double() @ one.weight.double()
        made, like = weight, copy.deepcopy(two)
        like.in_features = one.in_features
    else:
        merged = _convs_in_sequence(one, two)
        if merged is None:
            return None
        made, like = merged
    if made.numel() > one.weight.numel() + two.weight.numel():
        return None
    bias = None
    if one.bias is not None or two.bias is not None:
        bias = torch.zeros(len(two.weight), dtype=torch.float64, device=two.weight.device)
        if one.bias is not None:
            taps = two.weight.double().flatten(2).sum(2) if two.weight.dim() > 2 else two.weight.double()
            groups = getattr(two, "groups", 1)
            dense = _regrouped(taps, groups, 1, len(one.weight))
            bias = bias + dense @ one.bias.double()
        if two.bias is not None:
            bias = bias + two.bias.double()
    return _with(like, made, bias)


def _convs_in_sequence(one: Any, two: Any) -> tuple[Tensor, Any] | None:
    """Weight of the merged convolution, and one of its geometry."""
    groups = math.gcd(one.groups, two.groups)
    front = _blocks(_regrouped(one.weight.double(), one.groups, groups, one.in_channels), groups)
    back = _blocks(_regrouped(two.weight.double(), two.groups, groups, two.in_channels), groups)
    if _pointwise(two) and _geometry(two) is not None:
        # Valid at borders too: the second sees only what the first made.
        weight = torch.einsum("gom,gmi...->goi...", back.flatten(2), front)
        like = copy.deepcopy(one)
        like.stride = tuple(a * b for a, b in zip(one.stride, two.stride, strict=True))
    elif _pointwise(one) and _geometry(one) is not None and set(one.stride) == {1}:
        # The second pads with zeros; the first would have made its bias of them.
        geometry = _geometry(two)
        clean = geometry is not None and not any(geometry[1])
        if not (clean or one.bias is None or not one.bias.any() or two.padding_mode != "zeros"):
            return None
        weight = torch.einsum("gom...,gmi->goi...", back, front.flatten(2))
        like = copy.deepcopy(two)
    else:
        return None
    like.in_channels, like.out_channels, like.groups = one.in_channels, two.out_channels, groups
    return weight.flatten(0, 1), like


def _hooked(*modules: Any) -> bool:
    """Whether a hook (of weight norm, for instance) may change what a module does."""
    return any(one is not None and (one._forward_hooks or one._forward_pre_hooks) for one in modules)


def _blocks(weight: Tensor, groups: int) -> Tensor:
    """(out, in/groups, ...) -> (groups, out/groups, in/groups, ...)."""
    return weight.reshape(groups, -1, *weight.shape[1:])


def _pointwise(conv: Any) -> bool:
    return set(conv.kernel_size) == {1}


def _geometry(conv: Any) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Kernel and padding, where it pads with zeros, evenly, and is not dilated; else None."""
    kernel, padding = tuple(conv.kernel_size), conv.padding
    if padding == "valid":
        padding = (0,) * len(kernel)
    elif padding == "same":
        if any(k % 2 == 0 for k in kernel):
            return None
        padding = tuple((k - 1) // 2 for k in kernel)
    if any(d != 1 and k != 1 for d, k in zip(conv.dilation, kernel, strict=True)):
        return None
    if any(padding) and conv.padding_mode != "zeros":
        return None
    if _pointwise(conv) and any(padding):
        return None  # a border of nothing but bias
    return kernel, tuple(padding)


def _as_kernel(branch: Branch, channels: int, dims: int, like: Any) -> Any:
    """Kernel, bias (float64), kind, geometry and groups of a branch; None where it pads or dilates in its own way."""
    ones = ((1,) * dims, (0,) * dims)
    if isinstance(branch, _CONVS):
        shape = _geometry(branch)
        if shape is None:
            return None
        bias = torch.zeros(len(branch.weight)) if branch.bias is None else branch.bias.detach().cpu()
        kind = (type(branch), branch.in_channels, branch.out_channels, branch.stride)
        return branch.weight.detach().cpu().double(), bias.double(), kind, shape, branch.groups
    scale, shift = torch.ones(channels).double(), torch.zeros(channels).double()
    if branch is not None:
        assert is_norm(branch)  # looked at by the caller
        if branch.num_features != channels or hasattr(branch, "act"):
            return None
        scale, shift = (x.cpu() for x in _scale_and_shift(branch))
    kernel = scale.reshape(-1, 1, *[1] * dims)
    return kernel, shift, (type(like), channels, channels, (1,) * dims), ones, channels


def _regrouped(weight: Tensor, groups: int, fewer: int, inputs: int) -> Tensor:
    """The weight of a convolution of ``groups`` groups as one of ``fewer`` (a divisor), zeros filled in."""
    if groups == fewer:
        return weight
    outputs, width = len(weight), inputs // groups
    made = weight.new_zeros(outputs, inputs // fewer, *weight.shape[2:])
    for output in range(outputs):
        start = output // (outputs // groups) * width - output // (outputs // fewer) * (inputs // fewer)
        made[output, start : start + width] = weight[output]
    return made


def _scale_and_shift(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    assert norm.running_var is not None  # is_norm
    assert norm.running_mean is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    return scale, shift


def _with(module: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    old = module.weight
    # Merged weights come in odd memory layouts, which kernels are slow on.
    plain = torch.empty(weight.shape, dtype=old.dtype, device=old.device).copy_(weight)
    module.weight = nn.Parameter(plain)
    module.bias = None if bias is None else nn.Parameter(bias.detach().to(old.device, old.dtype).clone())
    return module  # type: ignore[no-any-return]

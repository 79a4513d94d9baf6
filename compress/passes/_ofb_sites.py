"""Where a model can be made narrower: its attentions, its MLPs, and (plain ViTs only) its embedding."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.passes._ofb_gate import Gate, Keep
from compress.passes._ofb_slicing import Slicer, sync_sizes

__all__ = [
    "AttentionSite",
    "GatedLinear",
    "MlpSite",
    "Site",
    "embedding_axes",
    "find_sites",
    "why_no_embedding",
]

TOKENS = ("cls_token", "reg_token", "dist_token", "pos_embed", "mask_token")


class GatedLinear(nn.Module):
    """A Linear whose output units are multiplied by a gate: fc1 of an MLP, or q, k and v alike (``parts`` 3).

    After channels were cut, q is scaled so that the softmax keeps the temperature of the dense head width, whatever
    scale the attention itself takes from its present width.
    """

    def __init__(self, linear: nn.Linear, gate: Gate, parts: int):
        super().__init__()
        self.linear = linear
        self.gate = gate
        self.parts = parts

    @property
    def weight(self) -> Tensor:
        """Of the Linear; modules of timm look at its type."""
        return self.linear.weight

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., parts * units)."""
        x = self.linear(x)
        factor = self.gate.multiplier()
        if factor is not None:
            x = x * factor.to(x.dtype).reshape(-1).repeat(self.parts)
        correction = self.temperature()
        if correction != 1:
            q, rest = x.split([x.shape[-1] // 3, x.shape[-1] - x.shape[-1] // 3], dim=-1)
            x = torch.cat([q * correction, rest], dim=-1)
        return x

    def temperature(self) -> float:
        """What q has to be multiplied by, 1 for an MLP."""
        return (self.gate.channels / self.gate.dense[1]) ** 0.5 if self.parts == 3 else 1.0

    @torch.no_grad()
    def fuse(self) -> None:
        """Fold a decided gate into weight and bias."""
        if self.gate.fused:
            return
        factor = self.gate.score.detach().expand(self.gate.heads, self.gate.channels).reshape(-1)
        factor = factor.repeat(self.parts)
        self.linear.weight.mul_(factor[:, None])
        if self.linear.bias is not None:
            self.linear.bias.mul_(factor)
        self.gate.fused = True
        self.gate.score.requires_grad_(False)


@dataclass
class Site(ABC):
    """One narrowable module of a model, found by name, so that it is found again in a copy.

    Attributes:
        name: of the module that holds the two linears.
        width: of the tensors that go in and out.
    """

    name: str
    width: int

    def holder(self, model: nn.Module) -> Any:
        """The module in ``model``."""
        return model.get_submodule(self.name)

    @abstractmethod
    def first(self, model: nn.Module) -> nn.Linear:
        """qkv or fc1, bare."""

    @abstractmethod
    def last(self, model: nn.Module) -> nn.Linear:
        """proj or fc2."""

    @abstractmethod
    def gated(self, model: nn.Module) -> GatedLinear:
        """qkv or fc1 with its gate, in a supernet."""

    @abstractmethod
    def wrap(self, model: nn.Module, gate: Gate) -> None:
        """Put the gate behind qkv or fc1."""

    @abstractmethod
    def rows(self, heads: Tensor, channels: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Rows of the first and columns of the last linear that belong to the units; ``grid`` is (heads, channels)."""

    def cut(self, model: nn.Module, keep: Keep, grid: tuple[int, int], slicer: Slicer) -> None:
        """Keep the units ``keep`` of a module that has ``grid`` heads x channels."""
        first, last = self.first(model), self.last(model)
        rows, columns = self.rows(keep.heads, keep.channels, grid)
        slicer.select(first, "weight", rows, 0)
        slicer.select(first, "bias", rows, 0)
        slicer.select(last, "weight", columns, 1)
        sync_sizes(first)
        sync_sizes(last)


@dataclass
class AttentionSite(Site):
    """Multi-head attention with one qkv Linear; ``tables`` of relative positions (entries, heads) are cut with it."""

    heads: int = 1
    head_dim: int = 1
    whole_heads: bool = False
    """A norm of q and k is shared by all heads: only whole heads can go."""

    def first(self, model: nn.Module) -> nn.Linear:
        module = self.holder(model).qkv
        return module.linear if isinstance(module, GatedLinear) else module

    def last(self, model: nn.Module) -> nn.Linear:
        return self.holder(model).proj  # type: ignore[no-any-return]

    def gated(self, model: nn.Module) -> GatedLinear:
        return self.holder(model).qkv  # type: ignore[no-any-return]

    def wrap(self, model: nn.Module, gate: Gate) -> None:
        self.holder(model).qkv = GatedLinear(self.first(model), gate, 3)

    def rows(self, heads: Tensor, channels: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        units = (heads.to(channels.device)[:, None] * grid[1] + channels).reshape(-1)
        total = grid[0] * grid[1]
        return torch.cat([units, units + total, units + 2 * total]), units

    def cut(self, model: nn.Module, keep: Keep, grid: tuple[int, int], slicer: Slicer) -> None:
        super().cut(model, keep, grid, slicer)
        attention = self.holder(model)
        slicer.select(attention, "relative_position_bias_table", keep.heads, 1)
        heads, channels = keep.channels.shape
        attention.num_heads = heads
        attention.scale = _scale_after(getattr(attention, "scale", None), grid[1], channels)
        for name, value in (("head_dim", channels), ("attn_dim", heads * channels)):
            if hasattr(attention, name):
                setattr(attention, name, value)


@dataclass
class MlpSite(Site):
    """fc1, an activation with f(0) = 0, fc2."""

    hidden: int = 1

    def first(self, model: nn.Module) -> nn.Linear:
        module = self.holder(model).fc1
        return module.linear if isinstance(module, GatedLinear) else module

    def last(self, model: nn.Module) -> nn.Linear:
        return self.holder(model).fc2  # type: ignore[no-any-return]

    def gated(self, model: nn.Module) -> GatedLinear:
        return self.holder(model).fc1  # type: ignore[no-any-return]

    def wrap(self, model: nn.Module, gate: Gate) -> None:
        self.holder(model).fc1 = GatedLinear(self.first(model), gate, 1)

    def rows(self, heads: Tensor, channels: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        return channels.reshape(-1), channels.reshape(-1)


def _scale_after(scale: Any, before: int, after: int) -> float:
    """One over the root of the present head width; of an own scale, as much more as that would rise."""
    if not isinstance(scale, float) or math.isclose(scale, before**-0.5, rel_tol=1e-4):
        return float(after**-0.5)
    return float(scale * (before / after) ** 0.5)


def find_sites(model: nn.Module) -> tuple[list[Site], list[str]]:
    """Attentions (qkv, proj, num_heads) and MLPs (fc1, act, fc2), in order; and what was left out, with the reason."""
    sites: list[Site] = []
    left_out: list[str] = []
    for name, module in model.named_modules():
        looks_like = (
            "attention" if _has(module, "qkv", "proj") else "MLP" if _has(module, "fc1", "fc2") else None
        )
        if looks_like is None:
            continue
        reason = _why_no_attention(module) if looks_like == "attention" else _why_no_mlp(module)
        if reason:
            left_out.append(f"{looks_like} {name}: {reason}")
        elif looks_like == "attention":
            sites.append(_attention(name, module))
        else:
            linear: Any = module.fc1
            sites.append(MlpSite(name, linear.in_features, linear.out_features))
    return sites, left_out


def _has(module: nn.Module, *names: str) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Module) for name in names)


def _attention(name: str, module: Any) -> AttentionSite:
    norms = [getattr(module, one, None) for one in ("q_norm", "k_norm")]
    whole = any(norm is not None and not isinstance(norm, nn.Identity) for norm in norms)
    head_dim = module.proj.in_features // module.num_heads
    return AttentionSite(name, module.qkv.in_features, module.num_heads, head_dim, whole)


def _why_no_attention(module: Any) -> str:
    if not (isinstance(module.qkv, nn.Linear) and isinstance(module.proj, nn.Linear)):
        return "qkv and proj must be Linear"
    if not isinstance(getattr(module, "num_heads", None), int):
        return "it has no num_heads"
    if module.qkv.out_features != 3 * module.proj.in_features:
        return "q, k and v must be of one width"
    if module.proj.in_features % module.num_heads:
        return "its heads are of unequal width"
    if not isinstance(getattr(module, "norm", nn.Identity()), nn.Identity):
        return "it normalises over all heads"
    if getattr(module, "gate", None) is not None:
        return "its output is gated"
    if any(getattr(module, name, None) is not None for name in ("q_bias", "k_bias", "v_bias", "logit_scale")):
        return "its biases or its temperature are kept beside qkv"
    return ""


def _why_no_mlp(module: Any) -> str:
    if not (isinstance(module.fc1, nn.Linear) and isinstance(module.fc2, nn.Linear)):
        return "fc1 and fc2 must be Linear"
    if module.fc1.out_features != module.fc2.in_features:
        return "it is gated, or works between fc1 and fc2"
    if not isinstance(getattr(module, "norm", nn.Identity()), nn.Identity):
        return "it normalises its hidden units"
    activation = getattr(module, "act", None)
    if not isinstance(activation, nn.Module):
        return "it has no act"
    device = next((p.device for p in activation.parameters()), torch.device("cpu"))
    with torch.no_grad():
        if activation(torch.zeros(1, 1, device=device)).abs().item() > 0:
            return f"{type(activation).__name__} is not 0 at 0"
    return ""


def why_no_embedding(model: Any, *, headless: bool = False) -> str:
    """Why the embedding width of ``model`` cannot be searched; empty where it can.

    Args:
        headless: nothing against a model whose output is the embedding itself, and so would become narrower.
    """
    patch: Any = getattr(model, "patch_embed", None)
    blocks = getattr(model, "blocks", None)
    if not (
        isinstance(blocks, (nn.Sequential, nn.ModuleList))
        and isinstance(getattr(patch, "proj", None), nn.Conv2d)
    ):
        return "it has no patch_embed.proj and blocks"
    if not isinstance(getattr(model, "norm_pre", None), nn.Identity):
        return "it has no norm_pre, or one that is not an Identity"
    if getattr(model, "attn_pool", None) is not None:
        return "it pools by attention"
    if getattr(model, "rope", None) is not None:
        return "it rotates positions"
    width = patch.proj.out_channels
    for index, block in enumerate(blocks):
        for name in ("norm1", "norm2"):
            norm = getattr(block, name, None)
            if not isinstance(norm, nn.LayerNorm) or tuple(norm.normalized_shape) != (width,):
                return f"blocks.{index}.{name} is no LayerNorm of {width}"
        inner = _why_no_branches(block)
        if inner:
            return f"blocks.{index}: {inner}"
    for name in ("head", "head_dist"):
        head = getattr(model, name, None)
        if not isinstance(head, (nn.Linear, nn.Identity, type(None))):
            return f"{name} is no Linear"
        gives_out = isinstance(head, nn.Identity) or (head is None and name == "head")
        if gives_out and not headless:
            return f"it has no {name}, so that its outputs are as wide as the embedding"
    return ""


def _why_no_branches(block: Any) -> str:
    """What is unlike an attention and an MLP of the usual form in a block; empty where nothing is."""
    attention, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
    if attention is None or not _has(attention, "qkv", "proj"):
        return f"its attention ({type(attention).__name__}) has no qkv and proj"
    if mlp is None or not _has(mlp, "fc1", "fc2"):
        return f"its MLP ({type(mlp).__name__}) has no fc1 and fc2"
    return _why_no_attention(attention) or _why_no_mlp(mlp)


def embedding_axes(model: Any) -> Iterator[tuple[nn.Module, str, int]]:
    """(module, name of its parameter, dimension) of everything in a plain ViT that is as wide as the embedding."""
    for name in TOKENS:
        if getattr(model, name, None) is not None:
            yield model, name, -1
    yield model.patch_embed.proj, "weight", 0
    yield model.patch_embed.proj, "bias", 0
    yield from _vectors(getattr(model.patch_embed, "norm", None))
    for block in model.blocks:
        for name in ("norm1", "norm2", "ls1", "ls2"):
            yield from _vectors(getattr(block, name, None))
        for into, out in ((block.attn.qkv, block.attn.proj), (block.mlp.fc1, block.mlp.fc2)):
            yield (into.linear if isinstance(into, GatedLinear) else into), "weight", 1
            yield out, "weight", 0
            yield out, "bias", 0
    for name in ("norm", "fc_norm"):
        yield from _vectors(getattr(model, name, None))
    for name in ("head", "head_dist"):
        if isinstance(getattr(model, name, None), nn.Linear):
            yield getattr(model, name), "weight", 1


def _vectors(module: nn.Module | None) -> Iterator[tuple[nn.Module, str, int]]:
    for name in ("weight", "bias", "gamma"):
        if module is not None and isinstance(getattr(module, name, None), nn.Parameter):
            yield module, name, 0

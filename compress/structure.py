"""What a model is made of, found by looking at its modules: the map that surgery and passes work by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from nas.errors import UserMistake
from spaces.attention.base import Attention

__all__ = ["Block", "Heads", "Mlp", "StructureError", "ViTStructure", "find_heads", "find_mlps", "recognise"]

Projection = nn.Linear | nn.Conv2d


class StructureError(UserMistake):
    """A model, or a part of it, is not made as it would have to be; the message names what is missing."""


@dataclass(frozen=True)
class Mlp:
    """Two projections with something element-wise between them: its hidden units can be taken out one by one.

    ``fc1`` and ``fc2`` are Linear, or Conv2d with 1x1 kernels; ``module`` holds them under these names.
    """

    name: str
    module: nn.Module
    fc1: Projection
    fc2: Projection

    @property
    def hidden(self) -> int:
        """Number of hidden units."""
        return int(self.fc1.weight.shape[0])


@dataclass(frozen=True)
class Heads:
    """The heads of an attention mechanism of ``spaces.attention``, which knows itself how they are laid out."""

    name: str
    attention: Attention

    @property
    def num_heads(self) -> int:
        """Heads, at present."""
        return self.attention.num_heads


@dataclass(frozen=True)
class Block:
    """A pre-norm transformer block: ``x + ls1(attn(norm1(x)))``, then ``x + ls2(mlp(norm2(x)))``.

    ``attention`` holds ``qkv`` (output ordered q, k, v, then head, then channel) and ``proj``. ``ls1`` and ``ls2`` are
    None where there is no layer scale.
    """

    name: str
    module: nn.Module
    norm1: nn.Module
    attention: Any
    qkv: nn.Linear
    proj: nn.Linear
    norm2: nn.Module
    mlp: Mlp
    ls1: nn.Module | None
    ls2: nn.Module | None

    @property
    def num_heads(self) -> int:
        """Heads of the attention, at present."""
        return int(self.attention.num_heads)

    @property
    def head_dim(self) -> int:
        """Channels of one head, at present."""
        return self.qkv.out_features // (3 * self.num_heads)

    @property
    def qk_normed(self) -> bool:
        """Whether queries and keys are normalised over a head's channels."""
        return any(_present(self.attention, name) for name in ("q_norm", "k_norm"))


@dataclass(frozen=True)
class ViTStructure:
    """A plain vision transformer.

    Attributes:
        model: what was looked at; nothing is copied.
        blocks: in order; ``container`` is the module that holds them.
        embedding: the convolution that makes patches into tokens.
        embedding_norm: the norm behind it, or None.
        tokens: names of the prefix tokens' parameters, (1, n, C) each; ``positions`` of the position table, or None.
        prefix: number of tokens before the patches (class, distillation, registers).
        norms: norms over the embedding that are outside of the blocks, by name.
        heads: classifiers by name; the first reads the class token, or the pooled tokens.
        pooling: ``token``, ``avg`` or another word of timm.
    """

    model: nn.Module
    container: nn.Module
    blocks: tuple[Block, ...]
    embedding: nn.Conv2d
    embedding_norm: nn.Module | None
    tokens: tuple[str, ...]
    positions: str | None
    prefix: int
    norms: dict[str, nn.Module]
    heads: dict[str, nn.Linear]
    pooling: str

    @property
    def width(self) -> int:
        """Size of the embedding, C."""
        return int(self.embedding.out_channels)

    @property
    def patches(self) -> int | None:
        """Number of patch tokens that the position table is for; None without a table."""
        if self.positions is None:
            return None
        table: Tensor = getattr(self.model, self.positions)
        with_prefix = not getattr(self.model, "no_embed_class", False)
        return int(table.shape[1]) - (self.prefix if with_prefix else 0)


def recognise(model: nn.Module) -> ViTStructure:
    """The structure of a timm ``VisionTransformer`` (DeiT, distilled, DeiT III) or of a module that is built like it.

    Names count, classes do not: ``patch_embed.proj``, ``blocks`` of ``norm1``, ``attn`` (``qkv``, ``proj``,
    ``num_heads``), ``norm2``, ``mlp`` (``fc1``, ``fc2``), and ``head``.

    Raises:
        StructureError: naming the part that is missing or of another kind.
    """
    kind = type(model).__name__
    container = getattr(model, "blocks", None)
    if not isinstance(container, (nn.Sequential, nn.ModuleList)) or len(container) == 0:
        raise StructureError(f"{kind}: no 'blocks' (nn.Sequential or nn.ModuleList of transformer blocks)")
    embedding = getattr(getattr(model, "patch_embed", None), "proj", None)
    if not isinstance(embedding, nn.Conv2d):
        raise StructureError(f"{kind}: no 'patch_embed.proj' (nn.Conv2d that makes patches into tokens)")
    blocks = tuple(
        _block(f"blocks.{name}", block, kind)
        for name, block in container.named_children()
        if not _is_passenger(block)
    )
    if not blocks:
        raise StructureError(f"{kind}: 'blocks' holds no transformer block")
    heads = {
        name: head
        for name in ("head", "head_dist")
        if isinstance(head := getattr(model, name, None), nn.Linear)
    }
    if getattr(model, "attn_pool", None) is not None:
        raise StructureError(f"{kind}: pools with 'attn_pool', which is not supported; known: token, avg")
    present = tuple(
        name
        for name in ("cls_token", "dist_token", "reg_token")
        if isinstance(getattr(model, name, None), nn.Parameter)
    )
    return ViTStructure(
        model=model,
        container=container,
        blocks=blocks,
        embedding=embedding,
        embedding_norm=_optional(getattr(model, "patch_embed", None), "norm"),
        tokens=present,
        positions="pos_embed" if isinstance(getattr(model, "pos_embed", None), nn.Parameter) else None,
        prefix=sum(int(getattr(model, name).shape[1]) for name in present),
        norms={
            name: norm
            for name in ("norm_pre", "norm", "fc_norm")
            if (norm := _optional(model, name)) is not None
        },
        heads=heads,
        pooling=str(getattr(model, "global_pool", "token" if "cls_token" in present else "avg")),
    )


def find_mlps(model: nn.Module) -> tuple[Mlp, ...]:
    """Every ``fc1 - activation - fc2`` whose hidden units are independent of each other, in any model (Swin, ConvNeXt).

    Gated ones, and those with a norm over the hidden units, are not among them.
    """
    return tuple(
        mlp
        for name, module in model.named_modules()
        if (mlp := _mlp_or_reason(name, module)) and isinstance(mlp, Mlp)
    )


def find_heads(model: nn.Module) -> tuple[Heads, ...]:
    """Every attention mechanism of ``spaces.attention``, in any model; of one within another only the outer one.

    Whether it can lose heads, ``compress._probing_heads`` finds out.
    """
    found: list[Heads] = []
    for name, module in model.named_modules():
        inner = found and (not found[-1].name or name.startswith(f"{found[-1].name}."))
        if isinstance(module, Attention) and not inner:
            found.append(Heads(name, module))
    return tuple(found)


def _is_passenger(block: nn.Module) -> bool:
    """Whether a member of ``blocks`` is one of our own modules between the blocks (token slimming)."""
    return type(block).__module__.startswith("spaces.layers") and not hasattr(block, "attn")


def _block(name: str, block: nn.Module, kind: str) -> Block:
    for part in ("norm1", "attn", "norm2", "mlp"):
        if not isinstance(getattr(block, part, None), nn.Module):
            raise StructureError(f"{kind}: {name} ({type(block).__name__}) has no {part!r}")
    attention: Any = block.attn
    qkv, proj = getattr(attention, "qkv", None), getattr(attention, "proj", None)
    for part, module in (("qkv", qkv), ("proj", proj)):
        if type(module) is not nn.Linear:
            found = "nothing" if module is None else type(module).__name__
            raise StructureError(f"{kind}: {name}.attn.{part} must be a plain nn.Linear, but is {found}")
    assert isinstance(qkv, nn.Linear)  # looked at above
    assert isinstance(proj, nn.Linear)
    heads = getattr(attention, "num_heads", None)
    if not isinstance(heads, int) or heads < 1 or qkv.out_features % (3 * heads):
        raise StructureError(f"{kind}: {name}.attn.num_heads={heads!r} does not divide qkv into heads")
    if qkv.out_features != 3 * proj.in_features:
        raise StructureError(
            f"{kind}: {name}.attn: qkv gives {qkv.out_features} and proj takes {proj.in_features}; "
            "queries, keys and values must be of one width"
        )
    for part in ("norm", "gate"):
        if _present(attention, part):
            raise StructureError(
                f"{kind}: {name}.attn has a {part!r} behind its heads, which is not supported"
            )
    if hasattr(attention, "relative_position_bias_table"):
        raise StructureError(f"{kind}: {name}.attn has a relative position bias, which is not supported")
    mlp = _mlp_or_reason(f"{name}.mlp", block.mlp)  # type: ignore[arg-type]
    if not isinstance(mlp, Mlp):
        raise StructureError(f"{kind}: {mlp}")
    return Block(
        name=name,
        module=block,
        norm1=block.norm1,  # type: ignore[arg-type]
        attention=attention,
        qkv=qkv,
        proj=proj,
        norm2=block.norm2,  # type: ignore[arg-type]
        mlp=mlp,
        ls1=_optional(block, "ls1"),
        ls2=_optional(block, "ls2"),
    )


def _mlp_or_reason(name: str, module: nn.Module) -> Mlp | str:
    fc1: Any = getattr(module, "fc1", None)
    fc2: Any = getattr(module, "fc2", None)
    for part, layer in (("fc1", fc1), ("fc2", fc2)):
        if type(layer) is not nn.Linear and not (type(layer) is nn.Conv2d and _pointwise(layer)):
            found = "nothing" if layer is None else type(layer).__name__
            return f"{name}.{part} must be a plain nn.Linear or a 1x1 nn.Conv2d, but is {found}"
    if fc1.weight.shape[0] != fc2.weight.shape[1]:
        return f"{name}: fc1 gives {fc1.weight.shape[0]} units and fc2 takes {fc2.weight.shape[1]} (gated?)"
    for part in ("norm", "grn"):
        if _present(module, part):
            return f"{name}.{part} normalises over the hidden units, which are then not independent"
    return Mlp(name, module, fc1, fc2)


def _pointwise(layer: nn.Conv2d) -> bool:
    return layer.kernel_size == (1, 1) and layer.groups == 1


def _present(module: Any, name: str) -> bool:
    return _optional(module, name) is not None


def _optional(module: Any, name: str) -> nn.Module | None:
    found = getattr(module, name, None)
    return found if isinstance(found, nn.Module) and not isinstance(found, nn.Identity) else None

"""Physical removal of heads, channels, hidden units, embedding channels and blocks.

Everything here works in place (passes copy first) and leaves plain modules: smaller weights, and every attribute that
tells a size brought up to date. What remains computes exactly what the model with the removed parts set to zero would
compute, on the fused and on the explicit attention path of timm alike.

timm's fused path takes its scale from the size of a head while the explicit one uses the stored ``scale``: after head
channels are gone the two would differ. So the ratio of the scales is folded into the queries' weights, and ``scale``
is that of the new size.

An attention or MLP of a class that is not known to work so is tried first (see ``compress.probing``), unless its caller
has done that (``probed``); ``StructureError`` where the cut would change more than what is cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compress._probing_heads import require_heads_fit
from compress._slicing import cut_channels, cut_heads, cut_hidden, slice_layer, slice_norm, sliced
from compress.probing import require_fit
from compress.structure import Block, Heads, Mlp, StructureError, ViTStructure, recognise
from nas.errors import UserMistake
from spaces.layers._slicing import Index, checked_positions

__all__ = [
    "keep_embedding",
    "keep_head_channels",
    "keep_heads",
    "keep_mlp_units",
    "kernel_multiple",
    "remove_block",
    "slice_layer",
    "slice_norm",
]


def kernel_multiple(size: int) -> int:
    """What a width cut from ``size`` units should be a multiple of: 8 from 64 units on, 4 from 32 on, else 1.

    Vector units work on 8 or 16 numbers at once, and what is left over takes as long as a full one.
    """
    return 8 if size >= 64 else 4 if size >= 32 else 1


def keep_mlp_units(part: Block | Mlp, index: Index, *, probed: bool = False) -> None:
    """Leave only the hidden units ``index`` (positions in [0, hidden), in the order wanted, at least one)."""
    mlp = part.mlp if isinstance(part, Block) else part
    units = checked_positions(index, mlp.hidden, f"{mlp.name}: hidden units")
    if not probed:
        require_fit(mlp.module, mlp.name, {"hidden"})
    cut_hidden(mlp.module, units)


def keep_heads(part: Block | Heads, index: Index, *, probed: bool = False) -> None:
    """Leave only the heads ``index`` (positions in [0, num_heads), at least one).

    Raises:
        StructureError: an attention that cannot lose heads, or not exactly.
    """
    heads = checked_positions(index, part.num_heads, f"{part.name}: heads")
    if isinstance(part, Heads):
        if not probed:
            require_heads_fit(part)
        part.attention.keep_heads(heads)
        return
    if not probed:
        require_fit(part.attention, f"{part.name}.attn", {"heads"})
    cut_heads(part.attention, heads)


def keep_head_channels(
    block: Block,
    index: Index | Sequence[Index],
    values: Index | Sequence[Index] | None = None,
    *,
    probed: bool = False,
) -> None:
    """Leave only some channels of every head, as many in each.

    Args:
        index: channels in [0, head_dim) of queries and keys: one list for all heads, or one for each.
        values: those of the values (and of ``proj``'s inputs), as many; None: the same.

    Raises:
        StructureError: queries and keys are normalised over their channels, so these are not independent.
    """
    if block.qk_normed:
        raise StructureError(
            f"{block.name}: queries and keys are normalised over a head's channels; none can go"
        )
    matched = _per_head(block, index)
    carried = matched if values is None else _per_head(block, values)
    if matched.shape != carried.shape:
        raise UserMistake(
            f"{block.name}: {matched.shape[1]} channels of queries and keys, {carried.shape[1]} of values; "
            "must be as many"
        )
    if not probed:
        require_fit(block.attention, f"{block.name}.attn", {"channels"})
    cut_channels(block.attention, matched, carried)


def keep_embedding(structure: ViTStructure, index: Index, *, probed: bool = False) -> None:
    """Leave only the embedding channels ``index`` (positions in [0, width)) everywhere.

    Norms over the embedding then take their statistics from the channels that remain.
    """
    model: Any = structure.model
    kept = checked_positions(index, structure.width, "embedding channels")
    for block in () if probed else structure.blocks:
        require_fit(block.attention, f"{block.name}.attn", {"embedding"})
        require_fit(block.mlp.module, block.mlp.name, {"embedding"})
    slice_layer(structure.embedding, outputs=kept)
    if structure.embedding_norm is not None:
        slice_norm(structure.embedding_norm, kept)
    for name in (*structure.tokens, *([structure.positions] if structure.positions else [])):
        setattr(model, name, sliced(getattr(model, name), kept, -1))
    for block in structure.blocks:
        for norm in (block.norm1, block.norm2):
            slice_norm(norm, kept)
        slice_layer(block.qkv, inputs=kept)
        slice_layer(block.proj, outputs=kept)
        slice_layer(block.mlp.fc1, inputs=kept)
        slice_layer(block.mlp.fc2, outputs=kept)
        for scale in (block.ls1, block.ls2):
            if scale is not None:
                _slice_scale(scale, kept, block.name)
    for norm in structure.norms.values():
        slice_norm(norm, kept)
    for head in structure.heads.values():
        slice_layer(head, inputs=kept)
    for holder in (model, model.patch_embed):
        for name in ("embed_dim", "num_features", "head_hidden_size"):
            if isinstance(getattr(holder, name, None), int):
                setattr(holder, name, len(kept))
    for entry in getattr(model, "feature_info", None) or ():
        entry["num_chs"] = len(kept)


def remove_block(structure: ViTStructure, position: int) -> ViTStructure:
    """Take out block ``position`` (from 0; negative from the end); returns the structure of what remains."""
    model: Any = structure.model
    if not -len(structure.blocks) <= position < len(structure.blocks):
        raise UserMistake(f"block {position}: the model has {len(structure.blocks)}")
    if len(structure.blocks) == 1:
        raise UserMistake("the only block cannot be removed")
    gone = structure.blocks[position]
    container: Any = structure.container
    kept = [child for child in container.children() if child is not gone.module]
    # In place, because the container may be more than a plain sequence.
    container._modules.clear()
    for number, child in enumerate(kept):
        container.add_module(str(number), child)
    amounts = getattr(container, "amounts", None)
    if amounts is not None:  # token merging: one number for each block
        place = position % len(structure.blocks)
        container.amounts = (*amounts[:place], *amounts[place + 1 :])
    info = getattr(model, "feature_info", None)
    if info:
        model.feature_info = [{**entry, "module": f"blocks.{i}"} for i, entry in enumerate(info[: len(kept)])]
    return recognise(model)


def _slice_scale(scale: nn.Module, index: Tensor, where: str) -> None:
    gamma = getattr(scale, "gamma", None)
    if not isinstance(gamma, nn.Parameter):
        raise StructureError(f"{where}: {type(scale).__name__} is no layer scale with a 'gamma'")
    scale.gamma = sliced(gamma, index, 0)


def _per_head(block: Block, index: Index | Sequence[Index]) -> Tensor:
    """(heads, kept)."""
    first = index[0] if len(index) else 0
    several = (isinstance(first, Tensor) and first.dim() == 1) or (not isinstance(first, (int, Tensor)))
    lists: Iterable[Any] = index if several else [index] * block.num_heads
    rows = [checked_positions(one, block.head_dim, f"{block.name}: channels of a head") for one in lists]
    if len(rows) != block.num_heads or len({len(row) for row in rows}) != 1:
        raise UserMistake(
            f"{block.name}: give channels for each of the {block.num_heads} heads, as many for each, not "
            f"{[len(row) for row in rows]}"
        )
    return torch.stack(rows)

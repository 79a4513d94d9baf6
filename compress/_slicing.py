"""Taking rows, columns and channels out of single layers, and heads and channels out of a single attention.

What ``compress.surgery`` and the probe of unknown classes share; in place, with every attribute that tells a size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from compress.structure import StructureError
from spaces.layers._slicing import slice_weights, sliced

__all__ = ["cut_channels", "cut_heads", "cut_hidden", "head_dim", "slice_layer", "slice_norm", "sliced"]


def head_dim(attention: Any) -> int:
    """Channels of one head, at present."""
    return int(attention.qkv.out_features // (3 * attention.num_heads))


def cut_heads(attention: Any, heads: Tensor) -> None:
    """Leave only the heads (H',) of an attention whose qkv is ordered q, k, v, then head, then channel."""
    dim, old = head_dim(attention), int(attention.num_heads)
    channels = (heads[:, None] * dim + torch.arange(dim)).flatten()
    rows = torch.cat([part * old * dim + channels for part in range(3)])
    slice_layer(attention.qkv, outputs=rows)
    slice_layer(attention.proj, inputs=channels)
    _tell_sizes(attention, len(heads), dim)


def cut_channels(attention: Any, matched: Tensor, carried: Tensor) -> None:
    """Leave only the channels (heads, D') ``matched`` of queries and keys and ``carried`` of values.

    The ratio of the old scale to that of the new size goes into the queries' weights.
    """
    heads, dim, kept = int(attention.num_heads), head_dim(attention), matched.shape[1]
    start = torch.arange(heads)[:, None] * dim
    queries, channels = (start + matched).flatten(), (start + carried).flatten()
    rows = torch.cat([queries, heads * dim + queries, 2 * heads * dim + channels])
    slice_layer(attention.qkv, outputs=rows)
    slice_layer(attention.proj, inputs=channels)
    factor = float(getattr(attention, "scale", dim**-0.5)) / kept**-0.5
    with torch.no_grad():
        attention.qkv.weight[: heads * kept] *= factor
        if attention.qkv.bias is not None:
            attention.qkv.bias[: heads * kept] *= factor
    _tell_sizes(attention, heads, kept)


def cut_hidden(mlp: Any, units: Tensor) -> None:
    """Leave only the hidden units (H',) between ``fc1`` and ``fc2``."""
    slice_layer(mlp.fc1, outputs=units)
    slice_layer(mlp.fc2, inputs=units)
    if hasattr(mlp, "hidden_features"):
        mlp.hidden_features = len(units)


def slice_layer(layer: nn.Module, *, inputs: Tensor | None = None, outputs: Tensor | None = None) -> None:
    """Leave only some input and output channels of a Linear or an ungrouped Conv2d."""
    if not isinstance(layer, (nn.Linear, nn.Conv2d)) or (isinstance(layer, nn.Conv2d) and layer.groups != 1):
        raise StructureError(
            f"{type(layer).__name__}: only nn.Linear and nn.Conv2d without groups can be cut"
        )
    slice_weights(layer, inputs=inputs, outputs=outputs)


def slice_norm(norm: Any, index: Tensor) -> None:
    """Leave only some channels of a LayerNorm or RMSNorm (of torch or timm) over the last dimension."""
    shape = getattr(norm, "normalized_shape", None)
    if shape is None or len(shape) != 1:
        raise StructureError(f"{type(norm).__name__}: only norms over one dimension of channels can be cut")
    for name in ("weight", "bias"):
        value = getattr(norm, name, None)
        if value is not None:
            setattr(norm, name, sliced(value, index, 0))
    norm.normalized_shape = (len(index),)


def _tell_sizes(attention: Any, heads: int, dim: int) -> None:
    attention.num_heads = heads
    for name, value in (("head_dim", dim), ("attn_dim", heads * dim), ("all_head_dim", heads * dim)):
        if hasattr(attention, name):
            setattr(attention, name, value)
    if hasattr(attention, "scale"):
        attention.scale = dim**-0.5

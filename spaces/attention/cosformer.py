"""cosFormer attention (Qin et al., ICLR 2022): linear in sequence length, in time and in memory.

Source: OpenNLPLab/cosFormer, commit 8e12da111e2a683ea875711e0bf5810c6b4e8f9f, Apache-2.0.
Inside the supernet of OpenNLPLab/mixFormer (c1c57c5e435b188a9e9120b995e4e7aaeaf0462b) eps is 1e-3 and each side is
measured by its own length; both are options here.

Deviations: causal sums run over chunks instead of over every prefix; sums are kept in float32 at least; keys may be
padding; act_fun="elu", which fails in the original, is not offered.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spaces.attention import register_attention
from spaces.attention.base import Attention
from spaces.errors import UserMistake
from spaces.layers.projection import HeadProjection, merge_heads

__all__ = [
    "CosformerAttention",
    "convert_official_state",
    "cosformer",
    "cosformer_macs",
    "cosformer_reference",
]

CHUNK = 128  # positions; 64 to 128 is the flat bottom of the run time on CPUs


def _spans(queries: int, keys: int, max_length: int | None, own_lengths: bool) -> tuple[int, int]:
    """What the positions of queries and of keys are divided by."""
    longest = max(queries, keys)
    if max_length is None:
        return (queries, keys) if own_lengths else (longest, longest)
    if longest > max_length:
        raise UserMistake(
            f"cosformer: max_length={max_length} must be at least the sequence length {longest}; "
            "build the mechanism with a larger max_length or shorten the sequence"
        )
    return max_length, max_length


def _angles(length: int, span: int, like: Tensor) -> Tensor:
    """(pi/2) i / span for i = 1..length, shape (length, 1)."""
    steps = torch.arange(1, length + 1, device=like.device, dtype=like.dtype)
    return (steps * (math.pi / 2 / span)).unsqueeze(-1)


def _reweigh(features: Tensor, angles: Tensor) -> Tensor:
    """(..., L, D), (L, 1) -> (..., L, 2D), the sine half first."""
    return torch.cat((features * angles.sin(), features * angles.cos()), dim=-1)


def _full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast would lower the products of float32 sums again; entered only where autocast is on."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def _chunks(length: int, chunk: int) -> tuple[int, int]:
    """Number and size of equal chunks no longer than ``chunk`` that waste the least padding."""
    count = max(1, -(-length // chunk))
    return count, -(-length // count)


def _all_sums(q: Tensor, k: Tensor, v: Tensor, query_angles: Tensor, key_angles: Tensor) -> Tensor:
    """sum over all j of w_ij v_j: (..., N, D), (..., M, D), (..., M, V) and angles (N, 1), (M, 1) -> (..., N, V).

    Short sequences go through the weights themselves: fewer multiply-adds, and no more memory than the features.
    """
    if _weights_are_cheaper(q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1]):
        return ((q @ k.transpose(-2, -1)) * (query_angles - key_angles.transpose(-2, -1)).cos()) @ v
    return _reweigh(q, query_angles) @ (_reweigh(k, key_angles).transpose(-2, -1) @ v)


def _weights_are_cheaper(queries: int, keys: int, head_dim: int, columns: int) -> bool:
    return queries * keys * (head_dim + columns) <= (queries + keys) * 2 * head_dim * columns


def _causal_sums(
    q: Tensor, k: Tensor, v: Tensor, query_angles: Tensor, key_angles: Tensor, one_span: bool, chunk: int
) -> Tensor:
    """sum over j <= i of w_ij v_j: (..., N, D), (..., M, D), (..., M, V) and angles (N, 1), (M, 1) -> (..., N, V).

    Inside a chunk through the weights; everything before it through the running sum of k vᵀ, one (2D, V) state a
    chunk. The largest tensors, those saved for the backward pass included, are (N, chunk) and (N / chunk, 2D, V).
    ``one_span`` says that angles of queries and keys grow alike, so that all chunks share their cosines.
    """
    length = q.shape[-2]
    count, size = _chunks(length, chunk)
    # keys behind the last query are seen by nobody; missing ones become zero keys, which add nothing
    parts = []
    for part in (q, k, v, query_angles, key_angles):
        filled = F.pad(part[..., :length, :], (0, 0, 0, count * size - min(part.shape[-2], length)))
        parts.append(filled.view(*part.shape[:-2], count, size, part.shape[-1]))
    q, k, v, query_angles, key_angles = parts
    shared = slice(0, 1) if one_span else slice(None)
    cosines = (
        (query_angles[shared] - key_angles[shared].transpose(-2, -1)).cos().tril()
    )  # (1 or count, size, size)
    out = ((q @ k.transpose(-2, -1)) * cosines) @ v
    if count > 1:
        states = _reweigh(k[..., :-1, :, :], key_angles[:-1]).transpose(-2, -1) @ v[..., :-1, :, :]
        before = _reweigh(q[..., 1:, :, :], query_angles[1:]) @ states.cumsum(-3)
        out = out + F.pad(before, (0, 0, 0, 0, 1, 0))
    return out.flatten(-3, -2)[..., :length, :]


def cosformer(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    max_length: int | None = None,
    own_lengths: bool = False,
    eps: float = 1e-6,
    key_padding_mask: Tensor | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """Linear attention with cosine re-weighting: (B, H, N, D), (B, H, M, D), (B, H, M, V) -> (B, H, N, V).

    y_i = sum_j w_ij v_j / max(sum_j w_ij, eps), w_ij = (ReLU(q_i) · ReLU(k_j)) cos((pi/2)(i - j)/L), positions from 1.

    Args:
        q, k, v: queries, keys, values; any floating type, sums are taken in float32 at least.
        causal: query i sees keys up to i only.
        max_length: L. Without it L is max(N, M), which makes the result depend on padding and on what follows.
        own_lengths: without ``max_length``, divide queries by N and keys by M instead.
        eps: smallest denominator, above 0.
        key_padding_mask: (B, M), True where a key is padding. A query that sees no key gets zeros.
        chunk: positions that a causal sum takes at a time.

    Raises:
        UserMistake: a sequence is longer than ``max_length``.
    """
    spans = _spans(q.shape[-2], k.shape[-2], max_length, own_lengths)
    dtype, wide = v.dtype, torch.promote_types(v.dtype, torch.float32)
    with _full_precision(q.device):
        q, k, v = F.relu(q).to(wide), F.relu(k).to(wide), v.to(wide)
        if key_padding_mask is not None:
            k = k.masked_fill(key_padding_mask[:, None, :, None], 0.0)
        one_span = spans[0] == spans[1]
        query_angles = _angles(q.shape[-2], spans[0], q)
        same = one_span and q.shape[-2] == k.shape[-2]
        key_angles = query_angles if same else _angles(k.shape[-2], spans[1], k)
        v = F.pad(v, (0, 1), value=1.0)  # (B, H, M, V + 1): the last column sums up the weights
        if causal:
            summed = _causal_sums(q, k, v, query_angles, key_angles, one_span, chunk)
        else:
            summed = _all_sums(q, k, v, query_angles, key_angles)
        out = summed[..., :-1] / summed[..., -1:].clamp(min=eps)
    return out.to(dtype)


def cosformer_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    max_length: int | None = None,
    own_lengths: bool = False,
    eps: float = 1e-6,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """The quadratic formula written out, with the arguments of ``cosformer``; for tests and for reading."""
    queries, keys = q.shape[-2], k.shape[-2]
    shared = max_length or max(queries, keys)
    own = own_lengths and max_length is None
    place = torch.arange(1, max(queries, keys) + 1, device=q.device, dtype=q.dtype)
    query_place = place[:queries, None] / (queries if own else shared)
    key_place = place[None, :keys] / (keys if own else shared)
    weights = (F.relu(q) @ F.relu(k).transpose(-2, -1)) * (
        math.pi / 2 * (query_place - key_place)
    ).cos()  # (B, H, N, M)
    if causal:
        weights = weights.tril()
    if key_padding_mask is not None:
        weights = weights.masked_fill(key_padding_mask[:, None, None, :], 0.0)
    return weights @ v / weights.sum(-1, keepdim=True).clamp(min=eps)


def cosformer_macs(
    queries: int, keys: int, head_dim: int, *, causal: bool = False, chunk: int = CHUNK
) -> int:
    """Multiply-adds of the matrix products of one head, as ``cosformer`` does them."""
    columns = head_dim + 1
    if causal:
        count, size = _chunks(queries, chunk)
        inside = count * size * size * (head_dim + columns)
        return inside + 2 * (count - 1) * size * 2 * head_dim * columns
    if _weights_are_cheaper(queries, keys, head_dim, columns):
        return queries * keys * (head_dim + columns)
    return (queries + keys) * 2 * head_dim * columns


def convert_official_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of the official ``CosformerAttention`` under the names of ours.

    Args:
        state: ``q_proj``, ``k_proj``, ``v_proj`` and, unless it was built without, ``out_proj``; weights, biases.

    Returns:
        A state dict for ``CosformerAttention(embed_dim, num_heads, eps=1e-6, ...)``; with ``kdim`` and ``vdim`` where
        the original had them. Layout there is (length, batch, channels), here (batch, length, channels).

    Raises:
        UserMistake: a key is missing.
    """
    missing = [f"{part}_proj.weight" for part in "qkv" if f"{part}_proj.weight" not in state]
    if missing:
        raise UserMistake(
            f"state lacks {', '.join(missing)}; expected the state dict of cosFormer's CosformerAttention"
        )
    converted = {key: value for key, value in state.items() if key.startswith("out_proj.")}
    fused = len({state[f"{part}_proj.weight"].shape for part in "qkv"}) == 1
    for kind in ("weight", "bias"):
        if f"q_proj.{kind}" not in state:
            continue
        parts = [state[f"{part}_proj.{kind}"] for part in "qkv"]
        if fused:
            converted[f"in_proj.fused.{kind}"] = torch.cat(parts)
        else:
            converted |= {
                f"in_proj.{name}.{kind}": p for name, p in zip(("query", "key", "value"), parts, strict=True)
            }
    return converted


@register_attention("cosformer")
class CosformerAttention(Attention):
    """Multi-head cosFormer attention.

    Args:
        dim, num_heads, kdim, bias, options: see ``base.Attention``; there are no attention weights to drop out.
        vdim: width of the value; ``None`` means ``kdim``.
        eps: smallest denominator; 1e-6 in the original, 1e-3 in the supernet of efficient_transformer.
        own_lengths: divide queries by N and keys by M where ``max_length`` is not given.
        has_out_proj: without it the merged heads are the result, and head width times heads must be ``dim``.
        chunk: positions that a causal sum takes at a time.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        kdim: int | None = None,
        vdim: int | None = None,
        bias: bool = True,
        eps: float = 1e-6,
        own_lengths: bool = False,
        has_out_proj: bool = True,
        chunk: int = CHUNK,
        **options: Any,
    ):
        super().__init__(dim, num_heads, kdim=kdim, bias=bias, **options)
        if eps <= 0:
            raise UserMistake(f"cosformer: eps={eps} must be above 0; the original uses 1e-6")
        if chunk < 1:
            raise UserMistake(f"cosformer: chunk={chunk} must be at least 1; 64 to 128 is fast")
        if not has_out_proj and self.inner_dim != dim:
            raise UserMistake(
                f"cosformer: has_out_proj=False needs heads x head_dim = dim, but {self.inner_dim} is not {dim}"
            )
        self.eps = eps
        self.own_lengths = own_lengths
        self.chunk = chunk
        self.in_proj = HeadProjection(dim, num_heads, self.head_dim, kdim=kdim, vdim=vdim, bias=bias)
        self.out_proj = nn.Linear(self.inner_dim, dim, bias=bias) if has_out_proj else nn.Identity()

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        q, k, v = self.in_proj(query, key, value)
        heads = cosformer(
            q,
            k,
            v,
            causal=self.causal,
            max_length=self.max_length,
            own_lengths=self.own_lengths,
            eps=self.eps,
            key_padding_mask=key_padding_mask,
            chunk=self.chunk,
        )
        return self.out_proj(merge_heads(heads))  # type: ignore[no-any-return]  # (B, N, C)

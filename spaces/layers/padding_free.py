"""Sequences of several lengths without their padding: one row per true token, and attention within each sequence.

Source: Zhai et al., "ByteTransformer: A High-Performance Transformer Boosted for Variable-Length Inputs", IPDPS 2023,
section on the zero-padding algorithm: offsets by prefix sum over the lengths, all token-wise work on packed rows.

Deviations: packed once per network instead of once per layer; sequences of one length lie side by side, so that
attention takes each such run as a batch of its own without moving anything (on CPUs faster than a call for each
sequence, and than padding again in front of the attention); a padding mask with holes is an error.

Letters: B sequences, S positions of the padded batch, T true tokens, C width, H heads, D head width.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import cast

import torch
from torch import Tensor

from spaces.attention.base import Attention
from spaces.attention.cosformer import CosformerAttention, cosformer
from spaces.attention.relative import RelativeAttention, relative_attend
from spaces.attention.softmax import SoftmaxAttention, attend
from spaces.errors import UserMistake

__all__ = ["MECHANISMS", "Packing", "Run", "can_pack", "packed_attention"]

MECHANISMS: tuple[type[Attention], ...] = (SoftmaxAttention, RelativeAttention, CosformerAttention)
"""What ``packed_attention`` knows."""

Heads = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Run:
    """Neighbouring sequences of one length: ``count`` times ``length`` packed rows."""

    count: int
    length: int

    @property
    def tokens(self) -> int:
        """Rows of the run."""
        return self.count * self.length


@dataclass(frozen=True)
class Packing:
    """Where each true token of a padded batch (B, S) lies among the T packed rows; made by ``Packing.of``.

    Attributes:
        shape: B and S.
        order: numbers of the sequences, as they follow each other in the packed rows; empty ones are among them.
        offsets: B + 1 numbers, the prefix sum of the lengths in that order; the last one is T.
        rows: (T,) int64, row of each packed token among the B * S padded ones.
        runs: neighbours of equal length, empty ones left out.
    """

    shape: tuple[int, int]
    order: tuple[int, ...]
    offsets: tuple[int, ...]
    rows: Tensor
    runs: tuple[Run, ...]

    @classmethod
    def of(cls, padding: Tensor, *, keep_order: bool = False) -> Packing:
        """The packing of a batch. Reads the lengths, for which a GPU has to be waited for.

        Args:
            padding: (B, S) bool, True where there is no token; each row is False up to the sequence's length.
            keep_order: leave the sequences in their order instead of sorting them by length.

        Raises:
            UserMistake: there is a token behind padding, or ``padding`` is not bool.
        """
        if padding.dtype != torch.bool:
            raise UserMistake(
                f"padding: is {padding.dtype}, must be torch.bool (True where there is no token); give padding.bool()"
            )
        batch, longest = padding.shape
        valid = ~padding
        counts = valid.sum(1)
        holes = (valid & (torch.arange(longest, device=padding.device) >= counts.unsqueeze(1))).any(1)
        facts: list[list[int]] = torch.stack((counts, holes.to(counts.dtype))).tolist()
        lengths, broken = facts
        if any(broken):
            raise UserMistake(
                f"padding: sequence {broken.index(1)} of the batch has a token behind padding; "
                "move all padding to the end of each sequence"
            )
        order = list(range(batch)) if keep_order else sorted(range(batch), key=lengths.__getitem__)
        ordered = [lengths[number] for number in order]
        offsets = (0, *itertools.accumulate(ordered))
        runs = tuple(
            Run(sum(1 for _ in same), length) for length, same in itertools.groupby(ordered) if length
        )
        rows = _rows(order, ordered, offsets, longest, padding.device)
        return cls((batch, longest), tuple(order), offsets, rows, runs)

    @property
    def tokens(self) -> int:
        """T."""
        return self.offsets[-1]

    @property
    def is_full(self) -> bool:
        """Whether there is no padding at all; then packed rows are the padded ones."""
        return self.tokens == self.shape[0] * self.shape[1]

    def pack(self, x: Tensor) -> Tensor:
        """(B, S, ...) -> (T, ...)."""
        flat = x.flatten(0, 1)
        return flat if self.is_full else flat.index_select(0, self.rows)

    def unpack(self, packed: Tensor) -> Tensor:
        """(T, ...) -> (B, S, ...), zeros where there is padding."""
        batch, longest = self.shape
        if not self.is_full:
            empty = packed.new_zeros(batch * longest, *packed.shape[1:])
            packed = empty.index_copy(0, self.rows, packed)
        return packed.unflatten(0, (batch, longest))  # type: ignore[no-any-return]


def _rows(
    order: list[int], lengths: list[int], offsets: tuple[int, ...], longest: int, device: torch.device
) -> Tensor:
    total = offsets[-1]
    shifts = [number * longest - start for number, start in zip(order, offsets, strict=False)]
    both = torch.tensor([shifts, lengths], dtype=torch.int64, device=device)
    # The number of rows is known here, so that a GPU need not be asked for it.
    moved = torch.repeat_interleave(both[0], both[1], output_size=total)
    return moved + torch.arange(total, device=device)


def can_pack() -> bool:
    """Whether lengths can be read: not while a graph for all lengths is being recorded (export, tracing)."""
    return not (torch.compiler.is_exporting() or torch.jit.is_tracing())  # type: ignore[attr-defined]


def packed_attention(attention: Attention, x: Tensor, packing: Packing) -> Tensor:
    """Self-attention of every sequence for itself: (T, C) -> (T, C).

    The same as ``attention`` on the padded batch with its padding masked. Maps in front and behind see T rows.

    Args:
        attention: of one of ``MECHANISMS``; cosFormer needs its ``max_length``, because it would otherwise weigh by
            the length of the padded batch.
        x: packed rows.
        packing: where the sequences are.

    Raises:
        UserMistake: another mechanism, a cosFormer without ``max_length``, or a sequence longer than that.
    """
    heads = _heads_of(attention)
    if not packing.runs:
        return x
    q, k, v = attention.in_proj(x.unsqueeze(0))  # type: ignore[operator]  # (1, H, T, D) each
    if _flash_takes(attention, q):
        mixed = _flash(q, k, v, packing)
    else:
        mixed = _run_by_run(heads, q, k, v, packing)
    return attention.out_proj(mixed)  # type: ignore[operator,no-any-return]


def _run_by_run(heads: Heads, q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """(1, H, T, D) three times -> (T, H * D)."""
    sizes = [run.tokens for run in packing.runs]
    parts = (part[0].split(sizes, dim=1) for part in (q, k, v))
    made = []
    for run, *three in zip(packing.runs, *parts, strict=True):
        # (H, count * L, D) -> (count, H, L, D), still the memory that the projection wrote
        views = (part.unflatten(1, (run.count, run.length)).transpose(0, 1) for part in three)
        made.append(heads(*views).transpose(1, 2).reshape(run.tokens, -1))
    return made[0] if len(made) == 1 else torch.cat(made)


def _heads_of(attention: Attention) -> Heads:
    """What the mechanism does between its projections, without any mask for padding."""
    causal, dropout = attention.causal, attention.dropout if attention.training else 0.0
    if type(attention) is SoftmaxAttention:
        return lambda q, k, v: attend(q, k, v, causal=causal, dropout=dropout)
    if type(attention) is RelativeAttention:
        table = attention.position_keys
        return lambda q, k, v: relative_attend(q, k, v, table, causal=causal, dropout=dropout)
    if type(attention) is CosformerAttention:
        if attention.max_length is None:
            raise UserMistake(
                "packed_attention: a cosFormer without max_length weighs by the length of the padded batch; "
                "build it with max_length"
            )
        facts = {"max_length": attention.max_length, "eps": attention.eps, "chunk": attention.chunk}
        return lambda q, k, v: cosformer(q, k, v, causal=causal, **facts)  # type: ignore[arg-type]
    known = ", ".join(sorted(one.__name__ for one in MECHANISMS))
    raise UserMistake(f"packed_attention: {type(attention).__name__} is not one of {known}")


def _flash_takes(attention: Attention, q: Tensor) -> bool:
    """Whether PyTorch's kernel for sequences of several lengths can do it: on NVIDIA's GPUs, in half precision."""
    return (
        q.is_cuda
        and q.dtype in (torch.float16, torch.bfloat16)
        and type(attention) is SoftmaxAttention
        and not attention.causal
        and not (attention.training and attention.dropout)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 256
        and _has_flash()
    )


@functools.cache
def _has_flash() -> bool:
    return find_spec("torch.nn.attention.varlen") is not None


def _flash(q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
    """(1, H, T, D) three times -> (T, H * D)."""
    from torch.nn.attention.varlen import varlen_attn

    lengths = [run.length for run in packing.runs for _ in range(run.count)]  # without the empty ones
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=q.device)
    longest = max(lengths)
    q, k, v = (part[0].transpose(0, 1) for part in (q, k, v))  # (T, H, D)
    mixed = cast("Tensor", varlen_attn(q, k, v, offsets, offsets, longest, longest))
    return mixed.flatten(1)

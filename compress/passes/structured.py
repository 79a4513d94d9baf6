"""Magnitude and first-order Taylor pruning of heads, head channels, hidden units and embedding channels.

The plain methods that others are measured against, over the same surgery.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from compress._probing_heads import why_heads_stay
from compress.finetune import epochs_of, finetune, require_trainable
from compress.passes import register_pass
from compress.passes._laws import FLAG, check_options, number, optional, whole, word
from compress.passes._unit_scores import Criterion, Scorer, taylor_gradients
from compress.passes.base import Context, Pass
from compress.probing import fit, require_runs
from compress.structure import Heads, Mlp, StructureError, find_heads, find_mlps, recognise
from compress.surgery import (
    keep_embedding,
    keep_head_channels,
    keep_heads,
    keep_mlp_units,
    kernel_multiple,
)
from nas.errors import UserMistake, nearest

__all__ = ["Structured"]

Scope = Literal["uniform", "global"]

UNITS = ("heads", "channels", "mlp", "embedding")
_LOOSE = ("heads", "mlp")
_STRONGEST = 0.97
_EPOCHS = 3


_LAWS = {
    "ratio": number("[0, 1)"),
    "criterion": word("l1", "l2", "taylor"),
    "bottleneck": FLAG,
    "scope": word("uniform", "global"),
    "multiple": optional(whole(1)),
    "batches": whole(1),
    "epochs": optional(whole(0)),
    "learning_rate": number("above 0"),
    "distillation": number("[0, 1]"),
}


@register_pass("structured")
class Structured(Pass):
    """Takes out the least important units and fine-tunes with distillation.

    Args:
        ratio: share of the units of every kind that goes, in [0, 1).
        criterion: ``l2``, ``l1`` (size of a unit's weights) or ``taylor`` (needs training data).
        units: kinds, of ``heads``, ``channels`` (of each head), ``mlp`` (hidden units), ``embedding``; a list, or a
            text such as ``channels+mlp``. On models that are no plain ViT ``mlp`` alone works (Swin, ConvNeXt), and
            ``heads`` too where attentions are mechanisms of ``spaces.attention`` (efficient_transformer).
        bottleneck: keep the embedding whole, and with it norms and residual stream; False adds it to ``units``.
        scope: ``uniform``: every layer loses the same share; ``global``: all units of a kind compete over the layers
            (each layer keeps a tenth at least).
        multiple: what numbers of hidden units, head channels and embedding channels are rounded up to multiples of:
            None: of 8 (of 4 where fewer than 64 are there, of 1 where fewer than 32), which kernels like; a number: of
            it, where at least eight times as many are there. 1 rounds nothing.
        batches: minibatches for ``taylor``, at least 1.
        epochs: of fine-tuning; None takes the pipeline's, else 3. Without training data there is none.
        learning_rate, distillation: of the fine-tuning.
    """

    changes = frozenset({"widths"})

    def __init__(
        self,
        ratio: float = 0.5,
        *,
        criterion: Criterion = "l2",
        units: str | Sequence[str] = ("channels", "mlp"),
        bottleneck: bool = True,
        scope: Scope = "uniform",
        multiple: int | None = None,
        batches: int = 10,
        epochs: int | None = None,
        learning_rate: float = 5e-4,
        distillation: float = 0.5,
    ):
        check_options("structured", locals(), _LAWS)
        kinds = _kinds(units)
        if not bottleneck and "embedding" not in kinds:
            kinds.append("embedding")
        self.ratio, self.criterion, self.units, self.bottleneck = ratio, criterion, tuple(kinds), bottleneck
        self.scope, self.multiple, self.batches = scope, multiple, batches
        self.epochs, self.learning_rate, self.distillation = epochs, learning_rate, distillation
        self.requires = frozenset({"train"} if criterion == "taylor" or epochs else ())

    def with_strength(self, strength: float) -> Pass:
        """``ratio`` from 0 to 0.97."""
        options = {name: value for name, value in self.options().items() if name not in ("ratio", "requires")}
        return Structured(strength * _STRONGEST, **options)

    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        """See ``Pass.apply``."""
        result = copy.deepcopy(model).eval()
        epochs = epochs_of(self.epochs, context, _EPOCHS)
        require_trainable(result, epochs)
        self._fit(result, context)
        gradients = []
        criterion = self.criterion
        if criterion == "taylor":
            if context.probe and self.scope == "uniform":
                criterion = "l2"  # the numbers that remain do not depend on which ones they are
            else:
                gradients = taylor_gradients(result, context, self.batches)
        self._cut(result, Scorer(criterion, gradients))
        require_runs(result, context.example, " and ".join(self.units))
        finetune(
            result,
            context,
            epochs=epochs,
            learning_rate=self.learning_rate,
            distillation=self.distillation,
        )
        return result

    def _fit(self, model: nn.Module, context: Context) -> None:
        """Attentions and MLPs of unknown classes are tried before anything is cut; see ``compress.probing``."""
        kinds = {"hidden" if one == "mlp" else one for one in self.units}
        loose = _loose_parts(model, self.units)
        attentions: list[str] = []
        reasons: dict[str, str] = {}
        if loose is None:
            blocks = recognise(model).blocks
            attentions = [f"{block.name}.attn" for block in blocks]
            mlps = [block.mlp.name for block in blocks] if kinds & {"hidden", "embedding"} else []
        else:
            mlps = [mlp.name for mlp in loose.mlps]
            reasons = why_heads_stay(model, loose.heads, context.example)
        found = fit(model, attentions, mlps, kinds, context.example)
        if found.replaced:
            context.report(f"{', '.join(found.replaced)}: timm's Attention now, which computes the same")
        for name, reason in (reasons | found.reasons).items():
            hint = _mlp_hint(model) if name in attentions or name in reasons else ""
            raise StructureError(f"{type(model).__name__}: {name} {reason}{hint}")

    def _cut(self, model: nn.Module, scorer: Scorer) -> None:
        # All scores come from the model as it was: what is cut first must not change what is cut next.
        if (loose := _loose_parts(model, self.units)) is not None:
            kept_units = self._choose([scorer.hidden(mlp) for mlp in loose.mlps])
            kept_heads = self._choose([scorer.heads(one) for one in loose.heads], whole=False)
            for mlp, kept in zip(loose.mlps, kept_units, strict=True):
                keep_mlp_units(mlp, kept, probed=True)
            for one, kept in zip(loose.heads, kept_heads, strict=True):
                if len(kept) < one.num_heads:  # one of a single head need not be able to lose any
                    keep_heads(one, kept, probed=True)
            return
        structure = recognise(model)
        blocks = structure.blocks
        if "channels" in self.units and (normed := next((b.name for b in blocks if b.qk_normed), None)):
            raise StructureError(
                f"{normed}: queries and keys are normalised over a head's channels; use heads instead"
            )
        hidden = self._choose([scorer.hidden(b.mlp) for b in blocks]) if "mlp" in self.units else []
        heads = self._choose([scorer.heads(b) for b in blocks], whole=False) if "heads" in self.units else []
        matched, carried = [], []
        if "channels" in self.units:
            matched = [scorer.matched_channels(b) for b in blocks]
            carried = [scorer.carried_channels(b) for b in blocks]
        width = self._choose([scorer.embedding(structure)]) if "embedding" in self.units else []
        counts = self._channel_counts(matched, carried) if matched else []
        for position, block in enumerate(blocks):
            if hidden:
                keep_mlp_units(block, hidden[position], probed=True)
            kept = heads[position] if heads else torch.arange(block.num_heads)
            if heads:
                keep_heads(block, kept, probed=True)
            if counts:
                best = [
                    _best(scores[kept], counts[position]) for scores in (matched[position], carried[position])
                ]
                keep_head_channels(block, list(best[0]), list(best[1]), probed=True)
        if width:
            keep_embedding(structure, width[0], probed=True)

    def _choose(self, scores: Sequence[Tensor], *, whole: bool = True) -> list[Tensor]:
        """Positions to keep for each layer, ascending; ``whole``: as many as kernels like."""
        kept = []
        for values, count in zip(scores, self._counts(scores), strict=True):
            wanted = self._rounded(count, len(values)) if whole else count
            kept.append(values.topk(wanted).indices.sort().values)
        return kept

    def _rounded(self, count: int, size: int) -> int:
        if self.multiple is None:
            multiple = kernel_multiple(size)
        else:
            multiple = self.multiple if size >= 8 * self.multiple else 1
        return min(size, -(-count // multiple) * multiple)

    def _counts(self, scores: Sequence[Tensor]) -> list[int]:
        if self.scope == "uniform" or len(scores) < 2:
            return [max(1, round(len(values) * (1 - self.ratio))) for values in scores]
        # Sizes of weights differ between layers for no reason of importance; changes of the loss are comparable.
        even = [
            values if self.criterion == "taylor" else values / values.mean().clamp(min=1e-12)
            for values in scores
        ]
        least = [max(1, len(values) // 10) for values in even]
        safe = [values.clone() for values in even]
        for values, count in zip(safe, least, strict=True):
            values[values.topk(count).indices] = torch.inf
        together = torch.cat(safe)
        wanted = max(sum(least), round(len(together) * (1 - self.ratio)))
        chosen = torch.zeros(len(together), dtype=torch.bool)
        chosen[together.topk(wanted).indices] = True
        return [int(part.sum()) for part in chosen.split([len(values) for values in safe])]

    def _channel_counts(self, matched: Sequence[Tensor], carried: Sequence[Tensor]) -> list[int]:
        """As many channels in every head of a block: the n-th best of its heads compete as one."""
        ranked = [
            torch.stack([one.sort(dim=1, descending=True).values.mean(0) for one in both]).sum(0)
            for both in zip(matched, carried, strict=True)
        ]
        return [self._rounded(n, len(one)) for n, one in zip(self._counts(ranked), ranked, strict=True)]


def _kinds(units: str | Sequence[str]) -> list[str]:
    if not isinstance(units, (str, list, tuple)) or not units:
        raise UserMistake(
            f"structured: units={units!r} must be a list of, or a text as in channels+mlp of: "
            f"{', '.join(UNITS)}"
        )
    kinds = [one.strip() for one in units.split("+")] if isinstance(units, str) else list(units)
    for kind in kinds:
        if kind not in UNITS:
            raise UserMistake(
                f"structured: unknown units {kind!r}{nearest(str(kind), UNITS)}; known: {', '.join(UNITS)}"
            )
    return kinds


class _Parts(NamedTuple):
    """What is cut from a model that is no plain ViT: parts that nothing else depends on."""

    heads: tuple[Heads, ...]
    mlps: tuple[Mlp, ...]


def _loose_parts(model: nn.Module, units: Sequence[str]) -> _Parts | None:
    """None for a plain ViT, of which more is known.

    Raises:
        StructureError: there is nothing of these kinds, or a kind that only a plain ViT can lose.
    """
    heads: tuple[Heads, ...] = ()
    if tuple(units) != ("mlp",):
        try:
            recognise(model)
            return None
        except StructureError as error:
            heads = find_heads(model)
            if not heads:
                raise StructureError(f"{error}{_mlp_hint(model)}") from None
            if tied := [one for one in units if one not in _LOOSE]:
                works = "units=heads, units=mlp or units=heads+mlp" if find_mlps(model) else "units=heads"
                raise StructureError(
                    f"{error}, so of its {' and '.join(tied)} none can go; what works here is {works}"
                ) from None
    mlps = find_mlps(model) if "mlp" in units else ()
    if "mlp" in units and not mlps:
        hint = "; units=heads alone asks for less" if heads else ""
        raise StructureError(
            f"{type(model).__name__}: no MLP with independent hidden units (fc1, act, fc2){hint}"
        )
    return _Parts(heads if "heads" in units else (), mlps)


def _mlp_hint(model: nn.Module) -> str:
    return "; units=mlp alone asks for less" if find_mlps(model) else ""


def _best(scores: Tensor, count: int) -> Tensor:
    """(heads, count) positions, ascending."""
    return scores.topk(count, dim=1).indices.sort(dim=1).values

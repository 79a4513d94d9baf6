"""Token merging (ToMe): similar tokens become one, without training.

Source: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from compress.finetune import epochs_of, finetune
from compress.outputs import require_same
from compress.passes import register_pass
from compress.passes.base import Context, Pass
from compress.structure import StructureError, recognise
from nas.errors import UserMistake
from spaces.layers.class_token_block import ClassTokenBlock
from spaces.layers.token_merging import TokenMergingBlocks

__all__ = ["TokenMerging", "schedule"]

_TAKEN_APART = "its blocks use the parts of qkv, which that pass replaces; put token_merging behind it"


_NO_PLAIN_BLOCKS = (
    "tokens cannot be merged within its blocks: they are no plain pre-norm attention and MLP, or are called with more "
    "than the tokens"
)


@register_pass("token_merging")
class TokenMerging(Pass):
    """Merges ``r`` pairs of tokens in every block, between attention and MLP.

    Gradient checkpointing, of a model that has it on, is off in the result: it would go past the merging.

    Args:
        r: pairs in each block, at least 0; or a list with one number for each block; or None, where ``strength``
            decides. At most half of the tokens can go in one block.
        inflection: of the paper's schedules, in [-1, 1]: 0 keeps r constant, -1 lets it fall from 2r to 0, 1 rise.
        proportional: whether attention counts a merged token as often as it has parts.
        strength: in [0, 1], instead of ``r``: 0 merges nothing, 1 half of the tokens in every block.
        epochs: of fine-tuning afterwards; the method needs none, so 0 is the default; None takes the pipeline's.
        learning_rate, distillation: of that fine-tuning.
    """

    changes = frozenset({"tokens"})
    cannot_precede = MappingProxyType({"ofb": _TAKEN_APART})

    def __init__(
        self,
        r: int | Sequence[int] | None = None,
        *,
        inflection: float = 0.0,
        proportional: bool = True,
        strength: float | None = None,
        epochs: int | None = 0,
        learning_rate: float = 2e-4,
        distillation: float = 0.5,
    ):
        several = isinstance(r, (list, tuple))
        counts = list(r) if isinstance(r, (list, tuple)) else [] if r is None else [r]
        if any(isinstance(one, bool) or not isinstance(one, int) or one < 0 for one in counts):
            raise UserMistake(
                f"token_merging: r={r!r} must be a whole number of at least 0, or a list of them"
            )
        if (r is None) == (strength is None):
            if r is not None:
                raise UserMistake("token_merging: give r or strength, not both")
            r = 8
        if strength is not None and not 0 <= strength <= 1:
            raise UserMistake(f"token_merging: strength={strength} must be in [0, 1]")
        if not -1 <= inflection <= 1 or (several and inflection):
            raise UserMistake(
                f"token_merging: inflection={inflection} must be in [-1, 1], and needs one r for all blocks"
            )
        self.r, self.inflection, self.proportional, self.strength = r, inflection, proportional, strength
        self.epochs, self.learning_rate, self.distillation = epochs, learning_rate, distillation
        self.requires = frozenset({"train"}) if epochs else frozenset()

    def with_strength(self, strength: float) -> Pass:
        """Half of the tokens in every block at 1; the square makes the useful, weak end finer."""
        return TokenMerging(
            strength=strength,
            proportional=self.proportional,
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            distillation=self.distillation,
        )

    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        """See ``Pass.apply``."""
        result = copy.deepcopy(model).eval()
        _call_blocks_as_a_whole(result)
        structure = recognise(result)
        if isinstance(structure.container, TokenMergingBlocks):
            raise StructureError("its tokens are merged already; give a larger r in one pass instead")
        if not isinstance(structure.container, nn.Sequential):
            raise StructureError(
                "'blocks' must be an nn.Sequential that is called as a whole, to be replaced"
            )
        for block in structure.blocks:
            for part in (
                ()
                if isinstance(block.module, ClassTokenBlock)
                else ("ls1", "drop_path1", "ls2", "drop_path2")
            ):
                if not isinstance(getattr(block.module, part, None), nn.Module):
                    raise StructureError(f"{block.name} has no {part!r} as timm's blocks have")
        patches = structure.patches
        if patches is None:
            raise StructureError("has no position table that tells the number of patches")
        amounts = self._amounts(len(structure.blocks), patches + structure.prefix, structure.prefix)
        members = list(structure.container.children())
        blocks = TokenMergingBlocks((), structure.prefix, self.proportional, members).eval()
        result.blocks = blocks
        require_same(result, model, context.example, _NO_PLAIN_BLOCKS)
        blocks.amounts = tuple(amounts)
        _require_fewer(result, blocks, context.example)
        context.report(f"pairs merged in each block: {', '.join(map(str, amounts))}")
        finetune(
            result,
            context,
            epochs=epochs_of(self.epochs, context, 0),
            learning_rate=self.learning_rate,
            distillation=self.distillation,
        )
        return result

    def _amounts(self, depth: int, tokens: int, prefix: int) -> list[int]:
        if self.strength is not None:
            wanted = _spread(self.strength**2 * tokens / 2, depth)
        elif isinstance(self.r, int):
            wanted = schedule(self.r, depth, self.inflection)
        else:
            wanted = list(self.r or ())
            if len(wanted) != depth:
                raise UserMistake(f"token_merging: r has {len(wanted)} numbers, the model has {depth} blocks")
        amounts = []
        for want in wanted:
            amounts.append(max(0, min(want, (tokens - prefix) // 2)))
            tokens -= amounts[-1]
        return amounts


def _call_blocks_as_a_whole(model: nn.Module) -> None:
    """Without gradient checkpointing, for which timm calls the blocks one by one instead of what holds them."""
    module: Any
    for module in model.modules():
        if getattr(module, "grad_checkpointing", False) is True:
            module.grad_checkpointing = False


def _require_fewer(model: nn.Module, blocks: TokenMergingBlocks, example: Sequence[Tensor]) -> None:
    """Raises StructureError when a call of ``model`` leaves as many tokens behind its blocks as came in."""
    seen: list[tuple[int, int]] = []
    hook = blocks.register_forward_hook(
        lambda module, given, made: seen.append((given[0].shape[1], made.shape[1]))
    )
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        with torch.no_grad():
            model(*(x.to(device) for x in example))
    finally:
        hook.remove()
    if any(blocks.amounts) and not (seen and all(after < before for before, after in seen)):
        raise StructureError(
            "its forward does not call 'blocks' as a whole, or calls it without enough tokens, so that nothing is "
            "merged; leave token_merging out, or call self.blocks(x)"
        )


def schedule(r: int, depth: int, inflection: float = 0.0) -> list[int]:
    """Pairs for each block: r * (1 - inflection) at the first, r * (1 + inflection) at the last, linear between.

    Source: appendix of the paper ("decreasing schedule": inflection -1).
    """
    first, last = r * (1 - inflection), r * (1 + inflection)
    step = (last - first) / max(1, depth - 1)
    return [int(first + step * position) for position in range(depth)]


def _spread(each: float, depth: int) -> list[int]:
    """Whole numbers that sum to about ``each * depth``."""
    edges = [int(each * position + 1e-9) for position in range(depth + 1)]
    return [after - before for before, after in itertools.pairwise(edges)]

"""The last block computed for the class token alone: exact, and 6 % for free on DeiT-Ti."""

from __future__ import annotations

import copy
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from compress.passes import register_pass
from compress.passes.base import Context, Pass
from compress.structure import StructureError, ViTStructure, recognise
from spaces.layers.class_token_block import ClassTokenBlock

__all__ = ["ClassTokenLastBlock"]

_EXACT = 1e-4

_TAKEN_APART = (
    "its blocks use the parts of qkv, which that pass replaces; put class_token_last_block behind it"
)


@register_pass("class_token_last_block")
class ClassTokenLastBlock(Pass):
    """Behind the last block only the class token (and the distillation token) is read, so only it is computed.

    Keys and values still come from all tokens; queries, projection, MLP and norms work on one. The outputs are those
    of the original: this is looked at on the example before the result is given back.

    Raises:
        StructureError: the classifier reads other tokens too (average pooling), or the structure is another.
    """

    changes = frozenset({"tokens"})
    cannot_precede = MappingProxyType(dict.fromkeys(("ofb", "ranks"), _TAKEN_APART))

    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        """See ``Pass.apply``; nothing is trained."""
        result = copy.deepcopy(model).eval()
        structure = recognise(result)
        queries = _tokens_read(structure)
        last = structure.blocks[-1]
        if last.module is not list(structure.container.children())[-1]:
            raise StructureError("another module follows the last block, so what it reads is not known")
        if isinstance(last.module, ClassTokenBlock):
            context.report("the last block computes only the class token already")
            return result
        name = last.name.rpartition(".")[2]
        structure.container._modules[name] = ClassTokenBlock.of(last.module, queries)
        self._require_exact(model, result, context)
        return result

    def _require_exact(self, model: nn.Module, result: nn.Module, context: Context) -> None:
        training = model.training
        device = next(model.parameters()).device
        inputs = [x.to(device) for x in context.example]
        model.eval()
        try:
            with torch.no_grad():
                wanted: Any = model(*inputs)
                found: Any = result(*inputs)
        finally:
            model.train(training)
        gap = float((found - wanted).abs().max())
        if not gap <= _EXACT * max(1.0, float(wanted.abs().max())):
            raise StructureError(
                f"the outputs change by {gap:.2g} when the last block computes only the class token: "
                "the classifier must read more than that"
            )
        context.report(f"largest change of an output: {gap:.1e}")


def _tokens_read(structure: ViTStructure) -> int:
    """How many leading tokens the classifiers read."""
    if structure.pooling != "token":
        raise StructureError(
            f"pools its tokens with {structure.pooling!r}, which reads all of them; this pass needs a classifier on "
            "the class token alone (global_pool='token')"
        )
    if "cls_token" not in structure.tokens:
        raise StructureError("has no 'cls_token'")
    return 2 if "head_dist" in structure.heads else 1

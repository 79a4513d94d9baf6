"""Whether an attention mechanism of ``spaces.attention`` computes, once heads are gone, what it did with these at zero.

A mechanism knows how its heads are laid out and takes them out itself. Those of ``spaces`` do it right; somebody else's
is tried first, on a copy alone with random weights and tokens, as ``compress.probing`` tries other attentions.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compress.outputs import relative_gap
from compress.probing import EXACT, Call, calls_of, first_of, moved, own_random, told_of
from compress.structure import Heads, StructureError
from nas.errors import UserMistake
from spaces.attention.base import Attention

__all__ = ["require_heads_fit", "why_heads_stay"]

_INPUTS = ("query", "key", "value")
_OURS = ("spaces.", "torch.nn.")
_TOKENS = 5
_WANTED = (
    "its heads must not depend on each other, and keep_heads, head_maps and head_columns (spaces.attention.Attention) "
    "must know all that it holds by head"
)


def why_heads_stay(model: nn.Module, found: Sequence[Heads], example: Sequence[Tensor]) -> dict[str, str]:
    """Why some of ``found`` cannot lose heads, by name; the text follows the name in a sentence.

    Args:
        found: of ``find_heads(model)``; those of a single head keep it, so that nothing is asked of them.
        example: inputs of ``model``, to find out how it calls mechanisms of unknown classes; it is not changed.
    """
    several = [one for one in found if one.num_heads > 1]
    unknown = [one.name for one in several if not _is_ours(one.attention)]
    calls = calls_of(model, unknown, example) if unknown else {}
    reasons = {one.name: _why_not(one.attention, calls.get(one.name)) for one in several}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def require_heads_fit(heads: Heads) -> None:
    """Raises StructureError, which names the mechanism, where it cannot lose heads exactly."""
    if reason := _why_not(heads.attention, None):
        raise StructureError(f"{heads.name} {reason}")


def _is_ours(attention: Attention) -> bool:
    """Whether it is known to be right, with all its parts: a part may have been replaced by another's."""
    return all(type(one).__module__.startswith(_OURS) for one in attention.modules())


def _why_not(attention: Attention, call: Call | None) -> str | None:
    try:
        attention.head_maps()
        attention.head_columns()
    except UserMistake as mistake:
        return f"cannot lose heads: {mistake}"
    if _is_ours(attention) or attention.num_heads == 1:
        return None
    random = torch.Generator().manual_seed(0)
    with torch.no_grad(), own_random():
        whole = _random_copy(attention, random)
        given = _random_call(whole, call or _lone_call(whole), random)
        heads = torch.arange(whole.num_heads)
        for kept in (heads[1:], heads[:-1]):
            if reason := _gap(whole, kept, given):
                return f"({type(attention).__name__}) {reason}"
    return None


def _gap(whole: Any, kept: Tensor, given: Call) -> str | None:
    """What is wrong when only the heads ``kept`` are left; None: nothing."""
    zeroed, cut = copy.deepcopy(whole), copy.deepcopy(whole)
    gone = torch.ones(whole.num_heads, dtype=torch.bool)
    gone[kept] = False
    zeroed.out_proj.weight[:, whole.head_columns()[gone].flatten()] = 0
    try:
        wanted = first_of(zeroed(*given.args, **given.kwargs))
    except Exception as error:  # its forward is anybody's
        return f"cannot be tried alone ({told_of(error)})"
    try:
        cut.keep_heads(kept)
        found = first_of(cut(*given.args, **given.kwargs))
    except Exception as error:  # likewise
        return f"does not run with fewer heads ({told_of(error)}): {_WANTED}"
    gap = relative_gap(found, wanted)
    if gap <= EXACT and cut.num_heads == len(kept):
        return None
    return f"gives something else with fewer heads than with these at zero (by {gap:.2g}): {_WANTED}"


def _random_copy(attention: Attention, random: torch.Generator) -> Any:
    """On the CPU, in evaluation mode and at least float32, with weights so large that no mistake hides among even ones.

    What is no weight of a linear map keeps its sign, since it may be a temperature.
    """
    made = copy.deepcopy(attention).cpu().eval().requires_grad_(False)
    made = made if next(made.parameters()).dtype == torch.float64 else made.float()
    for parameter in (one for one in made.parameters() if one.is_floating_point()):
        drawn = torch.rand(parameter.shape, generator=random)
        near_zero = 0.3 * torch.randn(parameter.shape, generator=random)
        parameter.copy_(torch.where(parameter == 0, near_zero, parameter * (1 + drawn)))
    for layer in made.modules():
        if isinstance(layer, nn.Linear):
            scale = 1.5 * layer.in_features**-0.5
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=random) * scale)
    return made


def _lone_call(attention: Attention) -> Call:
    """Tokens alone, and a sequence to attend to where it is of another width."""
    tokens = torch.zeros(1, _TOKENS, attention.dim)
    if attention.kdim == attention.dim:
        return Call((tokens,), {})
    return Call((tokens, torch.zeros(1, _TOKENS + 2, attention.kdim)), {})


def _random_call(attention: Attention, call: Call, random: torch.Generator) -> Call:
    """The same call with random tokens; what was one tensor is one again, because fused maps look at that."""
    kind, drawn = next(attention.parameters()).dtype, dict[int, Tensor]()

    def tokens(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return drawn.setdefault(id(value), torch.randn(value.shape, generator=random).to(kind))

    given = [tokens(one) if place < len(_INPUTS) else moved(one, kind) for place, one in enumerate(call.args)]
    named = {name: tokens(one) if name in _INPUTS else moved(one, kind) for name, one in call.kwargs.items()}
    return Call(tuple(given), named)

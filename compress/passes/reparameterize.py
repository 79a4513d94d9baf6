"""Re-parameterisation: layers that are one linear map in evaluation become one layer. Exact, nothing is trained."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from compress.outputs import relative_gap
from compress.passes import register_pass
from compress.passes._reparameterize_algebra import fold_norm, foldable, in_sequence, parallel
from compress.passes._reparameterize_graph import Calls, branches_of, follows, scopes
from compress.passes.base import Context, NothingLeft, Pass, PassFailed
from nas.errors import UserMistake

__all__ = ["Reparameterize"]

_EXACT = 1e-3
_OWN_METHODS = ("fuse", "reparameterize", "switch_to_deploy")


@register_pass("reparameterize")
class Reparameterize(Pass):
    """Folds batch norms into what precedes them, and merges parallel branches and linear layers in sequence.

    Only what torch.fx proves is touched, in those parts of the model that it can trace, and only where the merged
    layer has no more weights. Modules of timm that can merge themselves (RepVGG, MobileOne, FastViT, LeViT, RepViT)
    do so first. Parallel branches need a module of their own that does nothing else but pre- and post-processing by
    modules or activations: it becomes an nn.Sequential.

    Args:
        own: let timm's modules merge themselves.
        norms: fold batch norms into the convolution or Linear before them.
        branches: merge sums of k x k, 1 x 1, identity and batch norm of the same input.
        sequences: merge linear layers that directly follow each other.
        dearer: merge branches even where the merged convolution has more weights than they: fewer calls for more
            arithmetic, which pays where calls are what takes the time.
    """

    changes = frozenset({"fusion"})
    cannot_follow: Mapping[str, str] = MappingProxyType(
        {"precision": "weights of int8 cannot be merged any more; re-parameterise first"}
    )

    def __init__(
        self,
        *,
        own: bool = True,
        norms: bool = True,
        branches: bool = True,
        sequences: bool = True,
        dearer: bool = False,
    ):
        if not (own or norms or branches or sequences):
            raise UserMistake(
                "reparameterize: own, norms, branches and sequences are all false; leave one true"
            )
        self.own, self.norms, self.branches, self.sequences = own, norms, branches, sequences
        self.dearer = dearer

    def apply(self, model: nn.Module, context: Context) -> nn.Module:
        """See ``Pass.apply``.

        Raises:
            NothingLeft: there is nothing to merge, and what was looked for.
            PassFailed: the result does not give what the model gave.
        """
        result = copy.deepcopy(model).eval()
        home = next((p for p in result.parameters()), torch.zeros(()))
        example = tuple(
            torch.cat([x, x.flip(-1)]).to(home.device, home.dtype if x.is_floating_point() else x.dtype)
            for x in context.example
        )
        wanted = _outputs(result, example)
        done = {"modules by themselves": _merge_themselves(result) if self.own else 0}
        done["norms"] = done["sequences"] = done["branches"] = 0
        while True:
            before = sum(done.values())
            if self.norms:
                done["norms"] += _fold_norms(result, example)
            if self.sequences:
                done["sequences"] += _merge_sequences(result, example)
            if self.branches:
                done["branches"] += _merge_branches(result, example, wanted, self.dearer)
            if sum(done.values()) == before:
                break
        if not sum(done.values()):
            raise NothingLeft(
                f"{type(model).__name__}: nothing to merge: no batch norm proven to follow a convolution or Linear, no "
                "module that is a sum of convolutions of one input, no cheaper merger of linear layers in sequence"
            )
        _same_or_fail(relative_gap(_outputs(result, example), wanted))
        context.report("merged: " + ", ".join(f"{number} {kind}" for kind, number in done.items() if number))
        return result


def _merge_themselves(model: nn.Module) -> int:
    """Number of timm's modules that merged themselves, wherever they are."""
    merged = 0
    for name, child in list(model.named_children()):
        method = next((word for word in _OWN_METHODS if callable(getattr(child, word, None))), None)
        if method is not None and type(child).__module__.startswith("timm."):
            before, had = _parameter_count(child), set(vars(child))
            fused = getattr(child, method)()
            for left in [one for one, value in vars(child).items() if isinstance(value, Tensor)]:
                if left not in had:  # what the merging itself was computed with
                    delattr(child, left)
            if method == "fuse":
                setattr(model, name, fused)
                child = fused
            merged += _parameter_count(child) != before
        merged += _merge_themselves(child)
    return merged


def _parameter_count(module: nn.Module) -> int:
    return sum(tensor.numel() for tensor in (*module.parameters(), *module.buffers()))


def _fold_norms(model: nn.Module, example: tuple[Tensor, ...]) -> int:
    calls, done = Calls(model, example), 0
    names = _all_names(model)
    for scope in scopes(model):
        for first, second in list(follows(model, scope, calls)):
            layer, norm = model.get_submodule(first), model.get_submodule(second)
            if not foldable(layer, norm):
                continue
            # Behind a Linear, only with (batch, channels) does the norm see the Linear's outputs as channels.
            if isinstance(layer, nn.Linear) and calls.dims(layer) != {2}:
                continue
            _put(model, names[layer], fold_norm(layer, norm))  # type: ignore[arg-type]
            _put(model, names[norm], _what_remains(norm))
            done += 1
    return done


def _what_remains(norm: nn.Module) -> nn.Module:
    """timm's batch norms carry the activation that follows."""
    left = [
        getattr(norm, part) for part in ("drop", "act") if isinstance(getattr(norm, part, None), nn.Module)
    ]
    left = [module for module in left if not isinstance(module, nn.Identity)]
    if len(left) > 1:
        return nn.Sequential(*left).eval()
    return left[0] if left else nn.Identity().eval()


def _merge_sequences(model: nn.Module, example: tuple[Tensor, ...]) -> int:
    calls, done, touched = Calls(model, example), 0, set[nn.Module]()
    names = _all_names(model)
    for scope in scopes(model):
        for first, second in list(follows(model, scope, calls)):
            one, two = model.get_submodule(first), model.get_submodule(second)
            if {one, two} & touched or (made := in_sequence(one, two)) is None:
                continue
            touched |= {one, two}
            _put(model, names[one], made)
            _put(model, names[two], nn.Identity().eval())
            done += 1
    return done


def _merge_branches(model: nn.Module, example: tuple[Tensor, ...], wanted: Any, dearer: bool) -> int:
    calls, done = Calls(model, example), 0
    names = _all_names(model)
    for module in list(model.modules()):
        if module is model or not calls.times(module) or next(module.children(), None) is None:
            continue
        chain = branches_of(module)
        if chain is None or any(
            one is not None and calls.times(one) != calls.times(module) for one in chain.branches
        ):
            continue
        if (made := parallel(chain.branches, dearer=dearer)) is None:
            continue
        _put(model, names[module], nn.Sequential(*chain.before, made, *chain.after).eval())
        try:
            _same_or_fail(relative_gap(_outputs(model, example), wanted))
            done += 1
        except (PassFailed, AttributeError):
            # Somebody uses more of the module than its forward: it stays.
            _put(model, names[module], module)
    return done


def _all_names(model: nn.Module) -> dict[nn.Module, list[str]]:
    found: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found.setdefault(module, []).append(name)
    return found


def _put(model: nn.Module, names: list[str], module: nn.Module) -> None:
    for name in names:
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, module)


@torch.no_grad()
def _outputs(model: nn.Module, example: tuple[Tensor, ...]) -> Any:
    return model(*example)


def _same_or_fail(gap: float) -> None:
    if not gap <= _EXACT:
        raise PassFailed(
            f"merged layers give other outputs than before (relative difference {gap:.3g}): the model uses them in a "
            "way that cannot be seen; leave some kind out (norms=false, sequences=false, branches=false, own=false)"
        )

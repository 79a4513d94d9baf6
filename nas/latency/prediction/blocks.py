"""The blocks that a model is a chain of, each with what it was called with, so that it can be measured alone."""

from __future__ import annotations

import enum
import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nas.errors import UserMistake
from nas.files import canonical_json

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["Block", "blocks_of"]


@dataclass(frozen=True)
class Block:
    """One block of a model with what it was called with.

    Attributes:
        signature: equal for blocks that run the same work: type and settings of its modules, shapes of parameters and
            of its inputs, names and values of the arguments that are no tensors.
        name: of the module in its model.
        module: to be measured with ``inputs``. Of a block that was called with more than tensors one after another
            (keywords, masks in tuples, ``None``, numbers) it is a module around it that calls it so.
        inputs: tensors of the shapes that it is called with in the model.
    """

    signature: str
    name: str
    module: nn.Module
    inputs: tuple[Tensor, ...]


def blocks_of(
    model: nn.Module, inputs: Sequence[Tensor], *, is_block: Callable[[str, nn.Module], bool] | None = None
) -> list[Block]:
    """The blocks that a model is a chain of, in the order of their calls; the model runs once and is not changed.

    Args:
        model: in any mode; it is run in evaluation mode without gradients.
        inputs: what it is called with.
        is_block: of a module's name and the module; by default the members of its ``nn.ModuleList`` and
            ``nn.Sequential`` containers that have members of their own, and the modules beside these that have none
            or that are ``nn.MultiheadAttention``. What runs in a ``forward`` between blocks is in none of them.

    Raises:
        UserMistake: no block was called, or one with an argument that can be told apart by neither shape nor value.
    """
    import torch

    chosen = _choose(model, is_block or _by_default(model))
    found: list[Block] = []

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(_block(name, module, args, kwargs))

        return hook

    hooks = [module.register_forward_pre_hook(note(name), with_kwargs=True) for name, module in chosen]
    was_training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            model(*inputs)
    finally:
        for module, training in was_training.items():
            module.training = training
        for hook in hooks:
            hook.remove()
    if not found:
        raise UserMistake(
            f"{type(model).__name__} has no blocks that are called; say what a block is with is_block"
        )
    return found


def _block(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Block:
    import torch
    from torch.utils._pytree import tree_flatten

    leaves, form = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    # Copies, because a model may change its own activations in place.
    copies = tuple(x.detach().clone() for x in tensors)
    if not kwargs and len(tensors) == len(args):
        return Block(_signature(module, tensors), name, module, copies)
    plain = [None if isinstance(leaf, torch.Tensor) else _plain(leaf, name, module) for leaf in leaves]
    signature = _signature(module, tensors, [plain, repr(form)])
    return Block(signature, name, _called_as(module, form, leaves), copies)


def _plain(value: Any, name: str, module: nn.Module) -> list[str]:
    """Type and value of an argument that is no tensor."""
    import torch

    known = (int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device, torch.memory_format)
    if value is not None and not isinstance(value, (*known, torch.layout, slice)):
        raise UserMistake(
            f"the block {name} ({type(module).__name__}) is called with a {type(value).__name__}, of which nobody can "
            "tell what work it makes; with is_block choose blocks around it or inside it"
        )
    return [type(value).__qualname__, repr(value)]


def _called_as(module: nn.Module, form: Any, leaves: Sequence[Any]) -> nn.Module:
    import torch

    fixed = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    return _call_class()(module, form, fixed, places)


@functools.cache
def _call_class() -> type[nn.Module]:
    """Made when it is first needed: the predictor works without torch."""
    from torch import nn
    from torch.utils._pytree import tree_unflatten

    class Call(nn.Module):
        """A module with its keywords and other arguments, to be called with tensors alone."""

        def __init__(self, module: nn.Module, form: Any, fixed: Sequence[Any], places: Sequence[int]):
            super().__init__()
            self.module = module
            self._form, self._fixed, self._places = form, list(fixed), list(places)

        def forward(self, *tensors: Tensor) -> Any:
            leaves = list(self._fixed)
            for place, tensor in zip(self._places, tensors, strict=True):
                leaves[place] = tensor
            args, kwargs = tree_unflatten(leaves, self._form)
            return self.module(*args, **kwargs)

    return Call


def _by_default(model: nn.Module) -> Callable[[str, nn.Module], bool]:
    from torch import nn

    members = {
        id(child)
        for module in model.modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential))
        for child in module.children()
    }

    def is_block(name: str, module: nn.Module) -> bool:
        # The layers inside of nn.MultiheadAttention are never called: their weights are handed to one function.
        leaf = next(module.children(), None) is None or isinstance(module, nn.MultiheadAttention)
        return (
            bool(name)
            and not isinstance(module, (nn.ModuleList, nn.Sequential))
            and (leaf or id(module) in members)
        )

    return is_block


def _choose(model: nn.Module, is_block: Callable[[str, nn.Module], bool]) -> list[tuple[str, nn.Module]]:
    """The outermost blocks: what lies inside of one is part of it."""
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer, _ in found)
        if name and not inside and is_block(name, module):
            found.append((name, module))
    return found


def _signature(module: nn.Module, tensors: Sequence[Tensor], call: Any = None) -> str:
    parts = {
        # extra_repr holds strides, dropout rates, eps and the like; parameters hold the widths.
        "modules": [[name, type(m).__qualname__, m.extra_repr()] for name, m in module.named_modules()],
        "settings": [[name, _settings(m)] for name, m in module.named_modules()],
        "parameters": [[name, list(p.shape), str(p.dtype)] for name, p in module.named_parameters()],
        "inputs": [[list(x.shape), str(x.dtype)] for x in tensors],
    }
    if call is not None:  # tables of blocks that were called with tensors only stay valid
        parts["call"] = call
    return hashlib.blake2b(canonical_json(parts).encode(), digest_size=8).hexdigest()


def _settings(module: nn.Module) -> dict[str, Any]:
    """Plain attributes: head counts, window sizes, switches, which many modules do not print."""
    return {
        name: repr(value)
        for name, value in sorted(vars(module).items())
        if not name.startswith("_")
        and name != "training"
        and isinstance(value, (int, float, str, bool, tuple))
    }

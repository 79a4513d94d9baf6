"""Cutting parameters while they are being trained: the optimisers follow, moments and all.

Source: OFB (Once for Both, CVPR 2024), progressive shrinking; the Adam moments of the units that stay are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["Slicer", "sync_sizes"]


class Slicer:
    """Replaces parameters by smaller ones, in their modules and in every optimiser that holds them.

    Args:
        optimizers: that hold (some of) the parameters; their per-element state is cut in the same way. State that does
            not have the parameter's shape (step counters) is kept; a parameter without state, because it never had a
            gradient, is no error.
    """

    def __init__(self, optimizers: Sequence[Optimizer] = ()):
        self._optimizers = tuple(optimizers)

    def select(self, owner: nn.Module, name: str, index: Tensor, dim: int) -> None:
        """Keep the entries ``index`` (K,) along ``dim``, in that order; nothing where there is no such parameter."""
        if getattr(owner, name, None) is None:
            return
        self.transform(owner, name, lambda x: x.index_select(dim, index.to(x.device)))

    def transform(self, owner: nn.Module, name: str, change: Callable[[Tensor], Tensor]) -> None:
        """Apply ``change`` to the parameter and to its moments."""
        old = owner.get_parameter(name)
        new = self._put(owner, name, old, change(old.detach()).clone())
        for optimizer in self._optimizers:
            state = optimizer.state.pop(old, None)
            if state:
                optimizer.state[new] = {
                    key: change(value).clone()
                    if torch.is_tensor(value) and value.shape == old.shape and value.ndim
                    else value
                    for key, value in state.items()
                }

    def renew(self, owner: nn.Module, name: str, value: Tensor) -> None:
        """Put ``value`` in the parameter's place; its moments start anew."""
        old = owner.get_parameter(name)
        self._put(owner, name, old, value.detach().clone())
        for optimizer in self._optimizers:
            optimizer.state.pop(old, None)

    def freeze(self, owner: nn.Module, name: str) -> None:
        """The parameter is trained no more, and no optimiser holds it."""
        parameter = owner.get_parameter(name)
        parameter.requires_grad_(False)
        parameter.grad = None
        for optimizer in self._optimizers:
            optimizer.state.pop(parameter, None)
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if p is not parameter]

    def _put(self, owner: nn.Module, name: str, old: nn.Parameter, value: Tensor) -> nn.Parameter:
        new = nn.Parameter(value, requires_grad=old.requires_grad)
        setattr(owner, name, new)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["params"] = [new if p is old else p for p in group["params"]]
        return new


def sync_sizes(module: nn.Module) -> None:
    """Make the size attributes of a Linear, Conv2d or LayerNorm those of its weight."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Conv2d):
        module.out_channels = module.weight.shape[0]
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(module.weight.shape)

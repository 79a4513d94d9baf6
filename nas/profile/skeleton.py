"""Running a model without its data, and knowing which module is at work."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["Scopes", "empty", "is_heavy", "plain_kernels", "skeleton"]

# Without a formula, and either of more work than element-wise operators or hiding a whole layer.
_HEAVY = re.compile(
    r"_?(fft_\w+|i?stft|cdist\w*|pdist\w*|grid_sampler\w*|embedding_bag\w*|_?trilinear|bilinear|cov|corrcoef)"
    r"|_?linalg_(svd|qr|eig|cholesky|inv|lu|solve|ldl|lstsq|householder|matrix_exp|matrix_power|multi_dot)\w*"
    r"|_?(cholesky|triangular_solve|ormqr|geqrf|lobpcg)\w*|matrix_power"
    r"|\w*(lstm|gru|rnn|attention|attn|transformer|matmul)\w*"
    r"|\w+_mm(_\w+)?|\w*conv(olution|_depthwise|_tbc|\d)\w*"
)
_OWN_NAMESPACES = ("aten", "prim", "prims", "profiler")


def is_heavy(namespace: str, name: str) -> bool:
    """Whether an operator that no formula covers has to be named: of others everything, of torch what works hard."""
    return namespace not in _OWN_NAMESPACES or _HEAVY.fullmatch(name) is not None


def skeleton(model: nn.Module) -> nn.Module:
    """A copy in which every tensor is on the meta device; no data is copied on the way."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for values in (module._parameters, module._buffers, vars(module)):
            for value in values.values():
                if isinstance(value, nn.Parameter):
                    memo[id(value)] = nn.Parameter(empty(value), requires_grad=value.requires_grad)
                elif isinstance(value, Tensor):
                    memo[id(value)] = empty(value)
    return copy.deepcopy(model, memo)


def empty(x: Tensor) -> Tensor:
    """Its shape and type without its data."""
    return torch.empty_like(x, device="meta", requires_grad=False)


@contextlib.contextmanager
def plain_kernels() -> Iterator[None]:
    """Attention as matrix products: neither fused attention nor the fused encoder layer, which have no formula."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class Scopes:
    """Knows the innermost module at work, by its first name in ``named_modules``; while entered, by hooks."""

    def __init__(self, model: nn.Module):
        self._named = dict(model.named_modules())
        self._running: list[tuple[str, nn.Module]] = [("", model)]
        self._hooks: list[Any] = []

    @property
    def name(self) -> str:
        """ "" is the model itself."""
        return self._running[-1][0]

    @property
    def module(self) -> nn.Module:
        """The module of that name."""
        return self._running[-1][1]

    def __enter__(self) -> Scopes:
        for name, module in self._named.items():
            self._hooks.append(module.register_forward_pre_hook(self._pusher(name)))
            self._hooks.append(module.register_forward_hook(self._pop))
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _pusher(self, name: str) -> Any:
        def push(module: nn.Module, inputs: Any) -> None:
            self._running.append((name, module))

        return push

    def _pop(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        self._running.pop()

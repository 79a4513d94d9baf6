"""Running a model without its data, and knowing which module is at work."""

from __future__ import annotations

import contextlib
import copy
import re
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy

from nas.errors import UserMistake

__all__ = [
    "Scopes",
    "empty",
    "full_copy",
    "is_heavy",
    "packed_modules",
    "plain_kernels",
    "refuse_lazy",
    "refuse_scripts",
    "skeleton",
    "uncompiled_name",
]

# Without a formula, and either of more work than element-wise operators or hiding a whole layer.
_HEAVY = re.compile(
    r"_?(fft_\w+|i?stft|cdist\w*|pdist\w*|euclidean_dist|embedding_bag\w*|_?trilinear|bilinear|cov|corrcoef)"
    r"|\w*(grid_sampler|affine_grid_generator)\w*"
    r"|_?linalg_(svd|qr|eig|cholesky|inv|lu|solve|ldl|lstsq|householder|matrix_exp|matrix_power|multi_dot)\w*"
    r"|_?linalg_(det|slogdet|pinv|tensorinv|tensorsolve|matrix_rank|cond|polar|matrix_sqrt)\w*"
    r"|_?(cholesky|triangular_solve|ormqr|orgqr|geqrf|lobpcg|lu_solve|lu_with_info|spsolve)\w*"
    r"|(log|slog)?det|p?inverse|svd|matrix_(power|exp)|chain_matmul"
    r"|\w*(lstm|gru|rnn|attention|attn|transformer|matmul)\w*"
    r"|\w+_mm(_\w+)?|\w+_linear(_\w+)?|(s|hs)(pa)?mm|\w+addmm_?|\w*conv(olution|_depthwise|_tbc|_dilated|\d)\w*"
)
_OWN_NAMESPACES = ("aten", "prim", "prims", "profiler")


def is_heavy(namespace: str, name: str) -> bool:
    """Whether an operator that no formula covers has to be named: of others everything, of torch what works hard."""
    return namespace not in _OWN_NAMESPACES or _HEAVY.fullmatch(name) is not None


def refuse_lazy(model: nn.Module) -> None:
    """Raises UserMistake when a parameter or buffer has no shape before the first call (``nn.LazyLinear``)."""
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(value):
            raise UserMistake(
                f"{name} of {type(model).__name__} has no shape yet; call the model once with its inputs, then count it"
            )


def refuse_scripts(model: nn.Module) -> None:
    """Raises UserMistake for TorchScript, whose modules take no hooks that would tell who is at work."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UserMistake(
                f"{name or 'the model'} is a TorchScript module, which cannot be counted; "
                "give the model that torch.jit.script or torch.jit.trace was called with"
            )


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
    return _uncompiled_copy(model, memo)


def full_copy(model: nn.Module) -> nn.Module:
    """A copy with its data."""
    return _uncompiled_copy(model, {})


def _uncompiled_copy(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy with the module itself in place of what torch.compile has put around it, which no trace can enter."""
    for module in reversed(list(model.modules())):  # the innermost first
        if type(module).__name__ == "OptimizedModule" and isinstance(
            module._modules.get("_orig_mod"), nn.Module
        ):
            memo[id(module)] = copy.deepcopy(module._modules["_orig_mod"], memo)
    return copy.deepcopy(model, memo)


def uncompiled_name(name: str) -> str:
    """The name that a module of the model has in ``skeleton``."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


_PACKED = ("_packed_params", "_packed_weight_ih", "_all_weight_values")


def packed_modules(model: nn.Module) -> list[str]:
    """Names of quantized modules that keep their weights packed for a kernel, where they are no parameters."""
    found: list[str] = []
    for name, module in model.named_modules():
        quantized = re.match(r"torch\.ao\.nn\.(intrinsic\.)?quantized\.", type(module).__module__)
        inside = any(not outer or name.startswith(f"{outer}.") for outer in found)
        if quantized and not inside and any(hasattr(module, attribute) for attribute in _PACKED):
            found.append(name)
    return found


def empty(x: Tensor) -> Tensor:
    """Its shape and type without its data."""
    return torch.empty_like(x, device="meta", requires_grad=False)


@contextlib.contextmanager
def plain_kernels() -> Iterator[None]:
    """Attention as matrix products: neither fused attention nor the fused encoder layer, which have no formula.

    Nor is anything compiled: flex_attention and cond call torch.compile, which refuses to run under a counter.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), _uncompiled():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextlib.contextmanager
def _uncompiled() -> Iterator[None]:
    def as_it_is(model: Any = None, **_: Any) -> Any:
        return (lambda function: function) if model is None else model

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch, "compile", as_it_is))
        # What was compiled before has loaded dynamo, which takes a second to load only to be told to do nothing.
        if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


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

"""fvcore's jit analysis, with handles for what it lacks: it sees the functions that were called, as jit traces them.

fvcore's own: the trace, and who called what. The formulas are in ``fvcore_handles``.

What tracing does in the way: it drops what no result depends on, so results of products are handed out beside the
model's own; the convolutions of the meta device are written in Python, where the tracer replaces sizes by tensors, so
they run with the tracer switched off; complex convolutions are traced as three real ones, so one real one of the same
shapes is written into the trace in their place. What heavy work a traced call hides (the decomposition in a norm of
matrices) is noted as it reaches a device.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._functorch import apis
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from nas.profile.by_torch import (
    HIGHER_ORDER,
    UNDIVIDED,
    Recorder,
    function_name,
    is_complex,
    is_complex_convolution,
    unseen,
)
from nas.profile.formulas import Work
from nas.profile.fvcore_handles import KEPT, MACS, handles, noting
from nas.profile.skeleton import is_heavy, plain_kernels
from nas.profile.tally import MissingCounter, Tally

__all__ = ["count_by_fvcore"]


def count_by_fvcore(model: nn.Module, inputs: Sequence[Tensor]) -> Tally:
    """Count one call of ``model``, which is run as it is; see ``nas.profile``.

    Raises:
        MissingCounter: fvcore is not installed.
    """
    try:
        from fvcore.nn import FlopCountAnalysis, parameter_count
    except ImportError as missing:
        raise MissingCounter("fvcore", missing, "fvcore") from missing
    tally = Tally(params=int(parameter_count(model)[""]))
    root = _Root(model, tally)
    analysis = FlopCountAnalysis(root, tuple(inputs))
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analysis.clear_op_handles()  # norms, pooling and resizing are no MACs here; those of products come back below
    for name, handle in handles().items():
        analysis.set_op_handle(name, noting(name, handle, tally))
    recorder = Recorder()
    with torch.no_grad(), plain_kernels(), _quiet(), _untraced_vmap(), recorder, _MetaConvolutions():
        counted = analysis.by_operator()
    tally.uncounted |= recorder.uncounted
    for key, amount in counted.items():
        kind, _, module = key.partition("|")
        tally.add(module, Work(amount, 0) if kind == MACS else Work(0, amount))
    for kind in analysis.unsupported_ops():
        namespace, _, name = kind.partition("::")
        if is_heavy(namespace, name) or kind.startswith(("prim::PythonOp", "prim::CallFunction")):
            tally.uncounted.add(name if namespace == "aten" else kind)
    return tally


class _Root(nn.Module):
    """Hands out tensors only, as tracing wants it, and with them the results of all products: see above."""

    def __init__(self, model: nn.Module, tally: Tally):
        super().__init__()
        self.model = model
        self._tally = tally

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        with _Keep(self._tally) as keep:
            result = self.model(*inputs)
        return tuple(leaf for leaf in tree_leaves((result, keep.kept)) if isinstance(leaf, Tensor))


class _Keep(TorchFunctionMode):
    def __init__(self, tally: Tally) -> None:
        super().__init__()
        self.kept: list[Any] = []
        self._tally = tally

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(func, HIGHER_ORDER):
            return self._higher_order(func, args, kwargs or {})
        traced = torch._C._get_tracing_state() is not None
        if traced and is_complex_convolution(func, args, kwargs or {}):
            return self._complex_convolution(func, args, kwargs or {})
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "").strip("_")
        product = name in KEPT or name.startswith("fft_")
        if not traced:
            self._tally.uncounted |= {"vmap"} if product else set()
        elif product or isinstance(func, _OPERATORS):
            self.kept.append(result)
        return result

    def _complex_convolution(self, func: Any, args: Any, kwargs: Any) -> Any:
        with _untraced():
            result = func(*args, **kwargs)
        real = tree_map(lambda leaf: leaf.real if is_complex(leaf) else leaf, (args, kwargs))
        self.kept.append(func(*real[0], **real[1]))
        return _traced_again(result)

    def _higher_order(self, func: Any, args: Any, kwargs: Any) -> Any:
        """No trace can hold a call with functions; attention is written into it as that without a score function."""
        with _untraced():
            result = unseen(func, args, kwargs)
        result = _traced_again(result)
        name = function_name(func)
        if name not in UNDIVIDED:
            self._tally.uncounted.add(name)
            return result
        query, key, value = args[:3]
        self.kept.append(F.scaled_dot_product_attention(query, key, value, enable_gqa=True))
        return result


_OPERATORS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """A trace is only looked at here: what jit says of its fitness for other inputs does not matter."""
    logger = logging.getLogger("fvcore.nn.jit_analysis")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _untraced_vmap() -> Iterator[None]:
    """Inside of vmap nothing can be traced; flex_attention makes its masks there."""
    original = getattr(apis, "vmap_impl", None)
    if original is None:  # another version of torch: a model with vmap cannot be traced, and that is told
        yield
        return

    def untraced(*args: Any, **kwargs: Any) -> Any:
        with _untraced():
            result = original(*args, **kwargs)
        return _traced_again(result)

    with mock.patch.object(apis, "vmap_impl", untraced):
        yield


class _MetaConvolutions(TorchDispatchMode):
    """Writes convolutions into the trace, which normally a kernel of the CPU does, and runs kernels untraced."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if func is aten.convolution.default and torch._C._get_tracing_state() is not None:
            with _tracer_excluded(False), self:
                return aten._convolution.default(*args, False, False, False, False)
        with _untraced():
            if func is aten._convolution.default:
                return aten.convolution.default(*args[:9])
            return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _tracer_excluded(excluded: bool) -> Iterator[None]:
    tracer = torch._C._dispatch_key_parse("Tracer")
    before = torch._C._dispatch_tls_is_dispatch_key_excluded(tracer)
    torch._C._dispatch_tls_set_dispatch_key_excluded(tracer, excluded)
    try:
        yield
    finally:
        torch._C._dispatch_tls_set_dispatch_key_excluded(tracer, before)


@contextlib.contextmanager
def _untraced() -> Iterator[None]:
    state = torch._C._get_tracing_state()
    if state is None:
        yield
        return
    with _tracer_excluded(False):  # the state may not be changed while the tracer is excluded
        torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
        try:
            yield
        finally:
            torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


def _traced_again(result: Any) -> Any:
    """Results of what ran untraced, which to the tracer are constants, as results of the trace: it wants no others."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, result)

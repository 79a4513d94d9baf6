"""torch's FlopCounterMode, with formulas for what it lacks: it sees the operators that reach a device.

Its own: mm, addmm, bmm, baddbmm, convolutions. Ours: products with vectors, addbmm, products in place, Fourier
transforms, the fused recurrent layer of CPUs, registered operators; and attention is forced into matrix products,
because a fused kernel has no formula on every device: on a CPU scaled_dot_product_attention counts nothing in torch
2.15. It counts two operations for one multiply-accumulate. What falls apart into element-wise operators before it
reaches a device (vecdot), becomes several products there that are one by the convention (complex convolutions), or
several transforms of which only the whole has a name (hfft2), and operators that are called with functions, are taken
as they are called from Python.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from nas.profile import formulas
from nas.profile.formulas import Work
from nas.profile.skeleton import Scopes, is_heavy, plain_kernels
from nas.profile.tally import Tally

__all__ = [
    "CONVOLUTIONS",
    "HIGHER_ORDER",
    "OUR_FORMULAS",
    "UNDIVIDED",
    "Recorder",
    "count_by_torch",
    "function_name",
    "is_complex",
    "is_complex_convolution",
    "operator_name",
    "registered_work",
    "unseen",
]


def _matrix_vector(out: Tensor, /, matrix: Tensor, vector: Tensor, **_: Any) -> Work:
    return formulas.matrix_product(out.shape, vector.shape[0])


def _add_matrix_vector(out: Tensor, /, bias: Tensor, matrix: Tensor, vector: Tensor, **_: Any) -> Work:
    return formulas.matrix_product(out.shape, vector.shape[0])


def _add_products(out: Tensor, /, bias: Tensor, left: Tensor, right: Tensor, **_: Any) -> Work:
    return formulas.matrix_product(out.shape, left.shape[0] * left.shape[2])


def _add_product(out: Tensor, /, bias: Tensor, left: Tensor, right: Tensor, **_: Any) -> Work:
    return formulas.matrix_product(out.shape, left.shape[-1])


def _from_real(out: Tensor, /, x: Tensor, dims: Sequence[int], *_: Any, **__: Any) -> Work:
    sizes = [x.shape[dim] for dim in dims]
    return formulas.fourier(x.numel() // max(1, math.prod(sizes)), sizes, out.shape, real=True)


def _to_real(out: Tensor, /, x: Tensor, dims: Sequence[int], *_: Any, **__: Any) -> Work:
    sizes = [out.shape[dim] for dim in dims]
    return formulas.fourier(out.numel() // max(1, math.prod(sizes)), sizes, out.shape, real=True)


def _complex(out: Tensor, /, x: Tensor, dims: Sequence[int], *_: Any, **__: Any) -> Work:
    sizes = [x.shape[dim] for dim in dims]
    return formulas.fourier(x.numel() // max(1, math.prod(sizes)), sizes, out.shape, real=False)


def _fused_recurrent(out: Any, /, x: Tensor, *weights: Any, **_: Any) -> Work:
    """One layer in one direction; the four weights come first, w_ih and w_hh among them."""
    return formulas.recurrent(x.shape[0] * x.shape[1], [weight.shape for weight in weights[:2]])


def _vector_products(out: Tensor, /, x: Tensor, y: Tensor, **_: Any) -> Work:
    return formulas.vector_products(x.shape, y.shape, out.shape)


def _flex_attention(out: Any, /, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Work:
    return formulas.attention(query.shape, key.shape, value.shape)


def _convolved(out: Tensor, /, input: Tensor, weight: Tensor, *_: Any, **__: Any) -> Work:
    return formulas.convolution(out.shape, weight.shape)


def _transposed(out: Tensor, /, input: Tensor, weight: Tensor, *_: Any, **__: Any) -> Work:
    return formulas.transposed_convolution(input.shape, out.shape, weight.shape)


CONVOLUTIONS: dict[str, Callable[..., Work]] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolved),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _transposed),
}
"""By ``function_name``."""

_NAMED = ("fft_hfft2", "fft_ihfft2", "fft_hfftn", "fft_ihfftn")
"""Without a formula, though what they fall apart into has one: no counter that sees them whole can count the same."""

UNDIVIDED: dict[str, Callable[..., Work]] = {
    "linalg_vecdot": _vector_products,
    "higher_order::flex_attention": _flex_attention,
}
"""By ``function_name``: what can only be counted where Python calls it."""

HIGHER_ORDER = torch._ops.HigherOrderOperator
"""Operators that are called with functions: flex_attention, cond, while_loop, ..."""

OUR_FORMULAS: dict[Any, Callable[..., Work]] = {
    torch.ops.aten.mv: _matrix_vector,
    torch.ops.aten.addmv: _add_matrix_vector,
    torch.ops.aten.dot: _matrix_vector,
    torch.ops.aten.vdot: _matrix_vector,
    torch.ops.aten.addmv_: _add_matrix_vector,
    torch.ops.aten.addbmm: _add_products,
    torch.ops.aten.addbmm_: _add_products,
    torch.ops.aten.addmm_: _add_product,
    torch.ops.aten.baddbmm_: _add_product,
    torch.ops.aten._addmm_activation: _add_product,
    torch.ops.aten._fft_r2c: _from_real,
    torch.ops.aten._fft_c2r: _to_real,
    torch.ops.aten._fft_c2c: _complex,
    torch.ops.aten.mkldnn_rnn_layer: _fused_recurrent,
}


def operator_name(operator: Any) -> tuple[str, str]:
    """Library and name of an operator or of one of its overloads."""
    if isinstance(operator, HIGHER_ORDER):
        return "higher_order", operator.name()
    return _packet_name(getattr(operator, "overloadpacket", operator))


@functools.lru_cache(maxsize=4096)  # asked for every operator that runs
def _packet_name(packet: Any) -> tuple[str, str]:
    namespace, _, name = str(getattr(packet, "_qualified_op_name", packet)).partition("::")
    return namespace, name


def function_name(func: Any) -> str:
    """Name of what Python called: a function, an operator of torch, or with ``library::`` one of another library."""
    if isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket, HIGHER_ORDER)):
        namespace, name = operator_name(func)
        return name if namespace == "aten" else f"{namespace}::{name}"
    return str(getattr(func, "__name__", repr(func)))


def is_complex(value: Any) -> bool:
    """Whether it is a tensor of complex numbers."""
    return isinstance(value, Tensor) and value.is_complex()


def is_complex_convolution(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether torch makes three real convolutions of this call."""
    return function_name(func) in CONVOLUTIONS and any(map(is_complex, tree_leaves((args, kwargs))))


def _schema_shapes(operator: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[formulas.Shape]:
    """Shapes of the tensors among the arguments, in the order of the operator's schema, lists laid flat."""
    if isinstance(operator, HIGHER_ORDER):
        return [value.shape for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    schema = (operator if hasattr(operator, "_schema") else operator.default)._schema
    names = [argument.name for argument in schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    values = tree_leaves([given[name] for name in names if name in given])
    return [value.shape for value in values if isinstance(value, Tensor)]


def count_by_torch(model: nn.Module, inputs: Sequence[Tensor]) -> Tally:
    """Count one call of ``model``, which is run as it is; see ``nas.profile``."""
    tally = Tally(params=sum(p.numel() for p in model.parameters()))
    scopes = Scopes(model)
    counter = FlopCounterMode(display=False, custom_mapping=_mapping(tally, scopes))
    recorder = Recorder()
    undivided = _Undivided(tally, scopes, recorder)
    with torch.no_grad(), plain_kernels(), scopes, recorder, counter, undivided:
        model(*inputs)
    tally.uncounted = recorder.uncounted
    if int(counter.get_total_flops()) != 2 * (tally.total.macs - undivided.work.macs):
        raise RuntimeError("FlopCounterMode counted operators that no module owns")
    return tally


def _mapping(tally: Tally, scopes: Scopes) -> dict[Any, Callable[..., int]]:
    """All formulas, each of which also notes for which module it was called."""

    def noting(work_of: Callable[..., Work]) -> Callable[..., int]:
        def formula(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
            work = work_of(out_val, *args, **kwargs)
            tally.add(scopes.name, work)
            return 2 * work.macs

        formula._get_raw = True  # type: ignore[attr-defined]  # FlopCounterMode then passes tensors, not shapes
        return formula

    theirs = {operator: noting(_theirs(formula)) for operator, formula in flop_registry.items()}
    ours = {operator: noting(work_of) for operator, work_of in OUR_FORMULAS.items()}
    registered = {}
    for name, formula in formulas.registered().items():
        namespace, _, operator = name.partition("::")
        packet = getattr(getattr(torch.ops, namespace), operator, None)
        if packet is not None:  # a library that is not loaded cannot be called
            registered[packet] = noting(registered_work(packet, formula))
    return {**theirs, **ours, **registered}


def _theirs(formula: Callable[..., int]) -> Callable[..., Work]:
    def work_of(out: Any, /, *args: Any, **kwargs: Any) -> Work:
        written = next((leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)), None)
        return Work(formula(*args, out_val=out, **kwargs) // 2, 0 if written is None else written.numel())

    return work_of


def registered_work(operator: Any, formula: formulas.Formula) -> Callable[..., Work]:
    """A formula of shapes, for the arguments that ``operator`` is called with."""

    def work_of(out: Any, /, *args: Any, **kwargs: Any) -> Work:
        results = [leaf.shape for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        return Work(*formula(_schema_shapes(operator, args, kwargs), results))

    return work_of


class _Undivided(TorchFunctionMode):
    """Counts or names, as Python calls them, functions that the counter must not look into; they run unseen by it."""

    def __init__(self, tally: Tally, scopes: Scopes, recorder: Recorder):
        super().__init__()
        self.work = formulas.NOTHING
        self._tally = tally
        self._scopes = scopes
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function_name(func)
        work_of = CONVOLUTIONS[name] if is_complex_convolution(func, args, kwargs) else UNDIVIDED.get(name)
        if isinstance(func, HIGHER_ORDER):
            formula = formulas.formula_of(name)
            work_of = work_of if formula is None else registered_work(func, formula)
        elif work_of is None and name not in _NAMED:
            return func(*args, **kwargs)
        result = unseen(func, args, kwargs)
        if work_of is None:
            self._recorder.uncounted.add(name)
        else:
            work = work_of(result, *args, **kwargs)
            self.work += work
            self._tally.add(self._scopes.name, work)
        return result


def unseen(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call ``func`` with no counter looking into it."""
    with _disable_current_modes():
        return func(*args, **kwargs)


class Recorder(TorchDispatchMode):
    """Notes operators that do heavy work without a formula; it lies below the counter and sees what that decomposed."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.uncounted: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.note(func)
        return result

    def note(self, func: Any) -> None:
        """Name ``func`` if nothing is known of its work."""
        packet = getattr(func, "overloadpacket", func)
        namespace, name = operator_name(func)
        if packet in flop_registry or packet in OUR_FORMULAS or formulas.formula_of(f"{namespace}::{name}"):
            return
        if is_heavy(namespace, name):
            self.uncounted.add(name if namespace == "aten" else f"{namespace}::{name}")

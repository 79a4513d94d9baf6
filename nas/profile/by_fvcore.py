"""fvcore's jit analysis, with handles for what it lacks: it sees the functions that were called, as jit traces them.

fvcore's own: the trace, who called what, the formulas of convolutions, linear maps, addmm and bmm. Ours: matmul (its
own does not broadcast), scaled_dot_product_attention, einsum, products with vectors, recurrent layers, Fourier
transforms, registered operators; its figures for norms, pooling and resizing are left out, as is the convention.

Two things that tracing does in the way: it drops what no result depends on, so results of products are handed out
beside the model's own; and the convolutions of the meta device are written in Python, where the tracer replaces sizes
by tensors, so they run with the tracer switched off.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._functorch import apis
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from nas.errors import UserMistake
from nas.profile import formulas
from nas.profile.by_torch import HIGHER_ORDER, UNDIVIDED, function_name, unseen
from nas.profile.formulas import Shape, Work
from nas.profile.skeleton import is_heavy, plain_kernels
from nas.profile.tally import Tally

__all__ = ["count_by_fvcore"]

_MACS, _ACTIVATIONS = "macs", "activations"
Handle = Callable[[list[Any], list[Any]], "Work | None"]


class _Unknown(Exception):
    """A value of the trace has no shape, or is not a constant."""


def count_by_fvcore(model: nn.Module, inputs: Sequence[Tensor]) -> Tally:
    """Count one call of ``model``, which is run as it is; see ``nas.profile``.

    Raises:
        UserMistake: fvcore is not installed.
    """
    try:
        from fvcore.nn import FlopCountAnalysis, parameter_count
    except ImportError as missing:
        raise UserMistake(
            f"the counter fvcore cannot be imported ({missing}); pip install fvcore, or leave it out"
        ) from missing
    tally = Tally(params=int(parameter_count(model)[""]))
    root = _Root(model, tally)
    analysis = FlopCountAnalysis(root, tuple(inputs))
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    analysis.clear_op_handles()  # norms, pooling and resizing are no MACs here; those of products come back below
    handles = {**{f"aten::{name}": handle for name, handle in _handles().items()}, **_registered()}
    for name, handle in handles.items():
        analysis.set_op_handle(name, _noting(name, handle, tally))
    with torch.no_grad(), plain_kernels(), _quiet(), _untraced_vmap(), _MetaConvolutions():
        counted = analysis.by_operator()
    for key, amount in counted.items():
        kind, _, module = key.partition("|")
        tally.add(module, Work(amount, 0) if kind == _MACS else Work(0, amount))
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
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "").strip("_")
        product = name in _KEPT or name.startswith("fft_")
        if torch._C._get_tracing_state() is None:
            self._tally.uncounted |= {"vmap"} if product else set()
        elif product or isinstance(func, _OPERATORS):
            self.kept.append(result)
        return result

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


# -- handles -----------------------------------------------------------------------------------------------------------


def _noting(kind: str, handle: Handle, tally: Tally) -> Callable[[list[Any], list[Any]], Counter[str]]:
    """fvcore sums up whatever a handle's counter holds; its keys tell ours apart by kind and by innermost module."""

    def counter(inputs: list[Any], outputs: list[Any]) -> Counter[str]:
        namespace, _, name = kind.partition("::")
        try:
            work = handle(inputs, outputs)
        except _Unknown:
            work = None
        if work is None:
            tally.uncounted.add(name if namespace == "aten" else kind)
            return Counter()
        scope = outputs[0].node().scopeName().split("/")[-1]
        module = scope.removeprefix("model").removeprefix(".")
        return Counter({f"{_MACS}|{module}": work.macs, f"{_ACTIVATIONS}|{module}": work.activations})

    return counter


def _shape(value: Any) -> Shape:
    if not value.isCompleteTensor():
        raise _Unknown
    return list(value.type().sizes())


def _shapes(values: Sequence[Any]) -> list[Shape]:
    """Of all tensors among ``values``, lists laid flat."""
    found: list[Shape] = []
    for value in values:
        if value.node().kind() == "prim::ListConstruct" and not value.isCompleteTensor():
            found += _shapes([item for item in value.node().inputs() if "Tensor" in str(item.type().kind())])
        elif "Tensor" in str(value.type().kind()):
            found.append(_shape(value))
    return found


def _integer(value: Any) -> int:
    """A whole number of the trace: a constant, or a size and what was reckoned from sizes."""
    node = value.node()
    if (constant := value.toIValue()) is not None:
        return int(constant)
    if node.kind() in ("prim::NumToTensor", "aten::Int", "aten::ScalarImplicit"):
        return _integer(node.inputsAt(0))
    if node.kind() == "aten::size":
        return _shape(node.inputsAt(0))[_integer(node.inputsAt(1))]
    raise _Unknown


def _integers(value: Any) -> int | list[int] | None:
    if value.node().kind() == "prim::ListConstruct":
        return [_integer(item) for item in value.node().inputs()]
    if value.node().mustBeNone():
        return None
    constant = value.toIValue()
    return [int(item) for item in constant] if isinstance(constant, list) else _integer(value)


def _theirs(formula: Callable[[list[Any], list[Any]], Any]) -> Handle:
    def handle(inputs: list[Any], outputs: list[Any]) -> Work:
        _shapes(inputs)  # theirs fail without shapes
        counted = formula(inputs, outputs)
        macs = sum(counted.values()) if isinstance(counted, dict) else counted
        return Work(int(macs), formulas.matrix_product(_shape(outputs[0]), 0).activations)

    return handle


def _product(left: int) -> Handle:
    """The last dimension of argument number ``left`` is summed over."""

    def handle(inputs: list[Any], outputs: list[Any]) -> Work:
        shape = _shape(inputs[left])
        return formulas.matrix_product(_shape(outputs[0]), shape[-1]) if shape else formulas.NOTHING

    return handle


def _convolution_mode(inputs: list[Any], outputs: list[Any]) -> Work:
    """Padding by name, "same" or "valid"."""
    return formulas.convolution(_shape(outputs[0]), _shape(inputs[1]))


def _addbmm(inputs: list[Any], outputs: list[Any]) -> Work:
    left = _shape(inputs[1])
    return formulas.matrix_product(_shape(outputs[0]), left[0] * left[2])


def _tensordot(inputs: list[Any], outputs: list[Any]) -> Work:
    return formulas.tensordot(_shape(inputs[0]), _shape(inputs[1]), _shape(outputs[0]))


def _attention(inputs: list[Any], outputs: list[Any]) -> Work:
    return formulas.attention(*(_shape(value) for value in inputs[:3]))


def _chain(inputs: list[Any], outputs: list[Any]) -> Work:
    return formulas.chain(_shapes([inputs[0]]))


def _matrix_power(inputs: list[Any], outputs: list[Any]) -> Work | None:
    return formulas.matrix_power(_shape(inputs[0]), _integer(inputs[1]))


def _vector_products(inputs: list[Any], outputs: list[Any]) -> Work:
    return formulas.vector_products(_shape(inputs[0]), _shape(inputs[1]), _shape(outputs[0]))


def _einsum(inputs: list[Any], outputs: list[Any]) -> Work:
    path = _integers(inputs[2]) if len(inputs) > 2 else None
    return formulas.einsum(
        inputs[0].toIValue(), _shapes([inputs[1]]), path if isinstance(path, list) else None
    )


def _recurrent(inputs: list[Any], outputs: list[Any]) -> Work:
    """(input, hx, weights, ...), or for packed sequences (data, batch sizes, hx, weights, ...)."""
    packed = inputs[3].node().kind() == "prim::ListConstruct"
    *rows, _ = _shape(inputs[0])
    count = rows[0] if packed or len(rows) == 1 else rows[0] * rows[1]
    return formulas.recurrent(count, _shapes([inputs[3 if packed else 2]]))


def _fourier(name: str) -> Handle:
    def handle(inputs: list[Any], outputs: list[Any]) -> Work | None:
        complex_input = "Complex" in str(inputs[0].type().scalarType())
        return formulas.fourier_call(
            name,
            _shape(inputs[0]),
            _shape(outputs[0]),
            complex_input=complex_input,
            length=_integers(inputs[1]) if "rfft" in name or name.endswith("hfft") else None,
            dims=_fourier_dims(name, inputs),
        )

    return handle


def _fourier_dims(name: str, inputs: list[Any]) -> int | list[int] | None:
    dims = _integers(inputs[2])
    if dims is None and not inputs[1].node().mustBeNone():  # as many last dimensions as there are lengths
        lengths = list(inputs[1].node().inputs())
        return list(range(-len(lengths), 0))
    return dims


_PRODUCTS = {
    **dict.fromkeys(("matmul", "mm", "mv", "dot", "vdot", "inner"), 0),
    **dict.fromkeys(("baddbmm", "addmv", "baddbmm_", "addmv_", "addmm_"), 1),
}
_KEPT = {
    "linear", "bmm", "addmm", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    "rmatmul", "einsum", "tensordot", "addbmm", "scaled_dot_product_attention", "multi_head_attention_forward", "lstm",
    "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell", "chain_matmul",
    "linalg_multi_dot", "linalg_matrix_power", "matrix_power", "linalg_vecdot",
    *(name.strip("_") for name in _PRODUCTS),
}  # fmt: skip


def _handles() -> dict[str, Handle]:
    from fvcore.nn import jit_handles

    theirs = {
        "_convolution": jit_handles.conv_flop_jit,
        "linear": jit_handles.linear_flop_jit,
        "addmm": jit_handles.addmm_flop_jit,
        "bmm": jit_handles.bmm_flop_jit,
    }
    transforms = formulas.TRANSFORMS
    return {
        **{name: _theirs(formula) for name, formula in theirs.items()},
        **{name: _product(left) for name, left in _PRODUCTS.items()},
        "_convolution_mode": _convolution_mode,
        "addbmm": _addbmm,
        "addbmm_": _addbmm,
        "tensordot": _tensordot,
        "scaled_dot_product_attention": _attention,
        "einsum": _einsum,
        **dict.fromkeys(("linalg_multi_dot", "chain_matmul"), _chain),
        **dict.fromkeys(("linalg_matrix_power", "matrix_power"), _matrix_power),
        "linalg_vecdot": _vector_products,
        **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _recurrent),
        **{f"fft_{name}": _fourier(name) for name in transforms},
    }


def _registered() -> dict[str, Handle]:
    def handle_of(formula: formulas.Formula) -> Handle:
        return lambda inputs, outputs: Work(*formula(_shapes(inputs), _shapes(outputs)))

    return {name: handle_of(formula) for name, formula in formulas.registered().items()}

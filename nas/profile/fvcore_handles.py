"""Work of the nodes of a jit trace, for the counter fvcore.

fvcore's own: the formulas of convolutions, linear maps, addmm and bmm. Ours: matmul (its own does not broadcast),
scaled_dot_product_attention, einsum, products with vectors, recurrent layers, Fourier transforms, registered operators;
its figures for norms, pooling and resizing are left out, as is the convention.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from nas.profile import formulas
from nas.profile.formulas import Shape, Work
from nas.profile.tally import Tally

__all__ = ["KEPT", "MACS", "handles", "noting"]

MACS, _ACTIVATIONS = "macs", "activations"
Handle = Callable[[list[Any], list[Any]], "Work | None"]


class _Unknown(Exception):
    """A value of the trace has no shape, or is not a constant."""


def noting(kind: str, handle: Handle, tally: Tally) -> Callable[[list[Any], list[Any]], Counter[str]]:
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
        return Counter({f"{MACS}|{module}": work.macs, f"{_ACTIVATIONS}|{module}": work.activations})

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


def _covariance(inputs: list[Any], outputs: list[Any]) -> Work:
    return formulas.covariance(_shape(inputs[0]))


def _framed(place: int) -> Handle:
    """Transforms of frames; ``place`` is the argument that holds them transformed, or -1 for the result."""

    def handle(inputs: list[Any], outputs: list[Any]) -> Work:
        signal, frames = (inputs[0], outputs[0]) if place < 0 else (outputs[0], inputs[0])
        complex_signal = "Complex" in str(signal.type().scalarType())
        return formulas.framed_fourier(
            _shape(frames), _integer(inputs[1]), complex_signal=complex_signal, back=place >= 0
        )

    return handle


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
    **dict.fromkeys(("baddbmm", "addmv", "baddbmm_", "addmv_", "addmm_", "_addmm_activation"), 1),
}
KEPT = {
    "linear", "bmm", "addmm", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
    "rmatmul", "einsum", "tensordot", "addbmm", "scaled_dot_product_attention", "multi_head_attention_forward", "lstm",
    "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell", "chain_matmul",
    "linalg_multi_dot", "linalg_matrix_power", "matrix_power", "linalg_vecdot", "cov", "corrcoef", "stft", "istft",
    *(name.strip("_") for name in _PRODUCTS),
}  # fmt: skip


def _of_aten() -> dict[str, Handle]:
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
        **dict.fromkeys(("cov", "corrcoef"), _covariance),
        "stft": _framed(-1),
        "istft": _framed(0),
        **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _recurrent),
        **{f"fft_{name}": _fourier(name) for name in transforms},
    }


def handles() -> dict[str, Handle]:
    """By the names of nodes in a trace."""
    return {**{f"aten::{name}": handle for name, handle in _of_aten().items()}, **_registered()}


def _registered() -> dict[str, Handle]:
    def handle_of(formula: formulas.Formula) -> Handle:
        return lambda inputs, outputs: Work(*formula(_shapes(inputs), _shapes(outputs)))

    return {name: handle_of(formula) for name, formula in formulas.registered().items()}

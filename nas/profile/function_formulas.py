"""Work of functions that Python calls, by their names and arguments, for the counter thop."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from nas.profile import formulas
from nas.profile.by_torch import CONVOLUTIONS, UNDIVIDED, function_name, registered_work
from nas.profile.formulas import Work

__all__ = ["formula_by_name"]


def formula_by_name(func: Any) -> tuple[str, Callable[..., Work | None] | None]:
    """The name of a function and what counts it."""
    name = function_name(func)
    if "::" in name:
        formula = formulas.formula_of(name)
        return name, FORMULAS.get(name) if formula is None else registered_work(func, formula)
    if name == "__rmatmul__":
        return name, _reversed_product
    name = name.strip("_")
    return name, FORMULAS.get(name)


def _product(place: int, *names: str) -> Callable[..., Work]:
    """The last dimension of one factor is summed over."""

    def work_of(out: Tensor, /, *args: Any, **kwargs: Any) -> Work:
        factor = args[place] if len(args) > place else next(kwargs[name] for name in names if name in kwargs)
        return formulas.matrix_product(out.shape, factor.shape[-1]) if factor.dim() else formulas.NOTHING

    return work_of


def _reversed_product(out: Tensor, /, right: Tensor, left: Tensor) -> Work:
    return formulas.matrix_product(out.shape, left.shape[-1])


def _addbmm(out: Tensor, /, *args: Any, **kwargs: Any) -> Work:
    batch1 = args[1] if len(args) > 1 else kwargs["batch1"]
    return formulas.matrix_product(out.shape, batch1.shape[0] * batch1.shape[2])


def _attention(out: Tensor, /, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Work:
    return formulas.attention(query.shape, key.shape, value.shape)


_MULTI_HEAD = inspect.signature(F.multi_head_attention_forward)


def _multi_head(out: Any, /, *args: Any, **kwargs: Any) -> Work:
    given = _MULTI_HEAD.bind(*args, **kwargs)
    given.apply_defaults()
    a = given.arguments
    query, key, value = a["query"], a["key"], a["value"]
    batch = query.shape[1] if query.dim() == 3 else 1
    attended = key.shape[0] if a["static_k"] is None else a["static_k"].shape[1]
    attended += (a["bias_k"] is not None) + bool(a["add_zero_attn"])
    return formulas.multi_head_attention(
        batch, query.shape[0], key.shape[0], query.shape[-1], key.shape[-1], value.shape[-1],
        heads=a["num_heads"], attended=attended,
    )  # fmt: skip


def _tensordot(out: Tensor, /, a: Tensor, b: Tensor, *_: Any, **__: Any) -> Work:
    return formulas.tensordot(a.shape, b.shape, out.shape)


def _chain(out: Tensor, /, *args: Any, **_: Any) -> Work:
    """Matrices one by one or in a list."""
    return formulas.chain([x.shape for x in tree_leaves(args) if isinstance(x, Tensor)])


def _matrix_power(out: Tensor, /, input: Tensor, n: int, **_: Any) -> Work | None:
    return formulas.matrix_power(input.shape, n)


def _covariance(out: Tensor, /, input: Tensor, *_: Any, **__: Any) -> Work:
    return formulas.covariance(input.shape)


def _stft(out: Tensor, /, input: Tensor, n_fft: int, *_: Any, **__: Any) -> Work:
    frames = out.shape if out.is_complex() else out.shape[:-1]
    return formulas.framed_fourier(frames, n_fft, complex_signal=input.is_complex(), back=False)


def _istft(out: Tensor, /, input: Tensor, n_fft: int, *_: Any, **__: Any) -> Work:
    return formulas.framed_fourier(input.shape, n_fft, complex_signal=out.is_complex(), back=True)


def _einsum(out: Tensor, /, *args: Any) -> Work:
    """``(equation, tensors...)``, ``(equation, [tensors])`` or ``(tensor, indices, ..., [indices of the result])``."""
    if isinstance(args[0], str):
        equation, operands = args[0], list(args[1:])
        if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
            operands = list(operands[0])
    else:
        operands = [item for item in args if isinstance(item, Tensor)]
        terms = [_letters(item) for item in args if not isinstance(item, Tensor)]
        equation = ",".join(terms[: len(operands)])
        equation += f"->{terms[-1]}" if len(terms) > len(operands) else ""
    return formulas.einsum(equation, [x.shape for x in operands], _path(equation, operands))


def _letters(indices: Sequence[Any]) -> str:
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    return "".join("..." if index is Ellipsis else letters[index] for index in indices)


def _path(equation: str, operands: Sequence[Tensor]) -> list[int] | None:
    """The order of more than two factors: torch asks opt_einsum where it is installed."""
    backend: Any = torch.backends.opt_einsum
    if len(operands) <= 2 or not backend.enabled:
        return None
    optimiser = backend.get_opt_einsum()
    pairs = optimiser.contract_path(equation, *operands, optimize=backend.strategy)[0]
    return [place for pair in pairs for place in pair]


def _recurrent(out: Any, /, data: Tensor, second: Any, third: Any, *rest: Any) -> Work:
    """(input, hx, weights, ...), or for packed sequences (data, batch sizes, hx, weights, ...)."""
    packed = isinstance(rest[0], (list, tuple))
    rows = data.shape[0] if packed or data.dim() == 2 else data.shape[0] * data.shape[1]
    return formulas.recurrent(rows, [weight.shape for weight in (rest[0] if packed else third)])


def _recurrent_cell(out: Any, /, data: Tensor, hidden: Any, *weights: Any) -> Work:
    return formulas.recurrent(data.shape[0] if data.dim() == 2 else 1, [x.shape for x in weights[:2]])


def _fourier(name: str) -> Callable[..., Work | None]:
    def work_of(
        out: Tensor, /, input: Tensor, n: Any = None, dim: Any = None, norm: Any = None, s: Any = None
    ) -> Any:
        return formulas.fourier_call(
            name,
            input.shape,
            out.shape,
            complex_input=input.is_complex(),
            length=s if n is None else n,
            dims=dim,
        )

    return work_of


FORMULAS: dict[str, Callable[..., Work | None]] = {
    "linear": _product(0, "input"),
    **dict.fromkeys(
        ("matmul", "mm", "bmm", "mv", "dot", "vdot", "inner", "linalg_matmul"), _product(0, "input", "self")
    ),
    **dict.fromkeys(("addmm", "addmm_activation"), _product(1, "mat1")),
    "addmv": _product(1, "mat"),
    "baddbmm": _product(1, "batch1"),
    "addbmm": _addbmm,
    **CONVOLUTIONS,
    "scaled_dot_product_attention": _attention,
    "multi_head_attention_forward": _multi_head,
    "einsum": _einsum,
    "tensordot": _tensordot,
    **dict.fromkeys(("linalg_multi_dot", "chain_matmul"), _chain),
    **dict.fromkeys(("linalg_matrix_power", "matrix_power"), _matrix_power),
    **UNDIVIDED,
    **dict.fromkeys(("cov", "corrcoef"), _covariance),
    "stft": _stft,
    "istft": _istft,
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _recurrent),
    **dict.fromkeys(("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"), _recurrent_cell),
    **{f"fft_{name}": _fourier(name) for name in formulas.TRANSFORMS},
}

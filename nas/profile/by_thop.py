"""thop, with what its hooks cannot see: it looks at modules, not at the functions that their ``forward`` calls.

thop's own: the walk over the modules, the hooks, the formulas of ``nn.Linear`` and ``nn.Conv1d/2d/3d``, the sums, the
parameters of modules it has a rule for. Ours, through its ``custom_ops``: no work for norms, activations, pooling,
resizing (the convention excludes it), nor for transposed convolutions and recurrent layers, whose formulas in thop are
wrong or mixed with element-wise work. Those, and every product that a ``forward`` does by function (attention, matmul,
einsum, Fourier transforms, linear maps of modules that are no plain ``nn.Linear``), are noted as they are called from
Python and put on the ``total_ops`` of the innermost module at work, from where thop sums them up. A call made inside a
function that Python cannot look into, and that no formula covers, is named as uncounted.

Corrected afterwards: thop adds up a module once for each of its places in the model, and leaves out parameters that
lie in modules without a rule (class tokens, positions).
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from nas.errors import UserMistake
from nas.profile import formulas
from nas.profile.by_torch import (
    OUR_FORMULAS,
    UNDIVIDED,
    Recorder,
    function_name,
    operator_name,
    registered_work,
)
from nas.profile.formulas import Work
from nas.profile.skeleton import Scopes, plain_kernels
from nas.profile.tally import Tally

__all__ = ["count_by_thop"]

# What thop counts by itself: the function that such a module calls must not be counted again.
_THOPS_OWN: dict[type[nn.Module], str] = {
    nn.Linear: "linear",
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
}


def count_by_thop(model: nn.Module, inputs: Sequence[Tensor]) -> Tally:
    """Count one call of ``model``, which is run as it is; see ``nas.profile``.

    Raises:
        UserMistake: thop is not installed, or cannot be imported.
    """
    try:
        thop = importlib.import_module("thop.profile")
    except ImportError as missing:  # on Python 3.12 it also wants distutils, which setuptools brings
        raise UserMistake(
            f"the counter thop cannot be imported ({missing}); pip install thop setuptools, or leave it out"
        ) from missing
    tally = Tally()
    scopes = Scopes(model)
    recorder = _Recorder()
    root = _Root(model)
    with torch.no_grad(), plain_kernels(), scopes, recorder, _Functions(scopes, recorder, tally):
        total, params, layers = thop.profile(
            root, tuple(inputs), custom_ops=_custom_ops(thop), verbose=False, ret_layer_info=True
        )
    for name, macs in _own_work(root, int(total), layers).items():
        tally.add(name.removeprefix("model").removeprefix("."), Work(macs, 0))
    tally.params = _parameters(root, int(params), layers)
    tally.uncounted = recorder.uncounted
    return tally


class _Root(nn.Module):
    """thop takes a model's own layer for no layer at all when it is the model."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Any:
        return self.model(*inputs)


def _custom_ops(thop: Any) -> dict[type[nn.Module], Callable[..., None]]:
    rules: dict[type[nn.Module], Callable[..., None]] = {}
    for kind in thop.register_hooks:
        if issubclass(kind, nn.Linear):
            continue
        if kind in _THOPS_OWN:
            rules[kind] = _convolution(thop.count_convNd)
        elif kind is not nn.Sequential:
            rules[kind] = thop.zero_ops
    return rules


def _convolution(theirs: Callable[..., None]) -> Callable[..., None]:
    """thop's rule reads the channels off dimension 1 of the first positional argument: not there without a batch."""

    def rule(module: Any, inputs: Any, output: Tensor) -> None:
        if inputs and inputs[0].dim() == module.weight.dim():
            theirs(module, inputs, output)
        else:
            module.total_ops += formulas.convolution(output.shape, module.weight.shape).macs

    return rule


def _own_work(root: nn.Module, total: int, layers: Mapping[str, Any]) -> dict[str, int]:
    """Own MACs of each module by its first name.

    A module in several places has as many hooks, each of which counts its calls, and is added up in each place.
    """
    names = {module: name for name, module in root.named_modules()}
    found: dict[nn.Module, list[int]] = {}
    for module, _, macs, _ in _layers(root, layers):
        found.setdefault(module, []).append(macs)
    if total != sum(map(sum, found.values())):
        raise RuntimeError(f"thop's sum {total} is not that of its layers")
    return {
        names[module]: macs[0] // (len(macs) if type(module) in _THOPS_OWN else 1)
        for module, macs in found.items()
        if macs[0]
    }


def _layers(module: nn.Module, layers: Mapping[str, Any]) -> Iterator[tuple[nn.Module, bool, int, int]]:
    """Module, whether thop has a rule for it and looked no deeper, own MACs, parameters; once for each place."""
    for name, child in module.named_children():
        macs, params, below = layers[name]
        yield child, not below, int(macs) - sum(int(part) for part, _, _ in below.values()), int(params)
        yield from _layers(child, below) if below else ()


def _parameters(root: nn.Module, counted: int, layers: Mapping[str, Any]) -> int:
    """thop's figure, less what it counted more than once, with what it left out."""
    seen: dict[int, int] = {}
    again = 0
    for module, is_leaf, _, params in _layers(root, layers):
        for parameter in module.parameters() if is_leaf and params else ():
            again += parameter.numel() if id(parameter) in seen else 0
            seen[id(parameter)] = parameter.numel()
    rest = {id(parameter): parameter.numel() for parameter in root.parameters() if id(parameter) not in seen}
    return counted - again + sum(rest.values())


# -- functions ---------------------------------------------------------------------------------------------------------


class _Recorder(Recorder):
    """Also notes products that reach a device from no function with a formula."""

    def __init__(self) -> None:
        super().__init__()
        self._claims = 0
        self._function: str | None = None

    @contextlib.contextmanager
    def claim(self) -> Iterator[None]:
        """What runs within is counted by a formula."""
        self._claims += 1
        try:
            yield
        finally:
            self._claims -= 1

    @contextlib.contextmanager
    def unclaimed(self, function: str) -> Iterator[None]:
        """What runs within is called from ``function``, of which nothing is known."""
        outer, self._function = self._function, function
        try:
            yield
        finally:
            self._function = outer

    def note(self, func: Any) -> None:
        if self._claims:
            return
        packet = getattr(func, "overloadpacket", func)
        if packet in flop_registry or packet in OUR_FORMULAS:
            self.uncounted.add(self._function or operator_name(func)[1])
        else:
            super().note(func)


class _Functions(TorchFunctionMode):
    """Counts the products among the functions that Python calls, for the innermost module at work."""

    def __init__(self, scopes: Scopes, recorder: _Recorder, tally: Tally):
        super().__init__()
        self._scopes = scopes
        self._recorder = recorder
        self._tally = tally

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, work_of = _formula(func)
        if work_of is None:
            with self._recorder.unclaimed(name):
                return func(*args, **kwargs)
        with self._recorder.claim():
            result = func(*args, **kwargs)
        work = work_of(result, *args, **kwargs)
        if work is None:
            self._recorder.uncounted.add(name)
            return result
        module: Any = self._scopes.module
        theirs = _THOPS_OWN.get(type(module))
        if theirs is None:
            module.total_ops += work.macs
        by_themselves = theirs is None or theirs == name
        self._tally.add(self._scopes.name, Work(0 if by_themselves else work.macs, work.activations))
        return result


def _formula(func: Any) -> tuple[str, Callable[..., Work | None] | None]:
    """The name of a function and what counts it."""
    name = function_name(func)
    if "::" in name:
        formula = formulas.formula_of(name)
        return name, _FORMULAS.get(name) if formula is None else registered_work(func, formula)
    if name == "__rmatmul__":
        return name, _reversed_product
    name = name.strip("_")
    return name, _FORMULAS.get(name)


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


def _convolved(out: Tensor, /, input: Tensor, weight: Tensor, *_: Any, **__: Any) -> Work:
    return formulas.convolution(out.shape, weight.shape)


def _transposed(out: Tensor, /, input: Tensor, weight: Tensor, *_: Any, **__: Any) -> Work:
    return formulas.transposed_convolution(input.shape, out.shape, weight.shape)


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


_FORMULAS: dict[str, Callable[..., Work | None]] = {
    "linear": _product(0, "input"),
    **dict.fromkeys(
        ("matmul", "mm", "bmm", "mv", "dot", "vdot", "inner", "linalg_matmul"), _product(0, "input", "self")
    ),
    "addmm": _product(1, "mat1"),
    "addmv": _product(1, "mat"),
    "baddbmm": _product(1, "batch1"),
    "addbmm": _addbmm,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolved),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _transposed),
    "scaled_dot_product_attention": _attention,
    "multi_head_attention_forward": _multi_head,
    "einsum": _einsum,
    "tensordot": _tensordot,
    **dict.fromkeys(("linalg_multi_dot", "chain_matmul"), _chain),
    **dict.fromkeys(("linalg_matrix_power", "matrix_power"), _matrix_power),
    **UNDIVIDED,
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _recurrent),
    **dict.fromkeys(("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"), _recurrent_cell),
    **{f"fft_{name}": _fourier(name) for name in formulas.TRANSFORMS},
}

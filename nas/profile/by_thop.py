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
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import TransformType
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import flop_registry

from nas.profile import formulas
from nas.profile.by_torch import OUR_FORMULAS, Recorder, operator_name
from nas.profile.formulas import Work
from nas.profile.function_formulas import formula_by_name
from nas.profile.skeleton import Scopes, plain_kernels
from nas.profile.tally import MissingCounter, Tally

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
        MissingCounter: thop is not installed, or cannot be imported.
    """
    try:
        thop = importlib.import_module("thop.profile")
    except ImportError as missing:  # on Python 3.12 it also wants distutils, which setuptools brings
        raise MissingCounter("thop", missing, "thop setuptools") from missing
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
        self._claimed: Any = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Operators of a torch.jit.script function are no calls from Python, but our own call below is one.
        self._claimed = None
        result = func(*args, **(kwargs or {}))
        if self._claimed is not func:
            self.note(func)
        return result

    @contextlib.contextmanager
    def claim(self, func: Any) -> Iterator[None]:
        """What runs within is counted by the formula of ``func``."""
        self._claims += 1
        self._claimed = func
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
        name, work_of = formula_by_name(func)
        if work_of is not None and _in_vmap():
            # Sizes are those of one sample here, and who knows of how many.
            self._recorder.uncounted.add("vmap")
            with self._recorder.claim(func):
                return func(*args, **kwargs)
        if work_of is None:
            with self._recorder.unclaimed(name):
                return func(*args, **kwargs)
        with self._recorder.claim(func):
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


def _in_vmap() -> bool:
    return any(
        level.key() == TransformType.Vmap for level in torch._C._functorch.get_interpreter_stack() or ()
    )

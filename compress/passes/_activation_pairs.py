"""Which two layers of a model become one when the activation between them is the identity; found by tracing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from compress.passes._reparameterize_graph import twin_of
from compress.structure import StructureError
from nas.errors import first_line
from spaces.layers.series_activation import SeriesActivation
from spaces.vision._vanillanet_merging import CONVOLUTIONS, NORMS, why_not_foldable, why_not_mergeable

__all__ = ["Found", "Pair", "find_pairs", "is_identity", "run"]

_LAYERS = (nn.Linear, *CONVOLUTIONS)
_ELEMENTWISE: tuple[type[nn.Module], ...] = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.SELU, nn.CELU, nn.Sigmoid),
    *(nn.LogSigmoid, nn.Tanh, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Softplus, nn.Softsign),
    *(nn.Softshrink, nn.Hardshrink, nn.Tanhshrink),
)
_TRANSPARENT = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_FUNCTIONS = frozenset(
    (
        "relu",
        "relu_",
        "relu6",
        "leaky_relu",
        "gelu",
        "silu",
        "mish",
        "elu",
        "tanh",
        "sigmoid",
        "hardswish",
        "softplus",
    )
)


@dataclass(frozen=True)
class Pair:
    """``second(act(norm(first(x))))``, nothing else reads what is in between.

    Args:
        act: name of the activation, by which the pair is called.
        first, second: names of the layers.
        norm: name of the batch norm behind the first, or None.
        last_norm: name of the batch norm behind the second that nothing else than it feeds, or None.
        positions: how often the first and the second multiply by their weight for the example.
    """

    act: str
    first: str
    second: str
    norm: str | None
    last_norm: str | None
    positions: tuple[int, int]


@dataclass(frozen=True)
class Found:
    """Pairs in the order in which they run, and why the other activations are in none, by name."""

    pairs: tuple[Pair, ...]
    refused: dict[str, str]


class _No(Exception):
    """Why an activation is in no pair."""


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Activations of timm too are one thing."""
        return (
            is_activation(m)
            or isinstance(m, SeriesActivation)
            or super().is_leaf_module(m, module_qualified_name)
        )


def is_activation(module: nn.Module) -> bool:
    """Whether it is one of PyTorch's or timm's activations that look at each number alone and have no weights."""
    cls = type(module)
    timm = cls.__module__.startswith("timm.layers.activations")
    return cls in _ELEMENTWISE or (timm and not list(module.parameters()))


def is_identity(act: nn.Module) -> bool:
    """Whether the activation does nothing: a leaky ReLU of slope 1, as of a VanillaNet whose deep training is done."""
    return isinstance(act, nn.LeakyReLU) and act.negative_slope == 1


def run(model: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
    """The outputs (the first of several), without gradients."""
    with torch.no_grad():
        outputs = model(*inputs)
    while isinstance(outputs, (tuple, list)):
        outputs = outputs[0]
    if not isinstance(outputs, Tensor):
        raise StructureError(
            f"activation_pruning: {type(model).__name__} gives a {type(outputs).__name__}, no tensor"
        )
    return outputs


def find_pairs(model: nn.Module, example: Sequence[Tensor]) -> Found:
    """All activations between two layers that would merge exactly, by torch.fx and one run of the example.

    Parts of the model that torch.fx cannot follow are looked at from inside: their children are traced alone.

    Args:
        model: in evaluation mode; not changed.
        example: inputs on the model's device.

    Raises:
        StructureError: the model does not run.
    """
    search = _Search(model, example)
    pairs: list[Pair] = []
    refused: dict[str, str] = {}
    for prefix, graph in _graphs(twin_of(model), ""):
        for node in graph.nodes:
            name = _name(prefix, node)
            if node.op == "call_module" and is_activation(search.modules[name]):
                search.seen.add(name)
                try:
                    pairs.append(search.pair(prefix, graph, node))
                except _No as reason:
                    refused.setdefault(name, str(reason))
            elif node.op in ("call_function", "call_method") and _function(node) in _FUNCTIONS:
                refused[f"{prefix or 'forward'}:{node.name}"] = (
                    f"{_function(node)} is a function in forward; make it a module, such as self.act = nn.ReLU()"
                )
    for name, module in search.modules.items():
        if is_activation(module) and name not in search.seen:
            refused[name] = "in a part of the model that torch.fx cannot follow"
    once = [pair for pair in pairs if pair.act not in refused]
    return Found(tuple(once), refused)


class _Search:
    def __init__(self, model: nn.Module, example: Sequence[Tensor]):
        # With all names of a module that has several: a part that is traced alone may know another one.
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.seen: set[str] = set()
        self._uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
        self._calls: Counter[nn.Module] = Counter()
        self._shapes: dict[nn.Module, torch.Size] = {}
        leaves = {module for module in self.modules.values() if not any(module.children())}
        self._hooked = {module for module in leaves if module._forward_hooks or module._forward_pre_hooks}
        hooks = [module.register_forward_hook(self._note) for module in leaves]
        try:
            run(model, example)
        except StructureError:
            raise
        except Exception as error:  # the model is anybody's
            raise StructureError(
                f"activation_pruning: {type(model).__name__} does not run on the example ({type(error).__name__}: "
                f"{first_line(error, 150)})"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()

    def _note(self, module: nn.Module, inputs: object, output: object) -> None:
        self._calls[module] += 1
        if isinstance(output, Tensor):
            self._shapes[module] = output.shape

    def pair(self, prefix: str, graph: fx.Graph, node: fx.Node) -> Pair:
        """The pair around an activation. Raises _No."""
        act = _name(prefix, node)
        before = self._back(prefix, node)
        norm = None
        if self._is(prefix, before, NORMS):
            norm = _name(prefix, before)
            before = self._back(prefix, before)
        if not self._is(prefix, before, _LAYERS):
            raise _No(f"{self._what(prefix, before)} comes before it, no linear layer or convolution")
        after = self._onward(prefix, node)
        if not self._is(prefix, after, _LAYERS):
            raise _No(f"{self._what(prefix, after)} follows it, no linear layer or convolution")
        first, second = _name(prefix, before), _name(prefix, after)
        names = [first, act, second, *([norm] if norm else [])]
        for name in names:
            self._alone(name)
        self._unread(prefix, graph, names)
        reason = norm and why_not_foldable(self.modules[norm])
        reason = reason or why_not_mergeable(
            self.modules[first], self.modules[second], biased=norm is not None
        )
        if reason:
            raise _No(reason)
        if norm and not self._norm_fits(first):
            raise _No(f"{norm} does not normalise the features of {first}")
        last = self._last_norm(prefix, graph, after)
        return Pair(act, first, second, norm, last, (self._positions(first), self._positions(second)))

    def _last_norm(self, prefix: str, graph: fx.Graph, layer: fx.Node) -> str | None:
        users = list(layer.users)
        if len(users) != 1 or not self._is(prefix, users[0], NORMS):
            return None
        name = _name(prefix, users[0])
        try:
            self._alone(name)
            self._unread(prefix, graph, [name])
        except _No:
            return None
        foldable = why_not_foldable(self.modules[name]) is None and self._norm_fits(_name(prefix, layer))
        return name if foldable else None

    def _norm_fits(self, layer: str) -> bool:
        # A batch norm takes dimension 1 for the features, a linear layer the last one.
        return not isinstance(self.modules[layer], nn.Linear) or len(self._shapes[self.modules[layer]]) == 2

    def _positions(self, layer: str) -> int:
        module: Any = self.modules[layer]
        return math.prod(self._shapes[module]) // len(module.weight)

    def _back(self, prefix: str, node: fx.Node) -> fx.Node:
        while True:
            if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
                raise _No("it is called with more than a tensor")
            node = node.args[0]
            if len(node.users) != 1:
                raise _No(f"what {self._what(prefix, node)} gives is read elsewhere too")
            if not self._is(prefix, node, _TRANSPARENT):
                return node

    def _onward(self, prefix: str, node: fx.Node) -> fx.Node:
        while True:
            if len(node.users) != 1:
                raise _No(f"what {self._what(prefix, node)} gives is read elsewhere too")
            [node] = node.users
            if not self._is(prefix, node, _TRANSPARENT):
                return node

    def _alone(self, name: str) -> None:
        module = self.modules[name]
        if self._calls[module] != 1:
            raise _No(
                f"{name} runs {self._calls[module]} times in one call of the model, which is shared work"
            )
        if module in self._hooked:
            raise _No(f"{name} has hooks")
        if any(self._uses[id(parameter)] != 1 for parameter in module.parameters()):
            raise _No(f"{name} shares its weights with another layer")

    def _unread(self, prefix: str, graph: fx.Graph, names: Sequence[str]) -> None:
        for node in graph.nodes:
            if node.op == "get_attr" and _name(prefix, node).rpartition(".")[0] in names:
                raise _No(f"{_name(prefix, node)} is read in forward")

    def _is(self, prefix: str, node: fx.Node, kinds: tuple[type[nn.Module], ...]) -> bool:
        return node.op == "call_module" and type(self.modules[_name(prefix, node)]) in kinds

    def _what(self, prefix: str, node: fx.Node) -> str:
        if node.op == "call_module":
            name = _name(prefix, node)
            return f"{name} ({type(self.modules[name]).__name__})"
        known = {"placeholder": "the input", "output": "the output", "get_attr": "a tensor of the model"}
        return known.get(node.op) or f"{_function(node)}"


def _graphs(module: nn.Module, prefix: str) -> Iterator[tuple[str, fx.Graph]]:
    """The module's graph, or those of its children where it cannot be traced."""
    if not any(module.children()):
        return
    try:
        graph = _Tracer().trace(module)
    except Exception:  # whatever a forward that is run with stand-ins for tensors can raise
        for name, child in module.named_children():
            yield from _graphs(child, f"{prefix}.{name}" if prefix else name)
        return
    yield prefix, graph


def _name(prefix: str, node: fx.Node) -> str:
    return f"{prefix}.{node.target}" if prefix else str(node.target)


def _function(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", node.target))

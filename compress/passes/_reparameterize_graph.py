"""What torch.fx can prove about which layer feeds which, in the whole model or in the parts that can be traced."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from compress.passes._reparameterize_algebra import Branch, is_norm

__all__ = ["Calls", "Chain", "branches_of", "follows", "scopes", "twin_of"]

_PASSENGERS = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_ADDS = (operator.add, operator.iadd, torch.add)
_ACTIVATIONS: Mapping[Any, type[nn.Module]] = {
    functional.relu: nn.ReLU,
    torch.relu: nn.ReLU,
    functional.silu: nn.SiLU,
    functional.relu6: nn.ReLU6,
    functional.hardswish: nn.Hardswish,
    torch.sigmoid: nn.Sigmoid,
    torch.tanh: nn.Tanh,
}


class Calls:
    """How often each module is called in one run of the example, and with outputs of how many dimensions."""

    def __init__(self, model: nn.Module, example: tuple[Tensor, ...]):
        self._found: dict[nn.Module, list[int]] = {}
        handles = [module.register_forward_hook(self._note) for module in model.modules()]
        try:
            with torch.no_grad():
                model(*example)
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._found.setdefault(module, []).append(output.dim() if isinstance(output, Tensor) else -1)

    def times(self, module: nn.Module) -> int:
        """Number of calls."""
        return len(self._found.get(module, ()))

    def dims(self, module: nn.Module) -> set[int]:
        """Dimensions of its outputs; -1 for no tensor."""
        return set(self._found.get(module, ()))


@dataclass(frozen=True)
class Scope:
    """A traced module: its name in the model ("" for the model) and its graph."""

    name: str
    graph: fx.Graph

    def full(self, target: Any) -> str:
        """Name in the model."""
        return f"{self.name}.{target}" if self.name else str(target)


@dataclass(frozen=True)
class Chain:
    """A module that is nothing but ``after(sum of branches(before(x)))``, by what it is made of."""

    before: tuple[nn.Module, ...]
    branches: tuple[Branch, ...]
    after: tuple[nn.Module, ...]


class _Tracer(fx.Tracer):
    def __init__(self, closed: set[nn.Module]):
        super().__init__()
        self._closed = closed

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if type(m) in (nn.Sequential, nn.ModuleList):
            return m in self._closed
        return m in self._closed or is_norm(m) or super().is_leaf_module(m, module_qualified_name)


def twin_of(module: nn.Module) -> nn.Module:
    """A copy with the same tensors, to be traced: tracing runs a model's own code, which may leave things behind."""
    return copy.deepcopy(module, {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())})


def scopes(model: nn.Module) -> Iterator[Scope]:
    """The largest parts of the model that can be traced, each with what lies within; untraceable ones are leaves of
    their parent where that can be traced around them."""
    yield from _scopes(twin_of(model), "", set())


def _scopes(module: nn.Module, name: str, closed: set[nn.Module]) -> list[Scope]:
    graph = _traced(module, closed)
    if graph is not None:
        return [Scope(name, graph)]
    found: list[Scope] = []
    within: list[Scope] = []
    for part, child in module.named_children():
        path = f"{name}.{part}" if name else part
        inner = _scopes(child, path, closed)
        found += inner
        if not any(one.name == path for one in inner):
            closed.add(child)
            within += inner
    graph = _traced(module, closed)
    return found if graph is None else [Scope(name, graph), *within]


def _traced(module: nn.Module, closed: set[nn.Module]) -> fx.Graph | None:
    if not list(module.children()):
        return None
    try:
        return _Tracer(closed).trace(module)
    except (
        Exception
    ):  # the model's own code runs on stand-ins: whatever it raises means that it cannot be traced
        return None


def follows(model: nn.Module, scope: Scope, calls: Calls) -> Iterator[tuple[str, str]]:
    """Names of modules (first, second) where all that the second ever gets is what the first gives, and nothing else
    uses that."""
    owner = model.get_submodule(scope.name)
    seen: dict[str, int] = {}
    read: set[str] = set()
    for node in scope.graph.nodes:
        if node.op == "call_module":
            seen[node.target] = seen.get(node.target, 0) + 1
        elif node.op == "get_attr":
            read.add(str(node.target).rpartition(".")[0])

    def proven(node: fx.Node) -> bool:
        target = str(node.target)
        if node.op != "call_module" or seen[target] > 1 or target in read:
            return False
        return calls.times(owner.get_submodule(target)) == calls.times(owner) > 0

    for node in scope.graph.nodes:
        if not proven(node) or _input(node) is None:
            continue
        source = _source(_input(node), owner)
        if source is not None and proven(source):
            yield scope.full(source.target), scope.full(node.target)


def _source(node: fx.Node | None, owner: nn.Module) -> fx.Node | None:
    """What comes out of ``node``, seen through modules that do nothing in evaluation; None when others use it too."""
    while node is not None:
        if len(node.users) != 1:
            return None
        if node.op != "call_module" or not isinstance(owner.get_submodule(str(node.target)), _PASSENGERS):
            return node
        node = _input(node)
    return None


def _input(node: fx.Node) -> fx.Node | None:
    if len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], fx.Node):
        return node.args[0]
    return None


def branches_of(module: nn.Module) -> Chain | None:
    """The module as a chain around one sum, or None where it is not proven to be one."""
    graph = _traced(twin_of(module), set())
    if graph is None:
        return None
    nodes = list(graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    named = [node.target for node in nodes if node.op == "call_module"]
    if len(inputs) != 1 or len(named) != len(set(named)) or any(node.op == "get_attr" for node in nodes):
        return None
    after: list[nn.Module] = []
    node: Any = nodes[-1].args[0]
    while isinstance(node, fx.Node) and not _is_sum(node):
        step = _step(node, module)
        if step is None or len(node.users) != 1:
            return None
        after.insert(0, step[0])
        node = step[1]
    if not isinstance(node, fx.Node):
        return None
    found = [_branch(term, module) for term in _terms(node)]
    roots = {root for _, root in found}
    if len(found) < 2 or len(roots) != 1 or None in roots:
        return None
    before = _front(roots.pop(), inputs[0], module)
    if before is None:
        return None
    return Chain(tuple(before), tuple(branch for branch, _ in found), tuple(after))


def _is_sum(node: fx.Node) -> bool:
    added = node.op == "call_function" and node.target in _ADDS
    return (added or (node.op == "call_method" and node.target in ("add", "add_"))) and not node.kwargs


def _terms(node: Any) -> list[Any]:
    if isinstance(node, fx.Node) and _is_sum(node) and len(node.args) == 2:
        return [
            term for one in node.args for term in _terms(one) if not (term == 0 and isinstance(term, int))
        ]
    return [node]


def _branch(term: Any, module: nn.Module) -> tuple[Branch, fx.Node | None]:
    """The one layer of a branch, and where it starts."""
    layers: list[nn.Module] = []
    node = term
    while isinstance(node, fx.Node) and node.op == "call_module" and _input(node) is not None:
        own = module.get_submodule(str(node.target))
        single = len(node.users) == 1
        if not isinstance(own, _PASSENGERS):
            if layers or not single:
                break
            layers.append(own)
        elif not single:
            break
        node = _input(node)
    return (layers[0] if layers else None), node if isinstance(node, fx.Node) else None


def _front(root: fx.Node | None, start: fx.Node, module: nn.Module) -> list[nn.Module] | None:
    before: list[nn.Module] = []
    node: Any = root
    while node is not start:
        step = _step(node, module)
        # The root itself feeds all branches; what lies before it feeds the next alone.
        if step is None or (node is not root and len(node.users) != 1):
            return None
        before.insert(0, step[0])
        node = step[1]
    return before if start is root or len(start.users) == 1 else None


def _step(node: Any, module: nn.Module) -> tuple[nn.Module, fx.Node] | None:
    """A module that does what the node does, and the node's only input."""
    if node is None or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    if node.op == "call_module" and _input(node) is not None:
        return module.get_submodule(str(node.target)), node.args[0]
    plain = len(node.args) == 1 and not set(node.kwargs) - {"inplace"}
    if node.op == "call_function" and node.target in _ACTIVATIONS and plain:
        return _ACTIVATIONS[node.target](), node.args[0]
    if node.op == "call_method" and node.target in ("relu", "relu_", "sigmoid", "tanh") and plain:
        made = {"relu": nn.ReLU, "relu_": nn.ReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh}[str(node.target)]
        return made(), node.args[0]
    return None

"""A slimmed model as JSON and tensors: how it differs from one that can be built by name.

The JSON names where the model came from (timm's name, a space's architecture, a class) and, module by module, what is
different: sizes, shapes, modules of another class. Loading builds the base, makes the differences and puts the tensors
in; no code of a pass is needed, nothing is unpickled, and classes come from torch.nn, timm and spaces alone unless
the caller trusts another package.
"""

from __future__ import annotations

import enum
import importlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compress.structure import StructureError
from nas.errors import UserMistake

__all__ = ["TRUSTED", "describe", "rebuild", "tensors_of"]

TRUSTED = ("torch.nn", "timm", "spaces")
"""Packages whose modules a description may name."""

_INTERNAL = frozenset(vars(nn.Module()))
_RECURRENT = frozenset({"_flat_weights", "_flat_weight_refs"})  # follow from the parameters
_HOOKS = [name for name in _INTERNAL if name.endswith("_hooks")]

# The smallest thing a constructor makes: sizes are attributes and shapes, which are set afterwards.
_SMALLEST: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(("Linear", "Embedding"), (1, 1)),
    **dict.fromkeys(("Conv1d", "Conv2d", "ConvTranspose2d"), (1, 1, 1)),
    **dict.fromkeys(("LayerNorm", "LayerNorm2d", "RMSNorm", "RmsNorm", "BatchNorm1d", "BatchNorm2d"), (1,)),
    **dict.fromkeys(
        ("GELU", "ReLU", "ReLU6", "SiLU", "Sigmoid", "Tanh", "Hardswish", "LeakyReLU", "ELU", "Softplus"), ()
    ),
    **dict.fromkeys(
        ("Identity", "Dropout", "DropPath", "PatchDropout", "Sequential", "ModuleList", "Flatten", "Softmax"),
        (),
    ),
    **dict.fromkeys(("AvgPool2d", "MaxPool2d", "AdaptiveAvgPool2d", "ZeroPad2d", "LayerScale", "Mlp"), (1,)),
    "GroupNorm": (1, 1),
    "Attention": (1, 1),
}


def describe(model: nn.Module, base: nn.Module) -> dict[str, Any]:
    """JSON of how ``model`` differs from ``base``; shapes and classes, no values.

    Raises:
        StructureError: a part that cannot be told in JSON (a hook, a replaced method, an unknown class), by name.
    """
    return _Describer(base).module(model, base, "")


def rebuild(description: Mapping[str, Any], base: nn.Module, trust: Iterable[str] = ()) -> nn.Module:
    """``base`` turned (in place) into the described model; changed tensors are empty until they are loaded.

    Args:
        trust: further packages whose classes may be used.

    Raises:
        UserMistake: the description names a class that is not trusted, or does not fit the base.
    """
    modules = dict(base.named_modules())
    made = _Builder(modules, (*TRUSTED, *trust)).module(description, base, "")
    return made


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by name, those that a state dict leaves out too."""
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    found.update(model.named_buffers(remove_duplicate=False))
    return found


def trusted_class(text: str, trusted: Iterable[str]) -> type[nn.Module]:
    """The module class ``package.module:Name``. Raises UserMistake if it is not trusted or no such class."""
    module_name, _, name = text.partition(":")
    if not any(module_name == package or module_name.startswith(package + ".") for package in trusted):
        raise UserMistake(
            f"the saved model uses {text!r}; if you trust that package, load with trust=[{module_name.split('.')[0]!r}]"
        )
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError):
        raise UserMistake(f"the saved model uses {text!r}, which cannot be imported here") from None
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise UserMistake(f"the saved model uses {text!r}, which is no torch.nn.Module")
    return found


class _Describer:
    def __init__(self, base: nn.Module):
        self._named = dict(base.named_modules())

    def module(self, module: nn.Module, template: nn.Module | None, path: str) -> dict[str, Any]:
        """What ``module`` has that ``template`` has not; ``{}`` when nothing."""
        _refuse_hooks(module, path)
        node: dict[str, Any] = {}
        if template is None or type(template) is not type(module):
            node, template = self._made(module, path)
        # Tensors first: those of another package come with attributes that say less about why.
        if tensors := _tensors(module, template):
            node["tensors"] = tensors
        if not callable(getattr(module, "config", None)):
            node.update(_attributes(module, template, path))
        node.update(self._children(module, template, path))
        return node

    def _children(self, module: nn.Module, template: nn.Module, path: str) -> dict[str, Any]:
        node: dict[str, Any] = {}
        own, given = dict(module._modules), dict(template._modules)
        if list(own) != list(given) or [x is None for x in own.values()] != [
            x is None for x in given.values()
        ]:
            node["order"] = {name: child is not None for name, child in own.items()}
        different = {
            name: found
            for name, child in own.items()
            if child is not None
            and ((found := self.module(child, given.get(name), _join(path, name))) or name not in given)
        }
        if different:
            node["children"] = different
        return node

    def _made(self, module: nn.Module, path: str) -> tuple[dict[str, Any], nn.Module]:
        """How to come by a module of this class: its own config, the smallest of its kind, or one of the base."""
        cls = type(module)
        text = f"{cls.__module__}:{cls.__qualname__}"
        ours = cls.__module__.startswith("spaces.")
        config = getattr(module, "config", None)
        if ours and callable(config):
            return {"class": text, "config": config()}, cls(**config())
        if cls.__module__.startswith(("torch.nn.modules", "timm.layers")) and cls.__name__ in _SMALLEST:
            return {"class": text}, cls(*_SMALLEST[cls.__name__])
        same = [name for name, other in self._named.items() if type(other) is cls]
        if same:
            name = path if path in same else same[0]
            return {"like": name}, self._named[name]
        raise StructureError(
            f"{path or 'the model'}: a {text} cannot be described; modules that a pass puts in live in spaces.layers "
            "and have config()"
        )


class _Builder:
    def __init__(self, named: Mapping[str, nn.Module], trusted: tuple[str, ...]):
        # Copies, because the base is changed while others are still to be made like its parts.
        import copy

        self._copy = copy.deepcopy
        self._named = {name: copy.deepcopy(module) if name else module for name, module in named.items()}
        self._trusted = trusted

    def module(self, node: Mapping[str, Any], template: nn.Module | None, path: str) -> nn.Module:
        made = self._start(node, template, path)
        for name in node.get("unset", ()):
            delattr(made, name)
        for name, facts in node.get("tensors", {}).items():
            _put_tensor(made, name, facts)
        children = node.get("children", {})
        if "order" in node:
            before = dict(made._modules)
            made._modules.clear()
            for name, present in node["order"].items():
                made._modules[name] = before.get(name) if present else None
        for name, child in children.items():
            made._modules[name] = self.module(child, made._modules.get(name), _join(path, name))
        for name, child in made._modules.items():
            if child is None and node.get("order", {}).get(name):
                raise UserMistake(f"the saved model's {_join(path, name)} is not described")
        # Last: an attribute may have the name of a tensor or module of the base (a class token of None).
        for name, value in node.get("set", {}).items():
            setattr(made, name, _from_json(value, getattr(made, name, None)))
        return made

    def _start(self, node: Mapping[str, Any], template: nn.Module | None, path: str) -> nn.Module:
        if "class" in node:
            cls = trusted_class(str(node["class"]), self._trusted)
            arguments = () if "config" in node else _SMALLEST.get(cls.__name__, ())
            try:
                return cls(*arguments, **node.get("config", {}))
            except TypeError as error:
                raise UserMistake(
                    f"the saved model's {path}: {cls.__name__} cannot be made: {error}"
                ) from None
        if "like" in node:
            if node["like"] not in self._named:
                raise UserMistake(
                    f"the saved model's {path} is like {node['like']!r}, which its base does not have"
                )
            return self._copy(self._named[node["like"]])
        if template is None:
            raise UserMistake(f"the saved model's {path} is not described")
        return template


def _attributes(module: nn.Module, template: nn.Module, path: str) -> dict[str, Any]:
    node: dict[str, Any] = {}
    hidden = _INTERNAL | (_RECURRENT if isinstance(module, nn.RNNBase) else frozenset())
    own = {name: value for name, value in vars(module).items() if name not in hidden}
    given = {name: value for name, value in vars(template).items() if name not in hidden}
    changed = {}
    for name, value in own.items():
        if name in given and (_same(value, given[name]) or _cached(value, given[name])):
            continue
        changed[name] = _to_json(value, _join(path, name))
    if changed:
        node["set"] = changed
    if gone := [name for name in given if name not in own]:
        node["unset"] = gone
    return node


def _tensors(module: nn.Module, template: nn.Module) -> dict[str, Any]:
    """Direct parameters and buffers of another shape or type than the template's; None for those that are None."""
    own, given = _facts(module), _facts(template)
    changed = {name: facts for name, facts in own.items() if name not in given or given[name] != facts}
    return {**changed, **{name: "gone" for name in given if name not in own}}


def _facts(module: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind, tensors in (("parameter", module._parameters), ("buffer", module._buffers)):
        for name, tensor in tensors.items():
            lasting = name not in module._non_persistent_buffers_set
            if tensor is not None and type(tensor.data) is not Tensor:
                raise StructureError(
                    f"{name} is a {type(tensor.data).__name__}, a tensor of another package, which cannot be saved; "
                    "save the model from before that pass"
                )
            shape = None if tensor is None else [*tensor.shape]
            dtype = None if tensor is None else str(tensor.dtype).removeprefix("torch.")
            found[name] = [kind, shape, dtype, lasting]
    return found


def _put_tensor(module: nn.Module, name: str, facts: Any) -> None:
    for tensors in (module._parameters, module._buffers):
        tensors.pop(name, None)
    if facts == "gone":
        return
    kind, shape, dtype, lasting = facts
    empty = None
    if shape is not None:
        wanted = getattr(torch, str(dtype), None)
        if not isinstance(wanted, torch.dtype):
            raise UserMistake(f"the saved model's {name} has unknown type {dtype!r}")
        if not all(isinstance(size, int) and size >= 0 for size in shape):
            raise UserMistake(f"the saved model's {name} has the shape {shape}, which no tensor has")
        empty = torch.empty(shape, dtype=wanted)
    if kind == "parameter":
        may_learn = empty is not None and (empty.is_floating_point() or empty.is_complex())
        module.register_parameter(
            name, None if empty is None else nn.Parameter(empty, requires_grad=may_learn)
        )
    else:
        module.register_buffer(name, empty, persistent=bool(lasting))


def _refuse_hooks(module: nn.Module, path: str) -> None:
    where = path or "the model"
    if any(getattr(module, name, None) for name in _HOOKS):
        raise StructureError(f"{where}: has a hook, which cannot be saved; remove it")
    if "forward" in vars(module):
        raise StructureError(f"{where}: its forward was replaced, which cannot be saved")


def _same(one: Any, other: Any) -> bool:
    if type(one) is not type(other) or isinstance(one, nn.Module):
        return False
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one.cpu(), other.cpu())
    if callable(one) and getattr(one, "__qualname__", 0) == getattr(other, "__qualname__", 1):
        return True
    try:
        return bool(one == other) or (vars(one) == vars(other) if hasattr(one, "__dict__") else False)
    except (RuntimeError, TypeError, ValueError):
        return False


def _cached(value: Any, usual: Any) -> bool:
    """Whether running the model has put tensors where a new one has none (LeViT's attention biases)."""
    return isinstance(value, dict) and usual == {} and all(isinstance(one, Tensor) for one in value.values())


def _to_json(value: Any, path: str) -> Any:
    if value is None or (isinstance(value, (bool, int, float, str)) and not isinstance(value, enum.Enum)):
        return value
    if isinstance(value, enum.Enum):
        return {"__enum__": value.name}
    if isinstance(value, tuple):
        return {"__tuple__": [_to_json(one, path) for one in value]}
    if isinstance(value, list):
        return [_to_json(one, path) for one in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"__dict__": {key: _to_json(one, path) for key, one in value.items()}}
    raise StructureError(
        f"{path}: a {type(value).__name__} cannot be saved; only numbers, texts and lists of them"
    )


def _from_json(value: Any, present: Any) -> Any:
    if isinstance(value, list):
        return [_from_json(one, None) for one in value]
    if not isinstance(value, dict):
        return value
    if "__tuple__" in value:
        return tuple(_from_json(one, None) for one in value["__tuple__"])
    if "__dict__" in value:
        return {key: _from_json(one, None) for key, one in value["__dict__"].items()}
    if "__enum__" in value and isinstance(present, enum.Enum):
        return type(present)[value["__enum__"]]
    raise UserMistake("the saved model's description is not one that this version writes")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name

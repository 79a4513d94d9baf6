"""Counted work of a model: what its run on a device is made of, counted on tensors without data.

One pass over the operators that really run splits the work into kinds that cost differently: products with weights,
products of activations (attention), convolutions, elements that are only moved, elements that go through a softmax,
the first projection of the raw input. Latency is close to a sum of these with one price each
(``nas.latency.prediction.models``), which is why few measurements are enough.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from nas.profile import formulas
from nas.profile.by_torch import HIGHER_ORDER, OUR_FORMULAS, UNDIVIDED, function_name, unseen
from nas.profile.skeleton import empty, plain_kernels, refuse_lazy, skeleton

__all__ = ["Work", "count_work"]

logger = logging.getLogger(__name__)

# What a tensor was made of. A result is as far along as its farthest operand; a product with a weight turns raw
# into live.
_CONSTANT, _RAW, _LIVE = 0, 1, 2

_SOFTMAX = frozenset({"_softmax", "_safe_softmax", "_log_softmax"})
_GATHERS = frozenset({"embedding", "_embedding_bag", "index_select", "gather", "index"})
_CONVOLUTIONS = frozenset({"convolution", "_convolution", "convolution_overrideable", "cudnn_convolution"})


@dataclass(frozen=True)
class Work:
    """Work of one call, all samples of the batch together.

    Attributes:
        constant: 1; what a call costs whatever it does.
        products: matrix products and convolutions that run one after another: how deep the model is.
        launches: operators that do any work at all; views and reshapes are not among them.
        linear_macs: multiply-accumulates of products with weights.
        attention_macs: multiply-accumulates of products of two activations.
        convolution_macs: multiply-accumulates of convolutions.
        embedding_macs: multiply-accumulates of the first product that sees the raw input (patches, spectrogram),
            and elements gathered from embedding tables.
        elements: elements written by everything else (tokens x width: norms, activations, residual sums, copies).
        softmax_elements: elements written by softmax (heads x tokens^2).
        parameter_bytes: bytes of all parameters, shared ones once.
        batch: samples in the call.
    """

    constant: float
    products: float
    launches: float
    linear_macs: float
    attention_macs: float
    convolution_macs: float
    embedding_macs: float
    elements: float
    softmax_elements: float
    parameter_bytes: float
    batch: float

    def to_dict(self) -> dict[str, float]:
        """JSON form, in the order of the attributes."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Work:
        """The inverse of ``to_dict``. Raises ValueError for missing or unknown keys."""
        names = {field.name for field in dataclasses.fields(cls)}
        if set(data) != names:
            raise ValueError(f"not counted work: keys {sorted(set(data) ^ names)} are missing or unknown")
        return cls(**{name: float(data[name]) for name in names})

    @property
    def macs(self) -> float:
        """All multiply-accumulates."""
        return self.linear_macs + self.attention_macs + self.convolution_macs + self.embedding_macs


def count_work(model: nn.Module, inputs: Sequence[Tensor]) -> Work:
    """Count ``model`` as it runs in evaluation mode; it is not changed and its weights are not copied.

    Args:
        model: on any device, also ``meta``.
        inputs: what it is called with, the batch first; only shapes and types matter, unless the model's control
            flow reads values.

    flex_attention is one launch and two products, all queries x keys whatever its block mask. What runs inside of other
    operators that are called with functions (cond, while_loop) is not counted; a warning is logged that names them.

    Raises:
        UserMistake: parameters without a shape yet (``nn.LazyLinear``).
        Exception: whatever the model raises when called with ``inputs``.
    """
    refuse_lazy(model)
    seen = {id(p): p.numel() * p.element_size() for p in model.parameters()}
    batch = inputs[0].shape[0] if inputs and inputs[0].dim() else 1
    try:
        counter = _run(skeleton(model), [empty(x) for x in inputs])
    except (
        Exception
    ) as error:  # anything may go wrong without data; with data the model's own errors come out
        logger.info("%s cannot run without data (%s); counted with data", type(model).__name__, error)
        counter = _run(copy.deepcopy(model), inputs)
    if counter.unknown:
        logger.warning(
            "the work inside of %s in %s is not counted",
            ", ".join(sorted(counter.unknown)),
            type(model).__name__,
        )
    return Work(
        constant=1.0,
        products=float(counter.products),
        launches=float(counter.launches),
        linear_macs=float(counter.macs["linear"]),
        attention_macs=float(counter.macs["attention"]),
        convolution_macs=float(counter.macs["convolution"]),
        embedding_macs=float(counter.macs["embedding"] + counter.gathered),
        elements=float(counter.elements),
        softmax_elements=float(counter.softmax),
        parameter_bytes=float(sum(seen.values())),
        batch=float(batch),
    )


def _run(model: nn.Module, inputs: Sequence[Tensor]) -> _Counter:
    model.eval()
    counter = _Counter()
    for value in inputs:
        counter.mark(value, _RAW)
    with torch.no_grad(), plain_kernels(), counter:
        model(*inputs)
    return counter


class _Counter(TorchDispatchMode):
    """Sorts the work of every operator into its kind by what its operands were made of."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.macs = {"linear": 0, "attention": 0, "convolution": 0, "embedding": 0}
        self.products = self.launches = self.elements = self.softmax = self.gathered = 0
        self.unknown: set[str] = set()
        # By storage, so that a view is what its base is. Whoever is not listed was there before: a parameter.
        self._made: dict[int, int] = {}

    def mark(self, x: Tensor, made: int) -> None:
        """Say what ``x`` was made of."""
        self._made[_storage(x)] = made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operands = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [self._made.get(_storage(x), _CONSTANT) for x in operands]
        higher_order = isinstance(func, HIGHER_ORDER)
        result = unseen(func, args, kwargs) if higher_order else func(*args, **kwargs)
        results = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        if higher_order:
            self._count_higher_order(func, args, made, results)
            return result
        places = {_storage(x) for x in operands}
        if all(_storage(x) in places for x in results) and not func._schema.is_mutable:
            return result  # a view
        self._count(func, args, kwargs, made, result, results)
        return result

    def _count(
        self, func: Any, args: Any, kwargs: Any, made: list[int], result: Any, results: list[Tensor]
    ) -> None:
        packet = func.overloadpacket
        name = packet.__name__
        stage = max(made, default=_CONSTANT)
        size = sum(x.numel() for x in results)
        self.launches += 1
        macs = _macs(packet, name, args, kwargs, result)
        if macs is not None:
            self.products += 1
            activations = sum(kind != _CONSTANT for kind in made)
            self.macs[_kind(name, stage, activations)] += macs
            stage = _LIVE if stage == _RAW else stage
        elif name in _SOFTMAX:
            self.softmax += size
        elif name in _GATHERS and made and made[0] == _CONSTANT and stage != _CONSTANT:
            self.gathered += size
            stage = _LIVE
        else:
            self.elements += size
        for x in results:
            self.mark(x, stage)

    def _count_higher_order(self, func: Any, args: Any, made: list[int], results: list[Tensor]) -> None:
        stage = max(made, default=_CONSTANT)
        self.launches += 1
        self.elements += results[0].numel() if results else 0
        name = function_name(func)
        if name in UNDIVIDED:
            query, key, value = args[:3]
            self.products += 2
            self.macs["attention"] += formulas.attention(query.shape, key.shape, value.shape).macs
            self.softmax += query.shape[:-1].numel() * key.shape[-2]
            stage = _LIVE
        else:
            self.unknown.add(name)
        for x in results:
            self.mark(x, stage)


def _macs(packet: Any, name: str, args: Any, kwargs: Any, result: Any) -> int | None:
    """Of a product; None for anything else, Fourier transforms among it, which move more than they reckon."""
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=result)) // 2
    if packet in OUR_FORMULAS and not name.startswith("_fft"):
        return OUR_FORMULAS[packet](result, *args, **kwargs).macs
    return None


def _kind(name: str, stage: int, activations: int) -> str:
    if stage == _RAW and activations == 1:
        return "embedding"
    if name in _CONVOLUTIONS:
        return "convolution"
    return "attention" if activations > 1 else "linear"


def _storage(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)

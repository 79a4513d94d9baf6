"""Parameters and multiply-accumulates of a model, counted on tensors without data.

The counter is torch's FlopCounterMode over the operators that really run, with attention forced into matrix products,
because a fused kernel has no formula on every device. One multiply-accumulate is two of its operations. As is the
convention, only matrix products and convolutions count: no bias, normalisation, activation or other element-wise work.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

__all__ = ["Profile", "profile"]

logger = logging.getLogger(__name__)

# Without a formula, and either of more work than element-wise operators or hiding a whole layer.
_HEAVY = re.compile(
    r"_?(fft_\w+|cdist_\w+|pdist\w*|im2col|col2im|grid_sampler\w*|embedding_bag\w*|trilinear)"
    r"|_?linalg_(svd|qr|eig|cholesky|inv|lu|solve|ldl|lstsq|householder|matrix_exp)\w*"
    r"|_?(cholesky|triangular_solve|ormqr|geqrf|lobpcg)\w*"
    r"|\w*(lstm|gru|rnn|attention|attn|transformer|matmul)\w*"
    r"|\w+_mm(_\w+)?|\w*conv(olution|_depthwise|\d)\w*"
)
_OWN_NAMESPACES = ("aten", "prim", "prims", "profiler")


def _matrix_vector(matrix: Sequence[int], vector: Sequence[int], **_: Any) -> int:
    return 2 * matrix[0] * matrix[1]


def _add_matrix_vector(bias: Sequence[int], matrix: Sequence[int], vector: Sequence[int], **_: Any) -> int:
    return 2 * matrix[0] * matrix[1]


def _dot(left: Sequence[int], right: Sequence[int], **_: Any) -> int:
    return 2 * left[0]


# In operations, as the counter's own formulas; it has none for these.
_PRODUCTS_WITH_VECTORS: dict[Any, Callable[..., int]] = {
    torch.ops.aten.mv: _matrix_vector,
    torch.ops.aten.addmv: _add_matrix_vector,
    torch.ops.aten.dot: _dot,
    torch.ops.aten.vdot: _dot,
}


@dataclass(frozen=True)
class Profile:
    """What a model costs to keep and to run once.

    Attributes:
        params: numbers in all parameters, shared ones once.
        trainable: those of them that a training changes.
        macs: multiply-accumulates of one call with the given inputs, all samples of the batch together.
        uncounted: operators that did work which ``macs`` does not contain, by name; to be shown beside ``macs``.
        method: ``meta`` (without data) or ``data``, when the model's control flow needs the values of its inputs and
            ``macs`` therefore holds for inputs like these.
    """

    params: int
    trainable: int
    macs: int
    uncounted: tuple[str, ...] = ()
    method: str = "meta"

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {**asdict(self), "uncounted": list(self.uncounted)}


def profile(model: nn.Module, inputs: Sequence[Tensor]) -> Profile:
    """Count ``model`` as it runs in evaluation mode; it is not changed and its weights are not copied.

    Args:
        model: on any device.
        inputs: what it is called with; only shapes and types matter unless its control flow reads values. With one
            sample, ``macs`` is the cost of one sample.

    Raises:
        Exception: whatever the model raises when called with ``inputs``.
    """
    parameters = list(model.parameters())
    params = sum(p.numel() for p in parameters)
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    try:
        skeleton = _skeleton(model)
        macs, uncounted = _count(skeleton, [_empty(x) for x in inputs])
        return Profile(params, trainable, macs, uncounted)
    except (
        Exception
    ) as error:  # anything may go wrong without data; with data the model's own errors come out
        logger.info(
            "%s cannot run without data (%s); counted with data", type(model).__name__, _first_line(error)
        )
    macs, uncounted = _count(copy.deepcopy(model), inputs)
    return Profile(params, trainable, macs, uncounted, method="data")


def _skeleton(model: nn.Module) -> nn.Module:
    """A copy in which every tensor is on the meta device; no data is copied on the way."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for values in (module._parameters, module._buffers, vars(module)):
            for value in values.values():
                if isinstance(value, nn.Parameter):
                    memo[id(value)] = nn.Parameter(_empty(value), requires_grad=value.requires_grad)
                elif isinstance(value, Tensor):
                    memo[id(value)] = _empty(value)
    return copy.deepcopy(model, memo)


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x, device="meta", requires_grad=False)


def _count(model: nn.Module, inputs: Sequence[Tensor]) -> tuple[int, tuple[str, ...]]:
    model.eval()
    counter = FlopCounterMode(display=False, custom_mapping=_PRODUCTS_WITH_VECTORS)
    recorder = _Recorder()
    with torch.no_grad(), _plain_kernels(), recorder, counter:
        model(*inputs)
    return int(counter.get_total_flops()) // 2, tuple(sorted(recorder.uncounted))


@contextlib.contextmanager
def _plain_kernels() -> Iterator[None]:
    """Attention as matrix products: neither fused attention nor the fused encoder layer, which have no formula."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class _Recorder(TorchDispatchMode):
    """Notes operators that do heavy work without a formula; it lies below the counter and sees what that decomposed."""

    def __init__(self) -> None:
        super().__init__()
        self.uncounted: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = getattr(func, "overloadpacket", func)
        if packet not in flop_registry and packet not in _PRODUCTS_WITH_VECTORS:
            namespace, _, name = str(getattr(packet, "_qualified_op_name", packet)).partition("::")
            if namespace not in _OWN_NAMESPACES:
                self.uncounted.add(
                    f"{namespace}::{name}"
                )  # a kernel of somebody else: nothing is known of it
            elif _HEAVY.fullmatch(name):
                self.uncounted.add(name)
        return result


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]

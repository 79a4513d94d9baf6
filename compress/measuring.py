"""What models cost: parameters, MACs, and latency on the target, always interleaved with the one compared against."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compress.passes.base import Context
from nas.errors import RunStopped
from nas.latency import DeviceGate, Pair, Plan, Session, Target, measure_together
from nas.profile import profile
from spaces.layers.int8_linear import DynamicInt8Linear

__all__ = ["compare_on_target", "count", "inputs_for_target", "measure_against"]


def count(model: nn.Module, example: Sequence[Tensor]) -> dict[str, Any]:
    """``params``, ``macs`` of one sample, and what the counter could not count (``uncounted``).

    Weights of int8 are buffers, but count among the parameters all the same.
    """
    # The counter follows the model to the device of its inputs.
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    found = profile(model, [x.to(device) for x in example])
    quantised = [module for module in model.modules() if isinstance(module, DynamicInt8Linear)]
    hidden = sum(one.weight.numel() + (0 if one.bias is None else one.bias.numel()) for one in quantised)
    return {"params": found.params + hidden, "macs": found.macs, "uncounted": list(found.uncounted)}


def inputs_for_target(example: Sequence[Tensor], target: Target) -> tuple[Tensor, ...]:
    """The example (batch 1), repeated to the batch of the target."""
    return tuple(x.expand(target.batch, *x.shape[1:]).clone() for x in example)


def measure_against(
    models: Mapping[str, nn.Module],
    against: str,
    example: Sequence[Tensor],
    target: Target,
    *,
    seconds: float,
    precision: float = 0.01,
    seed: int = 0,
) -> Session:
    """Measure ``models`` in the same rounds, each compared with the one named ``against``; no other work of ours runs
    on the device meanwhile.

    Raises:
        RunStopped: a model could not be measured, and why.
        UserMistake: the target is not there.
    """
    target.check()
    inputs = inputs_for_target(example, target)
    with DeviceGate(str(target.torch_device())).exclusive() as lease:
        session = measure_together(
            {name: (_movable(model, target), inputs) for name, model in models.items()},
            target,
            plan=Plan(max_seconds=seconds, precision=precision, seed=seed),
            against=against if len(models) > 1 else None,
            lease=lease,
        )
    for name, reason in session.failures.items():
        raise RunStopped(f"latency of {name!r} on {str(target)!r} could not be measured: {reason}")
    return session


def compare_on_target(
    candidate: nn.Module, other: nn.Module, context: Context, *, seconds: float = 6.0, precision: float = 0.01
) -> Pair:
    """Whether ``candidate`` is really faster than ``other`` on the target of the context: see ``Pair.verdict``."""
    session = measure_against(
        {"other": other, "candidate": candidate},
        "other",
        context.example,
        context.target,
        seconds=seconds,
        precision=precision,
        seed=context.seed,
    )
    return session.pair("candidate", "other")


def _movable(model: nn.Module, target: Target) -> nn.Module:
    foreign = any(type(tensor.data) is not Tensor for tensor in (*model.parameters(), *model.buffers()))
    return _Held(model, target) if foreign else model


class _Held(nn.Module):
    """A model with tensors of another package (torchao), on the target already: in inference mode, in which all is
    measured, these cannot be moved."""

    def __init__(self, model: nn.Module, target: Target):
        super().__init__()
        # In a tuple, so that no one finds the tensors who goes through the modules.
        self._model = (copy.deepcopy(model).eval().to(target.torch_device(), target.torch_dtype()),)

    def forward(self, *inputs: Any) -> Any:
        """As the model."""
        return self._model[0](*inputs)
